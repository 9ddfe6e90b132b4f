"""Low-rank adapters: a model that learns by few new weights while its own stay as they are.

The trainable part is a pytree of its own, apart from the base: a dict from paths in the model to
adapters. So it *is* the ``params`` of a training step, and gradients, optimizer state and
checkpoints hold nothing else::

    adapters = make_adapters(base, LoraConfig(rank=8), key=key)
    loss_fn = adapted_loss(next_token_loss(), base)             # of adapters, batch and key
    step = make_train_step(loss_fn, optimizer) # of a state whose params are the adapters
    generate(merge_adapters(base, adapters), ...) # an ordinary model

Beside a linear map an adapter costs two thin products. Beside an embedding table it is added to the
table in each step. Nothing here changes the base: it is what remains when adapters are taken off
again, bit for bit.

Source: Hu et al. (2021), "LoRA".
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import LoraConfig
from transformer_jax.nn.layers import Linear, dropout, parameter
from transformer_jax.ops.linear import linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is added to a kernel or a table: ``scale * a @ b``.

    Attributes:
      a: ``[in, rank]``, with a leading axis of layers where the kernel has one; random at first.
      b: ``[rank, out]``, likewise; zero at first, so that an adapted model begins as its base.
      scale: ``alpha / rank``.
      dropout: of the inputs of ``a``, while training; not beside a table.
    """

    a: nnx.Param
    b: nnx.Param
    scale: float = dataclasses.field(metadata=dict(static=True))
    dropout: float = dataclasses.field(metadata=dict(static=True))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is added to the output ``[..., out]`` of the linear map for ``x``."""
        rows = dropout(x.reshape(-1, x.shape[-1]), self.dropout, key)
        for factor in (self.a, self.b):
            rows = linear(rows, factor[...].astype(x.dtype))
        return self.scale * rows.reshape(*x.shape[:-1], rows.shape[-1])

    def added_to(self, weight: nnx.Param) -> nnx.Param:
        """The weight with the adapter merged in, summed in float32."""
        product = jnp.matmul(self.a[...], self.b[...], precision="highest")
        return parameter((weight[...].astype(jnp.float32) + self.scale * product).astype(weight.dtype), weight.axes)


Adapters = dict[str, Adapter | nnx.Param]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """A linear map with an adapter beside it, in the place of a :class:`Linear`."""

    base: Linear
    adapter: Adapter
    key: jax.Array | None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.adapter(x, self.key)

    @property
    def kernel(self) -> nnx.Param:
        """Not to be had: decoding, which rearranges kernels, would lose the adapter."""
        raise ValueError("the adapters of this model are not merged; decode with merge_adapters(base, adapters)")


def make_adapters(base: nnx.Module, config: LoraConfig, *, key: jax.Array) -> Adapters:
    """New adapters, and copies of the weights that are trained whole.

    Args:
      base: any module with linear maps, stacked or not; shapes in place of its arrays serve too,
        where no weight is trained whole.
      config: rank, scale and which weights.
      key: PRNG key.

    Raises:
      ValueError: for a rank of 0, or a pattern that matches nothing, or a weight both adapted and
        trained whole.
    """
    if config.rank < 1:
        raise ValueError(f"lora.rank={config.rank} makes no adapter; expected 1 or more")
    linears, parameters = _nodes(base, Linear), _nodes(base, nnx.Variable)
    tables = {path: table for path, table in parameters.items()
              if len(table.axes) == 2 and path.removesuffix(".kernel") not in linears}
    adapters: Adapters = {}
    for index, path in enumerate(_matching({**linears, **tables}, config.weights, "weights")):
        kernel = linears[path].kernel if path in linears else tables[path]
        *layers, in_dim, out_dim = kernel.shape
        # Inputs of a linear map have been normed, and x @ a is of their size; what is looked up in
        # a table is a row.
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
    """The base with its adapters beside its kernels: the form in which they are trained.

    Args:
      base: the model; its arrays are shared, not copied.
      adapters: from :func:`make_adapters`.
      key: switches the adapters' dropout on.

    Raises:
      ValueError: for adapters of another model.
    """
    def adapted(path: str, node: Linear) -> Linear | AdaptedLinear:
        if path not in adapters:
            return node
        adapter, keys = adapters[path], None
        if key is not None and adapter.dropout:
            keys = jax.random.split(jax.random.fold_in(key, places[path]), node.kernel.shape[:-2])
        return AdaptedLinear(node, adapter, keys)

    places = {path: place for place, path in enumerate(sorted(adapters))}
    return _mapped(adapted, _with_parameters(base, adapters), Linear)


def merge_adapters(base: nnx.Module, adapters: Adapters) -> nnx.Module:
    """A model like any other, whose kernels are ``W + scale * a @ b``; arguments and errors as in
    :func:`adapt`."""
    def merged(path: str, node: Linear) -> Linear:
        if path not in adapters:
            return node
        result = jax.tree.map(lambda x: x, node)
        result.kernel = adapters[path].added_to(node.kernel)
        return result

    return _mapped(merged, _with_parameters(base, adapters), Linear)


def adapted_loss(loss_fn: Callable[..., Any], base: nnx.Module) -> jax.tree_util.Partial:
    """The loss of adapters: ``(adapters, batch, key)`` in place of ``(model, batch, key)``.

    Args:
      loss_fn: of a model.
      base: the model to adapt; it is an argument of the compiled step, and no constant in it.
    """
    def of_adapters(base: nnx.Module, adapters: Adapters, batch: Any, key: jax.Array | None = None) -> Any:
        if key is None:
            return loss_fn(adapt(base, adapters), batch, None)
        model_key, adapter_key = jax.random.split(key)
        return loss_fn(adapt(base, adapters, adapter_key), batch, model_key)

    return jax.tree_util.Partial(of_adapters, base)


def _with_parameters(base: nnx.Module, adapters: Adapters) -> nnx.Module:
    """The base with what takes the place of whole parameters; ValueError for adapters that do not
    fit it."""
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
    found = [path for path in nodes if re.search(pattern, path)]
    if not found:
        raise ValueError(f"lora.{field}={pattern!r} matches none of {', '.join(nodes)}")
    return found


def _nodes(tree: Any, kind: type) -> dict[str, Any]:
    """Nodes of a kind by path, such as "stack.blocks.attention.query"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
    return {_name(path): node for path, node in leaves if isinstance(node, kind)}


def _mapped(function: Callable[[str, Any], Any], tree: Any, kind: type) -> Any:
    """The tree with the function applied to its nodes of a kind."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: function(_name(path), node) if isinstance(node, kind) else node,
        tree, is_leaf=lambda node: isinstance(node, kind))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
