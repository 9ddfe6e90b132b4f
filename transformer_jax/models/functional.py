"""Compiled calls of models for research code, with the checks that only the host can make."""

from __future__ import annotations

import itertools
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float

from transformer_jax.config import ModelSettings
from transformer_jax.config.families import model_class_of
from transformer_jax.models.classifier import Classifier
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.models.inputs import check_values
from transformer_jax.models.output import Output, PairTrace, Trace
from transformer_jax.models.texts import Text, as_arrays
from transformer_jax.ops.checks import check_ids
from transformer_jax.settings import check_type

Model = Decoder | Encoder | EncoderDecoder | RewardModel | Classifier


def make_model(config: ModelSettings, *, key: jax.Array) -> Model:
    """Creates a model of the config's family, with random weights.

    Args:
      config: the shape of the model; ``vocab_size`` must be set.
      key: PRNG key, such as ``jax.random.key(0)``.

    Returns:
      A ``Decoder``, ``Encoder``, ``EncoderDecoder``, ``RewardModel`` or ``Classifier``, or the model
      of another registered family.

    Raises:
      ValueError: if the config has no ``vocab_size``.
    """
    check_type("config", config, ModelSettings, "a tj.ModelConfig, such as tj.presets.get(name)")
    return model_class_of(config.family)(config, key=key)


def count_parameters(config: ModelSettings, *, active: bool = False) -> int:
    """Counts the weights of a model of this shape without allocating them.

    Args:
      config: the shape of the model.
      active: whether to count only the weights that process a token. In a mixture of experts, these
        are all weights but those of the experts that a token does not choose.

    Returns:
      The number of weights.
    """
    check_type("config", config, ModelSettings, "a tj.ModelConfig, such as tj.presets.get(name)")
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    moe = getattr(config, "moe", None)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - (moe.num_idle(config) if active and moe else 0)


@jax.jit
def _logits(model: Model, tokens: tuple[jax.Array, ...], options: dict[str, jax.Array]) -> jax.Array:
    return cast(Output, model(*tokens, **options)).logits


@jax.jit
def _trace(model: Model, tokens: tuple[jax.Array, ...], options: dict[str, jax.Array]) -> Trace | PairTrace:
    return cast(Output, model(*tokens, **options)).trace


def check_model(function: str, model: Any) -> None:
    """Checks that a model was given, and not the bundle, the config or the list that holds one.

    Args:
      function: the name of the function, for the message.
      model: what was given.

    Raises:
      ValueError: if it is not a model.
    """
    if not hasattr(model, "config") or not hasattr(model, "reads_sources"):
        hint = "pass its .model" if hasattr(model, "model") else (
            "pass a Decoder, an Encoder or an EncoderDecoder, such as tj.load(directory).model")
        raise ValueError(f"{function} was given an object of type {type(model).__name__}, which is not a model; {hint}")


def forward(model: Model, *tokens: Text | None, tokenizer: Any = None, **options: Any) -> Float[Array, "B ..."]:
    """Computes logits with one compiled call.

    Args:
      model: the model.
      *tokens: the tokens of the model's call: ``tokens_BT``, or ``source_BS, target_BT``. Each can
        be an array, a string, a list of strings, a list of ids, or a list of lists of ids. Rows of
        different lengths are padded on the right.
      tokenizer: the model's tokenizer; needed for strings. A decoder reads a string as a prompt,
        and an encoder reads it between ``<s>`` and ``</s>``. An encoder-decoder reads a source with
        ``</s>`` after it, and a target with ``<s>`` before it.
      **options: further arguments of the model's call, such as ``segment_ids_BT``.
        ``embeddings_BTD`` takes the place of tokens, for gradients of the input and for soft
        prompts: ``forward(model, embeddings_BTD=x)``; the model still adds positions. An
        encoder-decoder takes ``source_embeddings_BSD`` and ``target_embeddings_BTD``:
        ``forward(model, None, target_BT, source_embeddings_BSD=x)``. ``intervene`` is a function,
        or an edit of ``transformer_jax.inspection.interventions``, whose layer, head and position
        are traced.

    Returns:
      Logits, float32 ``[B, T, V]``; the logits of the labels for a classifier.

    Raises:
      ValueError: for a token id, position or token type beyond its table (JAX alone would silently
        clamp it), strings without a tokenizer, an empty batch, embeddings of another shape, an edit
        of a part that the model does not have, or a reward model, which has no logits.
    """
    check_model("forward", model)
    if isinstance(model, RewardModel):
        raise ValueError("a reward model has no logits, because it predicts one number; call model(tokens_BT) or "
                         "model.rewards(tokens_BT), or pass its decoder, model.trunk, which has logits")
    arrays, segments = as_arrays(model, tokens, tokenizer)
    return _logits(model, arrays, checked_options(model, arrays, segments | options))


def trace(model: Model, *tokens: Text | None, tokenizer: Any = None, **options: Any) -> Trace | PairTrace:
    """Computes the trace of a forward pass with one compiled call.

    Args:
      model: the model. For a reward model, the result is the trace of its decoder.
      *tokens: the tokens of the model's call, in any form that ``forward`` takes.
      tokenizer: the model's tokenizer; needed for strings.
      **options: further arguments of the model's call, as in ``forward``.

    Returns:
      A ``Trace``; a ``PairTrace`` for an encoder-decoder.

    Raises:
      ValueError: for the same reasons as ``forward``, except that reward models are accepted.
    """
    check_model("trace", model)
    model = model.trunk if isinstance(model, RewardModel) else model
    arrays, segments = as_arrays(model, tokens, tokenizer)
    return _trace(model, arrays, checked_options(model, arrays, segments | options))


def checked_options(model: Model, tokens: tuple[jax.Array, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Checks the tokens and options of a model's call, and makes an intervention a value that
    ``jit`` accepts.

    Args:
      model: the model.
      tokens: the arrays of token ids of the call.
      options: the other arguments of the call.

    Returns:
      The options. Lists have become arrays, and an intervention has become a pytree.

    Raises:
      ValueError: for the same reasons as ``forward``.
    """
    options = {name: np.asarray(given) if isinstance(given, (list, tuple)) else given
               for name, given in options.items()}
    for ids in tokens:
        if ids is not None and not isinstance(ids, (np.ndarray, jax.Array)):  # such as a tensor of torch
            raise ValueError(f"tokens are of type {type(ids).__name__}; pass strings, lists of token ids, or an array "
                             "of integers")
        check_values(model.config, ids)
    check_values(model.config, None, options.get("positions_BT"), options.get("token_types_BT"))
    intervene: Any = options.get("intervene")
    # A plain function is a static part of the compiled program; jit cannot take it as an argument.
    if callable(intervene) and jax.tree_util.all_leaves([intervene]):
        return options | {"intervene": jax.tree_util.Partial(intervene)}
    if hasattr(intervene, "check"):
        names = ("source_embeddings_BSD", "target_embeddings_BTD") if model.reads_sources else ("embeddings_BTD",)
        intervene.check(model, tuple(options.get(name, ids) for name, ids in itertools.zip_longest(names, tokens)))
    return options


def check_tokens(tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if a token id is outside the vocabulary; traced tokens are not checked."""
    check_ids("token id", tokens, vocab_size, "the vocabulary")
