"""Converts a model to the form that decodes fastest, in which every layer has separate weight
arrays."""

from __future__ import annotations

import functools
import threading
import typing
import weakref
from typing import Any, cast

import jax
from flax import nnx

from transformer_jax.decoding.batch import check_family
from transformer_jax.decoding.packed import Generator
from transformer_jax.models.functional import Model
from transformer_jax.nn.layers import Linear, parameter
from transformer_jax.nn.quantised import Weights, rounded, with_quantised_linears


@jax.jit
def _separate_layers(model: Generator) -> Generator:
    return model.for_decoding()


class _LastPrepared:
    """Stores the decoding form of the model that was decoded last, so that later calls need not
    convert it again.

    The entry is deleted together with the model.
    """

    def __init__(self):
        # The model, its arrays, and its form for decoding.
        self.entry: tuple[weakref.ref, list[Any], Generator] | None = None
        # Reentrant, because a model may be garbage-collected while this thread prepares another.
        self.lock = threading.RLock()

    def get(self, model: Generator) -> Generator:
        """Returns the decoding form of a model, and converts the model if it is not the one that is
        stored."""
        leaves = jax.tree.leaves(model)
        with self.lock:
            if self.entry is not None:
                stored_model, stored_leaves, prepared = self.entry
                if stored_model() is model and all(a is b for a, b in zip(leaves, stored_leaves, strict=True)):
                    return prepared
            prepared = _separate_layers(model)
            self.entry = weakref.ref(model, self._forget), leaves, prepared
            return prepared

    def _forget(self, reference: weakref.ref) -> None:
        """Deletes the entry when its model is garbage-collected."""
        with self.lock:
            if self.entry is not None and self.entry[0] is reference:
                self.entry = None


_last_prepared = _LastPrepared()


def prepared(model: Generator) -> Generator:
    """Returns the model in the form that decodes fastest."""
    return model if _is_separate(model) else _last_prepared.get(model)


def prepare_for_decoding(model: Model, *, weights: Weights | None = None) -> Generator:
    """Converts a model to the form that decodes fastest, which can replace the original.

    Functions that decode convert a model themselves and keep both forms in memory, so the weights
    are stored twice. To save that memory, replace the original: ``model =
    tj.prepare_for_decoding(model)``.

    Args:
      model: a decoder or an encoder-decoder.
      weights: ``"int8"`` or ``"int4"`` to round the weights of the linear maps and of the unembedding
        to 8 or 4 bits, so that decoding on a CPU reads fewer bytes. To measure the loss of quality,
        score texts with ``tj.decoding.round_weights(model, weights)``. ``None`` changes no value.

    Returns:
      The same model, with the weights of each layer in separate arrays. ``generate``, ``stream``
      and ``beam_search`` accept it and make no second copy. It can only decode: functions that run
      the model without a cache, such as ``score`` and ``forward``, need the original and raise an
      error.

    Raises:
      ValueError: if it is not a model, or an encoder or a reward model; if ``weights`` is unknown,
        or if a layer of the model does not fit it.
    """
    _check_weights(weights)
    generator: Generator = check_family(  # a reward model raises its own error
        "prepare_for_decoding", model, "decoder", "encoder_decoder", "reward")
    separate = generator if _is_separate(generator) else _separate_layers(generator)
    if weights is None:
        return separate
    if getattr(generator.config, "moe", None) is not None:
        raise ValueError(f"weights={weights!r} is for models without experts; leave it out")
    return cast(Generator, with_quantised_linears(cast(nnx.Module, separate), weights))


def round_weights(model: Model, weights: Weights) -> Model:
    """Rounds the weights of a model as ``prepare_for_decoding(model, weights=...)`` does, so that its
    quality can be measured.

    Args:
      model: a decoder or an encoder-decoder.
      weights: ``"int8"`` or ``"int4"``.

    Returns:
      A model of the same form and size, which every function accepts. If the unembedding is tied to
      the embeddings, both are rounded; quantised decoding rounds only the unembedding.

    Raises:
      ValueError: if it is not a decoder or an encoder-decoder, or if ``weights`` is unknown.
    """
    _check_weights(weights)
    result = jax.tree.map(lambda leaf: leaf, check_family("round_weights", model, "decoder", "encoder_decoder"))
    for _, module in list(nnx.iter_modules(result)):
        if type(module) is Linear:
            kernel = module.kernel[...]
            one = functools.partial(rounded, weights=weights)
            module.kernel = parameter(jax.jit(jax.vmap(one) if kernel.ndim == 3 else one)(kernel), module.kernel.axes)
    embeddings = result.embeddings
    name = "token" if embeddings.output is None else "output"
    table_VD = getattr(embeddings, name)
    setattr(embeddings, name, table_VD.replace(rounded(table_VD[...].T, weights).T))
    return result


def _check_weights(weights: Weights | None) -> None:
    """Raises ValueError for an unknown kind of weights."""
    if weights not in (None, *typing.get_args(Weights)):
        raise ValueError(f"weights={weights!r} is unknown; expected 'int8', 'int4' or None")


def _is_separate(model: Generator) -> bool:
    """True if the model is already in the form for decoding."""
    return any(isinstance(stack.blocks, nnx.List) for stack in model.stacks().values())
