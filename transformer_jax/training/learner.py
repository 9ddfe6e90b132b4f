"""Decide what a run trains: a model with random weights, a trained model, or LoRA adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh

from transformer_jax.config import LoraConfig, ModelSettings
from transformer_jax.models.functional import Model, make_model
from transformer_jax.nn.lora import adapted_loss, make_adapters, merge_adapters
from transformer_jax.sharding import shardings
from transformer_jax.training.adapters import BASE_FILE
from transformer_jax.training.bundle import own_modules
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.step import LossFn


@dataclasses.dataclass(frozen=True)
class Learner:
    """The weights that a run trains, called params, and how to make a model from them.

    Attributes:
      make_params: a function that makes the params from a PRNG key.
      to_model: a function that makes the model from params.
      to_loss: a function that turns a loss function of models into a loss function of params.
      files: files, by name, that every checkpoint of the params must contain.
    """

    make_params: Callable[[jax.Array], Any]
    to_model: Callable[[Any], Model] = lambda params: params
    to_loss: Callable[[LossFn], LossFn] = lambda loss_fn: loss_fn
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def make_learner(config: ModelSettings, lora: LoraConfig, base: Model | None, mesh: Mesh) -> Learner:
    """Chooses the weights to train: those of the whole model, or only adapters of a trained model.

    With ``lora.rank`` 0, every weight is trained, starting from those of ``base`` if it is given.
    With a larger rank, only adapters are trained, and the weights of ``base`` do not change.

    Args:
      config: the config of the model. It may differ from that of ``base`` in fields that change no
        weight, such as dropout.
      lora: the LoRA settings.
      base: a trained model to start from, or ``None``.
      mesh: the devices that hold the adapters and the base model.

    Returns:
      The params to train and the functions that belong to them.

    Raises:
      ValueError: if there is a rank but no base model, a LoRA pattern matches no weight, or a base
        model with custom modules has another config.
    """
    if base is None:
        if lora.rank:
            raise ValueError(f"lora.rank={lora.rank} adapts a trained model, but no model to start from was given; "
                             "leave lora.rank out, or use a program with --model")
        return Learner(lambda key: make_model(config, key=key))
    model = _with_config(base, config)
    if not lora.rank:
        return Learner(jax.tree_util.Partial(lambda model, key: model, model))
    model = jax.device_put(model, shardings(model, mesh))
    make_params = jax.tree_util.Partial(lambda model, key: make_adapters(model, lora, key=key), model)
    jax.eval_shape(make_params, jax.random.key(0))
    return Learner(make_params, to_model=lambda adapters: cast(Model, merge_adapters(model, adapters)),
                   to_loss=lambda loss_fn: adapted_loss(loss_fn, model), files={BASE_FILE: tree_digest(base).encode()})


def with_ablated_heads(learner: Learner, heads: Sequence[str]) -> Learner:
    """Removes heads from the model that is trained: their output is zero in the loss and in the
    model that is evaluated.

    Args:
      learner: what a run trains.
      heads: heads of self-attention, written as ``"LAYER.HEAD"``. Without any, the learner is
        returned as it is.

    Returns:
      The learner of the model without the heads.

    Raises:
      ValueError: if the model has no such head.
    """
    if not heads:
        return learner
    to_model, to_loss = learner.to_model, learner.to_loss
    jax.eval_shape(lambda key: _without_heads(to_model(learner.make_params(key)), heads), jax.random.key(0))

    def without(loss_fn: LossFn) -> LossFn:
        return lambda model, batch, key=None: loss_fn(_without_heads(model, heads), batch, key)

    return dataclasses.replace(learner, to_model=lambda params: _without_heads(to_model(params), heads),
                               to_loss=lambda loss_fn: to_loss(without(loss_fn)))


def _without_heads(model: Any, heads: Sequence[str]) -> Any:
    """Returns a copy of a model in which the output weights of heads are zero."""
    if not hasattr(model, "stacks"):
        raise ValueError(f"loss.ablated_heads={tuple(heads)}: a {type(model).__name__} has no attention heads; leave "
                         "it out")
    model = jax.tree.map(lambda leaf: leaf, model)
    stack = model.stacks()["self"]
    num_layers, num_heads = stack.num_layers, stack.config.num_heads
    groups = (stack.dense_blocks, stack.blocks) if stack.is_mixed else (stack.blocks,)
    for name in heads:
        layer, head = map(int, name.split("."))
        if layer >= num_layers or head >= num_heads:
            raise ValueError(f"loss.ablated_heads={tuple(heads)}: there is no head {name}; the model has "
                             f"{num_layers} layers of {num_heads} heads, counted from 0")
        for blocks, layers in zip(groups, stack.layers_of_groups, strict=True):
            if layer in layers:
                kernel = blocks.attention.output.kernel
                width = kernel.shape[-2] // num_heads
                blocks.attention.output.kernel = kernel.replace(
                    kernel[...].at[layers.index(layer), head * width:(head + 1) * width].set(0.0))
    return model


def _with_config(base: Model, config: ModelSettings) -> Model:
    """Returns the base model with another config and the same weights."""
    if own := own_modules(base, base.config):
        if base.config != config:
            path, name = next(iter(own.items()))
            raise ValueError(f"the model to start from has custom modules (a {name} at {path!r}), so that its settings "
                             "cannot be changed; make it with the dropout and attention_dropout of this run")
        return base
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(base))
