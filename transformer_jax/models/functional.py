"""Entry points for research code: jitted calls with the checks that only the host can make."""

from __future__ import annotations

import types
from typing import Any

import jax
import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.models.texts import Text, as_arrays

Model = Decoder | Encoder | EncoderDecoder | RewardModel

_FAMILIES = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder, "reward": RewardModel}


def make_model(config: ModelConfig, *, key: jax.Array) -> Model:
    """A model of the config's family, with random weights."""
    return _FAMILIES[config.family](config, key=key)


def count_parameters(config: ModelConfig) -> int:
    """Number of weights of a model of this shape; nothing is allocated."""
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@jax.jit
def _logits(model: Model, tokens: tuple[jax.Array, ...], options: dict[str, jax.Array]) -> jax.Array:
    return model(*tokens, **options).logits


@jax.jit
def _trace(model: Model, tokens: tuple[jax.Array, ...], options: dict[str, jax.Array]) -> Trace | PairTrace:
    return model(*tokens, **options).trace


def forward(model: Model, *tokens: Text, tokenizer: Any = None, **options: Any) -> jax.Array:
    """Logits, float32 ``[B, T, V]``, by one jitted call.

    Args:
      model: the model.
      *tokens: those of the model's call: ``tokens_BT``, or ``source_BS, target_BT``. A string, a
        list of strings, ids or lists of ids will do in place of an array; rows of different lengths
        are padded on the right.
      tokenizer: the model's, for strings. A decoder reads a string as a prompt, an encoder between
        ``<s>`` and ``</s>``, an encoder-decoder a source before ``</s>`` and a target after
        ``<s>``.
      **options: arrays that the model's call takes, such as ``segment_ids_BT``; and ``intervene``,
        a function, or an edit of :mod:`transformer_jax.inspection.interventions`, whose layer, head
        and position are traced.

    Raises:
      ValueError: for a token id outside the vocabulary (JAX would clamp it silently), strings
        without a tokenizer, or an edit of what the model does not have.
    """
    arrays, segments = as_arrays(model, tokens, tokenizer)
    return _logits(model, arrays, _checked(model, arrays, segments | options))


def trace(model: Model, *tokens: Text, tokenizer: Any = None, **options: Any) -> Trace | PairTrace:
    """The :class:`Trace` of a forward pass, by one jitted call; arguments as in :func:`forward`."""
    arrays, segments = as_arrays(model, tokens, tokenizer)
    return _trace(model, arrays, _checked(model, arrays, segments | options))


def _checked(model: Model, tokens: tuple[jax.Array, ...], options: dict[str, Any]) -> dict[str, Any]:
    for ids in tokens:
        check_tokens(ids, model.config.vocab_size)
    intervene = options.get("intervene")
    if isinstance(intervene, types.FunctionType):  # part of the program, and no argument of it
        return options | {"intervene": jax.tree_util.Partial(intervene)}
    if hasattr(intervene, "check"):
        intervene.check(model, tokens)
    return options


def check_tokens(tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary; traced tokens pass unseen."""
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(f"token id {int(ids[outside][0])} is outside the vocabulary of {vocab_size} "
                         f"(ids 0 to {vocab_size - 1})")
