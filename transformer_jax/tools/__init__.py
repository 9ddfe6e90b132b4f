"""What an assistant looks up or computes while it answers: passages of documents, and a
calculator."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.tools.arithmetic import calculate
    from transformer_jax.tools.calculator import CalculatedAnswer, answer_with_calculator
    from transformer_jax.tools.passages import Passage, Passages, with_passages
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["CalculatedAnswer", "Passage", "Passages", "answer_with_calculator", "calculate", "with_passages"]
