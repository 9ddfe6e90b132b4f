"""Low-rank adapters (LoRA): training few new weights while the weights of the model are frozen.

The trainable weights are a separate pytree: a dict from paths in the model to adapters. This dict
is the ``params`` of a training step, so gradients, optimizer state and checkpoints hold nothing
else::

    adapters = make_adapters(base, LoraConfig(rank=8), key=key)
    loss_fn = adapted_loss(next_token_loss(), base)  # a function of (adapters, batch, key)
    step = make_train_step(loss_fn, optimizer)       # of a state whose params are the adapters
    generate(merge_adapters(base, adapters), ...)    # the merged model is an ordinary model

The adapter of a linear map costs two small matrix products. The adapter of an embedding table is
added to the table in each step. No function here changes the base model.

Source: Hu et al. (2021), "LoRA".
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer_jax.config import LoraConfig
from transformer_jax.nn.layers import Linear, dropout, parameter
from transformer_jax.ops.linear import linear
from transformer_jax.settings import check_type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update of a kernel or an embedding table: ``scale * a @ b`` is added to it.

    Attributes:
      a: ``[in, rank]``, with a leading axis of layers if the kernel has one. It starts random.
      b: ``[rank, out]``, with the same leading axis. It starts at zero, so that the adapted model
        starts with the same outputs as the base.
      scale: ``alpha / rank``.
      dropout: The dropout rate of the inputs of ``a`` in training. Tables have no dropout.
    """

    a: nnx.Param
    b: nnx.Param
    scale: float = dataclasses.field(metadata=dict(static=True))
    dropout: float = dataclasses.field(metadata=dict(static=True))

    def __call__(self, x: Float[Array, "... D"], key: jax.Array | None) -> Float[Array, "... F"]:
        """Computes what the adapter adds to the output of the linear map.

        Args:
          x: The input of the linear map ``[..., in]``.
          key: The PRNG key of dropout. ``None`` switches dropout off.

        Returns:
          ``[..., out]``.
        """
        rows = dropout(x.reshape(-1, x.shape[-1]), self.dropout, key)
        for factor in (self.a, self.b):
            rows = linear(rows, factor[...].astype(x.dtype))
        return self.scale * rows.reshape(*x.shape[:-1], rows.shape[-1])

    def added_to(self, weight: nnx.Param) -> nnx.Param:
        """Adds the adapter to a weight. The sum is computed in float32.

        Args:
          weight: A kernel or a table ``[in, out]``, with or without a leading axis of layers.

        Returns:
          A new parameter of the weight's type.
        """
        product = jnp.matmul(self.a[...], self.b[...], precision="highest")
        return parameter((weight[...].astype(jnp.float32) + self.scale * product).astype(weight.dtype), weight.axes)


Adapters = dict[str, Adapter | nnx.Param]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """A linear map plus its adapter, which takes the place of a ``Linear`` in a model.

    Attributes:
      base: The linear map of the base model.
      adapter: Its adapter.
      key: The PRNG key of the adapter's dropout. ``None`` switches dropout off.
    """

    base: Linear
    adapter: Adapter
    key: jax.Array | None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Applies the linear map and its adapter to ``[..., in]``."""
        return self.base(x) + self.adapter(x, self.key)

    @property
    def kernel(self) -> nnx.Param:
        """Raises ValueError, because decoding rearranges kernels and would lose the adapter."""
        raise ValueError("the adapters of this model are not merged; decode with merge_adapters(base, adapters)")


def make_adapters(base: nnx.Module, config: LoraConfig, *, key: jax.Array) -> Adapters:
    """Makes new adapters, and copies of the weights that are trained whole.

    Args:
      base: Any module with linear maps, stacked or not. It may hold shapes instead of arrays if no
        weight is trained whole.
      config: The rank, the scale, and the patterns that select the weights.
      key: The PRNG key of the initial values.

    Returns:
      A dict from the path of a weight in the model to its adapter or, for a weight that is trained
      whole, to its parameter.

    Raises:
      ValueError: The rank is less than 1, a pattern matches nothing, or a weight is both adapted
        and trained whole.
    """
    check_type("config", config, LoraConfig, "a tj.LoraConfig")
    if config.rank < 1:
        raise ValueError(f"lora.rank={config.rank} makes no adapter; expected 1 or more")
    linears, parameters = _nodes(base, Linear), _nodes(base, nnx.Variable)
    tables = {path: table for path, table in parameters.items()
              if len(table.axes) == 2 and path.removesuffix(".kernel") not in linears}
    adapters: Adapters = {}
    for index, path in enumerate(_matching({**linears, **tables}, config.weights, "weights")):
        kernel = linears[path].kernel if path in linears else tables[path]
        *layers, in_dim, out_dim = kernel.shape
        # The inputs of a linear map are normalized, and this standard deviation keeps their size
        # in x @ a. A table has no input: the lookup selects one row of a.
        std = 1 / math.sqrt(in_dim) if path in linears else 1.0
        a = std * jax.random.normal(jax.random.fold_in(key, index), (*layers, in_dim, config.rank))
        adapters[path] = Adapter(a=parameter(a, (kernel.axes[0], None)),
                                 b=parameter(jnp.zeros((*layers, config.rank, out_dim)), (None, kernel.axes[1])),
                                 scale=config.alpha / config.rank, dropout=config.dropout)
    for path in _matching(parameters, config.whole, "whole") if config.whole else ():
        if {path, path.removesuffix(".kernel")} & adapters.keys():
            raise ValueError(f"{path} has an adapter (lora.weights={config.weights!r}) and is trained whole "
                             f"(lora.whole={config.whole!r}); change one of the patterns")
        adapters[path] = parameters[path]
    return adapters


def adapt(base: nnx.Module, adapters: Adapters, key: jax.Array | None = None) -> nnx.Module:
    """Attaches adapters to a model without merging them, which is the form for training.

    Args:
      base: The model. The result shares its arrays.
      adapters: The adapters from ``make_adapters``.
      key: The PRNG key of the adapters' dropout. ``None`` switches dropout off.

    Returns:
      The model with an ``AdaptedLinear`` for each linear map that has an adapter.

    Raises:
      ValueError: The adapters are those of another model.
    """
    def adapted(path: str, node: Linear) -> Linear | AdaptedLinear:
        if path not in adapters:
            return node
        adapter, keys = cast(Adapter, adapters[path]), None
        if key is not None and adapter.dropout:
            keys = jax.random.split(jax.random.fold_in(key, places[path]), node.kernel.shape[:-2])
        return AdaptedLinear(node, adapter, keys)

    places = {path: place for place, path in enumerate(sorted(adapters))}
    return _mapped(adapted, _with_parameters(base, adapters), Linear)


def merge_adapters(base: nnx.Module, adapters: Adapters) -> nnx.Module:
    """Merges adapters into a model, whose kernels become ``W + scale * a @ b``.

    Args:
      base: The model.
      adapters: The adapters from ``make_adapters``.

    Returns:
      An ordinary model without adapters. ``base`` is unchanged.

    Raises:
      ValueError: The adapters are those of another model.
    """
    def merged(path: str, node: Linear) -> Linear:
        if path not in adapters:
            return node
        result = jax.tree.map(lambda x: x, node)
        result.kernel = adapters[path].added_to(node.kernel)
        return result

    return _mapped(merged, _with_parameters(base, adapters), Linear)


def adapted_loss(loss_fn: Callable[..., Any], base: nnx.Module) -> jax.tree_util.Partial:
    """Converts the loss function of a model to a loss function of adapters.

    Args:
      loss_fn: A function of ``(model, batch, key)``.
      base: The model to adapt. It is an argument of the compiled step, not a constant in it.

    Returns:
      A function of ``(adapters, batch, key)``.
    """
    def of_adapters(base: nnx.Module, adapters: Adapters, batch: Any, key: jax.Array | None = None) -> Any:
        if key is None:
            return loss_fn(adapt(base, adapters), batch, None)
        model_key, adapter_key = jax.random.split(key)
        return loss_fn(adapt(base, adapters, adapter_key), batch, model_key)

    return jax.tree_util.Partial(of_adapters, base)


def _with_parameters(base: nnx.Module, adapters: Adapters) -> nnx.Module:
    """Replaces the parameters that are trained whole and the tables that have an adapter.

    Raises ValueError if the adapters do not fit the model.
    """
    check_type("base", base, nnx.Module, "a model, such as tj.load(directory).model")
    check_type("adapters", adapters, Mapping, "the adapters that tj.make_adapters returns")
    linears, parameters = _nodes(base, Linear), _nodes(base, nnx.Variable)
    for path, adapter in adapters.items():
        weight = linears[path].kernel if path in linears else parameters.get(path)
        if weight is None:
            raise ValueError(f"the adapters are those of another model: this one has no {path!r}; it has "
                             f"{', '.join([*linears, *parameters])}")
        given = (*adapter.a.shape[:-1], adapter.b.shape[-1]) if isinstance(adapter, Adapter) else adapter.shape
        if weight.shape != given:
            raise ValueError(f"the adapters are those of another model: {path!r} is {list(weight.shape)} here and "
                             f"{list(given)} there")

    def replaced(path: str, parameter: nnx.Param) -> nnx.Param:
        if path not in adapters:
            return parameter
        adapter = adapters[path]
        return adapter.added_to(parameter) if isinstance(adapter, Adapter) else adapter

    return _mapped(replaced, base, nnx.Variable)


def _matching(nodes: dict[str, Any], pattern: str, field: str) -> list[str]:
    """Returns the paths that a pattern of the config matches; ValueError if it matches none."""
    found = [path for path in nodes if re.search(pattern, path)]
    if not found:
        raise ValueError(f"lora.{field}={pattern!r} matches none of {', '.join(nodes)}")
    return found


def _nodes(tree: Any, kind: type) -> dict[str, Any]:
    """Returns the nodes of a type by their path, such as "stack.blocks.attention.query"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
    return {_name(path): node for path, node in leaves if isinstance(node, kind)}


def _mapped(function: Callable[[str, Any], Any], tree: Any, kind: type) -> Any:
    """Applies a function of path and node to all nodes of a type."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: function(_name(path), node) if isinstance(node, kind) else node,
        tree, is_leaf=lambda node: isinstance(node, kind))


def _name(path: tuple) -> str:
    """Writes a path with dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
