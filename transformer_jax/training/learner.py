"""What a run trains: a model from random weights, a trained one, or adapters of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from transformer_jax.config import LoraConfig, ModelConfig
from transformer_jax.models.functional import Model, make_model
from transformer_jax.nn.lora import adapted_loss, make_adapters, merge_adapters
from transformer_jax.sharding import shardings
from transformer_jax.training.adapters import BASE_FILE
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.step import LossFn


@dataclasses.dataclass(frozen=True)
class Learner:
    """The weights that are trained, called params, and how they make a model.

    Attributes:
      make_params: makes them from a key.
      to_model: the model of some params.
      to_loss: from a loss of models to a loss of params.
      files: what belongs into every checkpoint of them.
    """

    make_params: Callable[[jax.Array], Any]
    to_model: Callable[[Any], Model] = lambda params: params
    to_loss: Callable[[LossFn], LossFn] = lambda loss_fn: loss_fn
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def make_learner(config: ModelConfig, lora: LoraConfig, base: Model | None, mesh: Mesh) -> Learner:
    """Trains every weight, from ``base`` if there is one; or, with a rank, adapters of ``base``,
    which stays as it is.

    Args:
      config: of the model; it may differ from that of ``base`` in what changes no weight, such as
        dropout.
      lora: rank 0 trains every weight.
      base: a trained model.
      mesh: where adapters and base live.

    Raises:
      ValueError: for a rank without a base, or patterns that match nothing.
    """
    if base is None:
        if lora.rank:
            raise ValueError(f"lora.rank={lora.rank} adapts a trained model, and here is none to start from; leave it "
                             "out, or use a program with --model")
        return Learner(lambda key: make_model(config, key=key))
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    model = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(base))
    if not lora.rank:
        return Learner(jax.tree_util.Partial(lambda model, key: model, model))
    model = jax.device_put(model, shardings(model, mesh))
    make_params = jax.tree_util.Partial(lambda model, key: make_adapters(model, lora, key=key), model)
    jax.eval_shape(make_params, jax.random.key(0))
    return Learner(make_params, to_model=lambda adapters: merge_adapters(model, adapters),
                   to_loss=lambda loss_fn: adapted_loss(loss_fn, model), files={BASE_FILE: tree_digest(base).encode()})
