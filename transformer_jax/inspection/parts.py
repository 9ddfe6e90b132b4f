"""The same words for every family: which attention, which stack of layers, which place in a forward
pass."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.models.functional import Model, check_tokens
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.nn.attention import Attention
from transformer_jax.nn.sites import PREFIXES, SITES, check_site
from transformer_jax.nn.stack import Stack

Tokens = jax.Array | np.ndarray | tuple[jax.Array | np.ndarray, ...]


def check_kind(model: Model, kind: str) -> None:
    """Raises ValueError for a kind of attention that the model does not have."""
    kinds = model.stacks()
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(kinds)}, the attention of a {type(model).__name__}")


def site(kind: str, name: str) -> str:
    """The name by which ``intervene`` is called, such as ``"cross_head_output"``."""
    return PREFIXES[kind] + name


def kind_of(site: str) -> str:
    """The kind of attention in whose layers a site is; ValueError for a site that there is not."""
    check_site(site)
    return SITES[site]


def trace_of(trace: Trace | PairTrace, kind: str) -> Trace:
    """The trace of one kind of attention."""
    parts = trace.parts()
    if kind not in parts:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(parts)}, the attention in this trace")
    return parts[kind]


def stack_of(model: Model, kind: str) -> Stack:
    """The layers that hold one kind of attention."""
    return model.stacks()[kind]


def attention_of(model: Model, kind: str) -> Attention:
    """The weights of one kind of attention, all layers stacked."""
    blocks = stack_of(model, kind).blocks
    return blocks.cross_attention if kind == "cross" else blocks.attention


def output_kernel(attention: Attention) -> jax.Array:
    """The output projection head by head, float32 ``[L, N, H, D]``."""
    config = attention.config
    kernel = attention.output.kernel[...].astype(jnp.float32)
    return kernel.reshape(-1, config.num_heads, config.head_dim, config.model_dim)


def read_out(model: Model) -> Callable[[jax.Array], jax.Array]:
    """From the residual stream ``[..., D]`` to logits, float32 ``[..., V]``."""
    norm = model.final_norm
    return lambda stream: model.unembed(stream if norm is None else norm(stream))


def checked_tokens(model: Model, tokens: Tokens, kind: str) -> tuple[jax.Array | np.ndarray, ...]:
    """The arguments of a model's call: ``tokens_BT``, or ``(source_BS, target_BT)``.

    Raises:
      ValueError: for a kind of attention that the model does not have, or a token id outside its
        vocabulary.
    """
    check_kind(model, kind)
    tokens = tokens if isinstance(tokens, tuple) else (tokens,)
    tokens = tuple(ids if isinstance(ids, jax.Array) else np.asarray(ids) for ids in tokens)
    for ids in tokens:
        check_tokens(ids, model.config.vocab_size)
    return tokens
