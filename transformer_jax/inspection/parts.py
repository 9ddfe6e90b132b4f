"""Access to the parts of any model by the same names: kinds of attention, stacks of layers, and
sites in the forward pass; and checks of models, traces and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from transformer_jax.models.classifier import Classifier
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.functional import check_tokens
from transformer_jax.models.heads import RewardModel
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.nn.attention import Attention
from transformer_jax.nn.sites import PREFIXES, SITES, check_site
from transformer_jax.nn.stack import Stack

LanguageModel = Decoder | Encoder | EncoderDecoder
Ids = jax.Array | np.ndarray | Sequence[int] | Sequence[Sequence[int]]
Tokens = Ids | tuple[Ids, ...]


def checked_model(model: Any) -> LanguageModel:
    """Returns the model, or the trunk of a classifier; raises ValueError if it has no logits or is
    not a model."""
    if isinstance(model, Classifier):
        return model.trunk
    if isinstance(model, RewardModel):
        raise ValueError("a reward model reads one number and no logits: look inside its decoder, model.trunk")
    if not hasattr(model, "stacks"):
        raise ValueError(f"{type(model).__name__} is not a model: pass a Decoder, an Encoder, an EncoderDecoder, or "
                         "what transformer_jax.load returns")
    return model


def vocab_size(model: LanguageModel) -> int:
    """Returns the number of token ids of a model."""
    return cast(int, model.config.vocab_size)  # it is None only in a config without a model


def check_kind(model: LanguageModel, kind: str) -> None:
    """Raises ValueError if the model does not have this kind of attention."""
    kinds = checked_model(model).stacks()
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(kinds)}, the attention of a {type(model).__name__}")


def site(kind: str, name: str) -> str:
    """Returns the full name of a site, such as ``"cross_head_output"``, for ``intervene``."""
    return PREFIXES[kind] + name


def kind_of(site: str) -> str:
    """Returns the kind of attention whose layers contain a site; raises ValueError if the site does
    not exist."""
    check_site(site)
    return SITES[site]


def trace_of(trace: Trace | PairTrace, kind: str) -> Trace:
    """Returns the trace of one kind of attention; raises ValueError if ``trace`` does not contain
    it or is not a trace."""
    if not isinstance(trace, Trace | PairTrace):
        raise ValueError(f"{type(trace).__name__} is not a trace: pass what transformer_jax.trace(model, tokens) "
                         "returns")
    parts = trace.parts()
    if kind not in parts:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(parts)}, the attention in this trace")
    return parts[kind]


def stream_of(trace: Trace | PairTrace) -> Float[Array, "B T D"]:
    """Returns the residual stream after the last layer (in an encoder-decoder, of the decoder)."""
    final = trace_of(trace, "self").final
    if final is None:
        raise ValueError("a cross-attention trace has no final residual stream: pass the trace of the whole "
                         "forward pass")
    return final


def stack_of(model: LanguageModel, kind: str) -> Stack:
    """Returns the stack of layers that contains one kind of attention."""
    return model.stacks()[kind]


def blocks_of(stack: Stack) -> Any:
    """Returns the blocks of a stack, with weights ``[L, ...]`` also if the layers share them.

    If only some layers have experts, the blocks have no feed-forward layers, because these differ.
    """
    if stack.is_mixed:
        order = np.argsort(np.concatenate(stack.layers_of_groups))
        groups = [jax.tree.map(lambda leaf: leaf, blocks) for blocks in (stack.dense_blocks, stack.blocks)]
        for blocks in groups:
            blocks.mlp = None
        # The modules of the groups know different configs, so their trees differ, but not their leaves.
        leaves, trees = zip(*map(jax.tree.flatten, groups), strict=True)
        return jax.tree.unflatten(trees[-1], [jnp.concatenate(each)[order] for each in zip(*leaves, strict=True)])
    if not stack.config.shared_layers:
        return stack.blocks
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (stack.num_layers, *leaf.shape[1:])), stack.blocks)


def attention_of(model: LanguageModel, kind: str) -> Attention:
    """Returns the weights of one kind of attention, stacked over all layers."""
    blocks = blocks_of(stack_of(model, kind))
    return blocks.cross_attention if kind == "cross" else blocks.attention


def output_kernel(attention: Attention) -> Float[Array, "L N H D"]:
    """Returns the output projection of each head, float32 ``[L, N, H, D]``."""
    kernel_LFD = attention.output.kernel[...].astype(jnp.float32)
    L, F, D = kernel_LFD.shape
    N = attention.config.num_heads
    return kernel_LFD.reshape(L, N, F // N, D)


def read_out(model: LanguageModel) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from the residual stream ``[..., D]`` to float32 logits
    ``[..., V]``."""
    norm = model.final_norm
    return lambda stream: model.unembed(stream if norm is None else norm(stream))


def checked_tokens(model: LanguageModel, tokens: Tokens, kind: str) -> tuple[jax.Array | np.ndarray, ...]:
    """Returns the positional arguments of a model's call: ``(tokens_BT,)``, or for an
    encoder-decoder ``(source_BS, target_BT)``.

    Raises:
      ValueError: if the model does not have this kind of attention, if the tokens are not token ids
        ``[B, T]``, or if an id is outside the vocabulary.
    """
    check_kind(model, kind)
    given = tokens if isinstance(tokens, tuple) else (tokens,)
    expected = "(source_BS, target_BT)" if model.reads_sources else "tokens_BT"
    if len(given) != (2 if model.reads_sources else 1):
        raise ValueError(f"a {type(model).__name__} reads {expected}; got {len(given)} "
                         f"array{'s' if len(given) > 1 else ''} of tokens")
    found = tuple(ids if isinstance(ids, jax.Array) else as_ids(ids) for ids in given)
    for ids in found:
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens are whole numbers [B, T] with at least one token; got {ids.dtype} "
                             f"{list(ids.shape)}" + (": add the batch axis, ids[None]" if ids.ndim == 1 else ""))
        check_tokens(ids, vocab_size(model))
    return found


def as_ids(tokens: Any) -> np.ndarray:
    """Converts token ids to an array; raises ValueError for text or rows of different lengths."""
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise ValueError("rows of tokens differ in length: pad them, and pass segment_ids_BT, 0 for padding") from error
    if ids.dtype.kind in "US":
        raise ValueError(f"{tokens!r} is text: pass token ids, such as inspect_text(...).ids[None], or "
                         "np.array([tokenizer.encode(text)])")
    return ids


def check_count(name: str, count: int, most: int | None = None) -> None:
    """Raises ValueError if a count is not a whole number from 1 to ``most``."""
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1 or (most or count) < count:
        raise ValueError(f"{name}={count!r}; expected a whole number from 1" + ("" if most is None else f" to {most}"))
