"""What the built-in sampling rules have in common: they are pytrees whose fields are checked when a
user makes them, and whose numbers may differ from row to row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from transformer_jax.decoding.setting_ranges import checked_setting

Rule = TypeVar("Rule", bound=type)


def rule_pytree(cls: Rule) -> Rule:
    """Registers a frozen dataclass as a pytree whose leaves are its fields.

    The checks in ``__post_init__`` run only when a user creates a rule. JAX creates rules with
    other leaves, such as tracers, so unflattening skips the checks.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def unflatten(_: None, leaves: Iterable[Any]) -> Any:
        rule = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(rule, name, leaf)
        return rule

    jax.tree_util.register_pytree_with_keys(
        cls, lambda rule: ([(jax.tree_util.GetAttrKey(name), getattr(rule, name)) for name in names], None), unflatten)
    return cls


def check_field(rule: Any, field: str, setting: str) -> None:
    """Checks a field of a rule by the range of a setting; traced values are not checked."""
    value = getattr(rule, field)
    if not isinstance(value, Tracer):
        object.__setattr__(rule, field, checked_setting(setting, value))


def apply_where(flag: jax.Array | bool, function: Callable[[jax.Array], jax.Array], logits_BV: jax.Array) -> jax.Array:
    """Applies a function to the rows for which a flag is True.

    Args:
      flag: True or False for all rows, or one for each row ``[B, 1]``. It may be traced.
      function: the function; it is computed only if a row needs it.
      logits_BV: logits, ``[B, V]``.

    Returns:
      Logits, ``[B, V]``.
    """
    if jnp.ndim(flag) == 0:
        return jax.lax.cond(flag, function, lambda x: x, logits_BV)
    return jax.lax.cond(jnp.any(flag), lambda x: jnp.where(flag, function(x), x), lambda x: x, logits_BV)
