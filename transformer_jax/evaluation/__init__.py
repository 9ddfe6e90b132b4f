"""Measures models as others do: through the harness ``lm-eval``, and by the scores of answers and
summaries."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.evaluation.continuations import continuation_scores
    from transformer_jax.evaluation.harness import HarnessModel
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["HarnessModel", "continuation_scores"]
