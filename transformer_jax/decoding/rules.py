"""Sampling rules and interventions of a user's own, in the form in which compiled decoding takes
them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence

import jax
import numpy as np

from transformer_jax.models.functional import Model
from transformer_jax.nn.sites import Intervene


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What a sampling rule may read beside the logits.

    Attributes:
      tokens_BS: token ids slot by slot: padding on the left, then prompt, then new tokens, then
        unused slots.
      valid_BS: True where a slot holds a token of the row's text. These slots are contiguous; how
        many slots come before and after them depends on the batch, so a rule must not depend on it.
      num_new: how many tokens have been drawn before this one, a scalar.
    """

    tokens_BS: jax.Array
    valid_BS: jax.Array
    num_new: jax.Array


Processor = Callable[[jax.Array, History], jax.Array]


def check_processors(processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """The rules as pytrees; a plain function becomes a part of the program.

    Raises:
      ValueError: for what cannot be called, or a class in the place of its instance.
    """
    for rule in processors:
        if isinstance(rule, type) or not callable(rule):
            raise ValueError(f"processors has {rule!r}, expected rules (logits_BV, history) -> logits_BV; pass a "
                             "function, or an instance of a registered dataclass with __call__")
    return tuple(_as_pytree(rule) for rule in processors)


def check_intervention(intervene: Intervene | None, model: Model) -> Intervene | None:
    """The intervention as a pytree.

    Raises:
      ValueError: for a layer, head or site that the model does not have, or an edit of single
        positions.
    """
    if hasattr(intervene, "check"):
        _refuse_positions(intervene)
        one_token = np.zeros((1, 1), np.int32)
        intervene.check(model, (one_token, one_token))
    return _as_pytree(intervene)


def _refuse_positions(edit: Intervene) -> None:
    for part in getattr(edit, "edits", ()):
        _refuse_positions(part)
    for name in ("positions", "queries", "keys"):
        if getattr(edit, "arguments", {}).get(name) is not None:
            raise ValueError(f"intervene has an edit with {name}={edit.arguments[name]}; while decoding, each step "
                             "sees one token, so an edit must act at all positions: leave it at None")


def _as_pytree(function: Callable | None) -> Callable | None:
    return jax.tree_util.Partial(function) if isinstance(function, types.FunctionType) else function
