"""The form of a model in which a token loop reads its weights fastest: every layer in arrays of its
own."""

from __future__ import annotations

import threading
import weakref

import jax
from flax import nnx

from transformer_jax.decoding.loop import Generator


@jax.jit
def _separate_layers(model: Generator) -> Generator:
    return model.for_decoding()


class _LastPrepared:
    """The model that was decoded last in the form for decoding: made once for many calls, gone with
    the model."""

    def __init__(self):
        self.model: weakref.ref | None = None
        self.lock = threading.RLock()  # a model may be collected, and forgotten, while another is prepared

    def get(self, model: Generator) -> Generator:
        leaves = jax.tree.leaves(model)
        with self.lock:
            known = self.model is not None and self.model() is model
            if not known or any(a is not b for a, b in zip(leaves, self.leaves, strict=True)):
                prepared = _separate_layers(model)
                self.model, self.leaves, self.prepared = weakref.ref(model, self._forget), leaves, prepared
            return self.prepared

    def _forget(self, reference: weakref.ref) -> None:
        with self.lock:
            if self.model is reference:
                self.model = self.leaves = self.prepared = None


_last_prepared = _LastPrepared()


def prepared(model: Generator) -> Generator:
    """The model in the form in which a token loop reads its weights fastest."""
    return model if _is_separate(model) else _last_prepared.get(model)


def prepare_for_decoding(model: Generator) -> Generator:
    """The model in the form for decoding, which can take the place of the original.

    Functions that decode make this form themselves and keep it beside the model, which takes the
    memory of a second copy of the weights. Who needs that memory drops the original:
    ``model = tj.prepare_for_decoding(model)``.

    Args:
      model: a decoder or an encoder-decoder.

    Returns:
      the same model with the weights of each layer in arrays of their own; ``generate``, ``stream``
      and ``beam_search`` take it and make no second copy. It decodes only: a pass without a cache,
      such as that of ``score`` or ``forward``, needs the original.
    """
    return model if _is_separate(model) else _separate_layers(model)


def _is_separate(model: Generator) -> bool:
    return any(isinstance(stack.blocks, nnx.List) for stack in model.stacks().values())
