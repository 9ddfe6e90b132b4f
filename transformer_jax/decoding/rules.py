"""Checks a user's own sampling rules and interventions, and converts them to pytrees for compiled
decoding."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer_jax.models.functional import Model
from transformer_jax.nn.sites import Intervene


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The values that a sampling rule may read in addition to the logits.

    Attributes:
      tokens_BS: token ids: padding on the left, then the prompt, then new tokens, then unused
        slots.
      valid_BS: True for slots that hold a token of the row's text. These slots are contiguous. The
        number of slots before and after them depends on the batch, so a rule must not depend on it.
      num_new: the number of tokens drawn so far, a scalar; in a server, one for each row ``[B, 1]``.
      ends_V: True for tokens that end a text; ``None`` if no token does. In a server, ``[B, V]``.
    """

    tokens_BS: Int[Array | np.ndarray, "B S"]
    valid_BS: Bool[Array | np.ndarray, "B S"]
    num_new: Int[Array, ...] | int
    ends_V: Bool[Array | np.ndarray, "... V"] | None = None


Processor = Callable[[Float[Array, "B V"], History], Float[Array, "B V"]]


def check_processors(processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """Returns the rules as pytrees; a plain function becomes a static part of the compiled program.

    Raises:
      ValueError: if a rule cannot be called, or is a class instead of an instance of it.
    """
    if not isinstance(processors, Iterable):
        raise ValueError(f"processors={processors!r} is not a list of rules; write processors=[...]")
    for rule in processors:
        if isinstance(rule, type) or not callable(rule):
            raise ValueError(f"processors has {rule!r}, expected rules (logits_BV, history) -> logits_BV; pass a "
                             "function, or an instance of a registered dataclass with __call__")
    return tuple(jax.tree_util.Partial(rule) if isinstance(rule, types.FunctionType) else rule for rule in processors)


def check_intervention(intervene: Intervene | None, model: Model) -> Intervene | None:
    """Returns the intervention as a pytree.

    Raises:
      ValueError: if it cannot be called; if it edits a layer, head or site that the model does not
        have; or if it edits single positions.
    """
    if intervene is None:
        return None
    if isinstance(intervene, type) or not callable(intervene):
        raise ValueError(f"intervene={intervene!r}, expected intervene(site, layer, value) -> value, or an edit of "
                         "transformer_jax.inspection.interventions; its function together(...) joins several edits")
    check: Any = getattr(intervene, "check", None)
    if check is not None:
        _refuse_positions(intervene)
        one_token = np.zeros((1, 1), np.int32)
        check(model, (one_token, one_token))
    return jax.tree_util.Partial(intervene) if isinstance(intervene, types.FunctionType) else intervene


def _refuse_positions(edit: Intervene) -> None:
    """Raises ValueError if an edit, or a part of it, acts at single positions only."""
    for part in getattr(edit, "edits", ()):
        _refuse_positions(part)
    for name in ("positions", "queries", "keys"):
        if getattr(edit, "arguments", {}).get(name) is not None:
            raise ValueError(f"intervene has an edit with {name}={edit.arguments[name]}; while decoding, each step "
                             "sees one token, so an edit must act at all positions: leave it at None")
