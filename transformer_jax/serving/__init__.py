"""A server of models: an engine that answers many requests together, and an API over HTTP."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.serving.engine import ClosedError, Engine, QueueFullError
    from transformer_jax.serving.replies import Reply, TextRequest
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["ClosedError", "Engine", "QueueFullError", "Reply", "TextRequest"]
