"""Tasks: what a model learns. Each task is one file, and ``transformer_jax.tasks.base.Task`` is
their base class."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.tasks.base import Task
    from transformer_jax.tasks.bidirectional_language_model import BidirectionalLanguageModel
    from transformer_jax.tasks.classification import TextClassification
    from transformer_jax.tasks.embedding import SentenceEmbedding
    from transformer_jax.tasks.language_model import LanguageModel
    from transformer_jax.tasks.masked_language_model import MaskedLanguageModel
    from transformer_jax.tasks.policy import PolicyLearning
    from transformer_jax.tasks.preferences import DirectPreference
    from transformer_jax.tasks.registry import get, make, name_of, names, register
    from transformer_jax.tasks.reward import RewardModeling
    from transformer_jax.tasks.sft import SupervisedFineTuning
    from transformer_jax.tasks.sparse_autoencoder import SparseAutoencoding
    from transformer_jax.tasks.task_data import TaskData
    from transformer_jax.tasks.token_classification import TokenClassification
    from transformer_jax.tasks.translation import Translation
    from transformer_jax.tasks.word_vectors import WordVectorLearning
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "BidirectionalLanguageModel", "DirectPreference", "LanguageModel", "MaskedLanguageModel", "PolicyLearning",
    "RewardModeling", "SentenceEmbedding", "SparseAutoencoding", "SupervisedFineTuning", "Task", "TaskData",
    "TextClassification", "TokenClassification", "Translation", "WordVectorLearning", "get", "make", "name_of",
    "names", "register",
]
