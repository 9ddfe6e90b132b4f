"""What models learn: one file a task, all known by name; see
:class:`transformer_jax.tasks.base.Task`."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.tasks.base import Task, TaskData, get, make, name_of, names, register
    from transformer_jax.tasks.language_model import LanguageModel
    from transformer_jax.tasks.masked_language_model import MaskedLanguageModel
    from transformer_jax.tasks.policy import PolicyLearning
    from transformer_jax.tasks.preferences import DirectPreference
    from transformer_jax.tasks.reward import RewardModeling
    from transformer_jax.tasks.sft import SupervisedFineTuning
    from transformer_jax.tasks.translation import Translation
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "DirectPreference", "LanguageModel", "MaskedLanguageModel", "PolicyLearning", "RewardModeling",
    "SupervisedFineTuning", "Task", "TaskData", "Translation", "get", "make", "name_of", "names", "register",
]
