"""Functions with a custom gradient that also support forward-mode differentiation.

``jax.custom_vjp`` does not support ``jax.jvp``, ``jax.jacfwd`` and forward-mode Hessian-vector
products. ``with_gradient`` replaces it: reverse mode uses the custom gradient, while forward mode
and all higher derivatives differentiate plain operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = list[jax.Array]


def with_gradient(plain: Callable[..., jax.Array], backward: Callable[..., tuple] | str, *args: Any,
                  forward: Callable[..., tuple[jax.Array, Any]] | None = None) -> jax.Array:
    """Computes ``plain(*args)`` with a custom gradient.

    Args:
      plain: The function, in operations that JAX can differentiate in both modes. If there is a
        ``forward``, ``plain`` is used only in forward mode and for higher derivatives, and may take
        more time and memory.
      backward: A function ``backward(args, kept, cotangent)`` that returns the gradient of each
        argument, or ``None`` for an argument without a gradient. It may also be a message: then
        taking a gradient raises ValueError with this message.
      *args: Pytrees of arrays. Only arrays of floats have a gradient.
      forward: A function ``forward(*args)`` that returns the same value, and a pytree ``kept`` of
        what ``backward`` needs besides the arguments. By default ``kept`` is empty.

    Returns:
      The value, which is one array.
    """
    @jax.custom_jvp
    def function(*args: Any) -> jax.Array:
        return plain(*args) if forward is None else forward(*args)[0]

    @function.defjvp
    def rule(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        value, kept = (function(*primals), ()) if forward is None else forward(*primals)
        return value, tangent(plain, backward, primals, tangents, value, kept)

    return function(*args)


def tangent(plain: Callable[..., jax.Array], backward: Callable[..., tuple] | str, args: tuple, tangents: tuple,
            value: jax.Array, kept: Any = ()) -> jax.Array:
    """Computes the tangent of ``plain(*args)``, a linear map whose transpose is ``backward``.

    It is for the rules of ``jax.custom_jvp``.

    Args:
      plain: See ``with_gradient``.
      backward: See ``with_gradient``.
      args: The arguments of ``plain``.
      tangents: The tangents of ``args``.
      value: An array of the shape and type of the result, such as ``plain(*args)``.
      kept: What ``backward`` needs besides the arguments.

    Returns:
      The tangent, of the shape and type of ``value``.
    """
    leaves, tree = jax.tree.flatten(args)
    kept_leaves, kept_tree = jax.tree.flatten(kept)
    floats = [place for place, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]

    def of_floats(leaves: Arrays) -> tuple[Callable[..., jax.Array], Arrays]:
        """Returns ``plain`` as a function of the arrays of floats alone, and these arrays."""
        return (lambda *some: plain(*jax.tree.unflatten(tree, _replaced(leaves, floats, some))),
                [leaves[place] for place in floats])

    def moved(leaves: Arrays, kept: Arrays, tangents: Arrays) -> Arrays:
        del kept
        function, some = of_floats(leaves)
        return [jax.jvp(function, tuple(some), tuple(tangents))[1]]

    def gradients(leaves: Arrays, kept: Arrays, cotangents: Arrays) -> Arrays:
        args = jax.tree.unflatten(tree, leaves)
        assert not isinstance(backward, str)  # _transpose has raised the message already
        found = backward(args, jax.tree.unflatten(kept_tree, kept), cotangents[0])
        whole = [leaf for arg, gradient in zip(args, found, strict=True)
                 for leaf in ([None] * len(jax.tree.leaves(arg)) if gradient is None else jax.tree.leaves(gradient))]
        return [jnp.zeros_like(leaves[place]) if (gradient := whole[place]) is None else cast(jax.Array, gradient)
                for place in floats]

    def plain_gradients(leaves: Arrays, kept: Arrays, cotangents: Arrays) -> Arrays:
        del kept
        function, some = of_floats(leaves)
        return list(jax.vjp(function, *some)[1](cotangents[0]))

    along = jax.tree.leaves(tangents)
    found, = _linear_map.bind(*leaves, *kept_leaves, *(along[place] for place in floats),
                              linear=_Map(moved, moved, gradients, plain_gradients),
                              sizes=(len(leaves), len(kept_leaves)), outputs=(jax.typeof(value),),
                              refusal=backward if isinstance(backward, str) else None)
    return found


def _replaced(leaves: Arrays, places: Sequence[int], some: Sequence[jax.Array]) -> Arrays:
    """Returns the leaves with those at the given indices replaced."""
    whole = list(leaves)
    for place, leaf in zip(places, some, strict=True):
        whole[place] = leaf
    return whole


@dataclasses.dataclass(frozen=True)
class _Map:
    """A linear map of tangents and its transpose, each in two forms.

    Each form is a function ``(leaves, kept, values) -> values``.

    Attributes:
      run: The map as it is computed.
      plain: The map in operations that JAX can differentiate.
      transposed_run: The transpose as it is computed.
      transposed_plain: The transpose in operations that JAX can differentiate.
    """

    run: Callable[[Arrays, Arrays, Arrays], Arrays]
    plain: Callable[[Arrays, Arrays, Arrays], Arrays]
    transposed_run: Callable[[Arrays, Arrays, Arrays], Arrays]
    transposed_plain: Callable[[Arrays, Arrays, Arrays], Arrays]

    def transposed(self) -> _Map:
        """Returns the transpose of the map."""
        return _Map(self.transposed_run, self.transposed_plain, self.run, self.plain)


# The operands are the leaves, the arrays in ``kept``, and the values in which the map is linear.
_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True


def _split(operands: Sequence[Any], sizes: tuple[int, int]) -> tuple[list, list, list]:
    """Splits the operands of the primitive into leaves, kept arrays and values."""
    first, second = sizes[0], sum(sizes)
    return list(operands[:first]), list(operands[first:second]), list(operands[second:])


@_linear_map.def_impl
def _run(*operands, linear, sizes, outputs, refusal):
    """Computes the map."""
    del outputs, refusal
    return linear.run(*_split(operands, sizes))


@_linear_map.def_abstract_eval
def _shapes(*operands, linear, sizes, outputs, refusal):
    """Returns the shapes of the results."""
    del operands, linear, sizes, refusal
    return list(outputs)


def _jvp(primals, tangents, *, linear, sizes, outputs, refusal):
    """Differentiates the map: it is linear in the values, and depends on the leaves."""
    leaves, kept, values = _split(primals, sizes)
    d_leaves, _, d_values = _split(tangents, sizes)
    settings = dict(linear=linear, sizes=sizes, outputs=outputs, refusal=refusal)
    found = _linear_map.bind(*primals, **settings)
    moved = [ad.Zero(output) for output in outputs]
    if not all(type(tangent) is ad.Zero for tangent in d_values):
        moved = _linear_map.bind(*leaves, *kept, *map(ad.instantiate_zeros, d_values), **settings)
    floats = [place for place, tangent in enumerate(d_leaves) if type(tangent) is not ad.Zero]
    if floats:
        _, bent = jax.jvp(lambda *some: linear.plain(_replaced(leaves, floats, some), kept, values),
                          tuple(leaves[place] for place in floats), tuple(d_leaves[place] for place in floats))
        moved = [b if type(a) is ad.Zero else a + b for a, b in zip(moved, bent, strict=True)]
    return found, moved


def _transpose(cotangents, *operands, linear, sizes, outputs, refusal):
    """Computes the gradient of the values, or raises the message that refuses a gradient."""
    if refusal is not None:
        raise ValueError(refusal)
    leaves, kept, values = _split(operands, sizes)
    wanted = [value.aval if ad.is_undefined_primal(value) else jax.typeof(value) for value in values]
    found = _linear_map.bind(*leaves, *kept, *map(ad.instantiate_zeros, cotangents), linear=linear.transposed(),
                             sizes=sizes, outputs=tuple(wanted), refusal=None)
    return [None] * sum(sizes) + [gradient if ad.is_undefined_primal(value) else None
                                  for gradient, value in zip(found, values, strict=True)]


def _batch(operands, axes, *, linear, sizes, outputs, refusal):
    """Adds a batch axis to the map, for ``jax.vmap``."""
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
    # All values get the batch axis, so that the results of the transpose have it too.
    fixed = sum(sizes)
    operands = [operand if axis is None and place < fixed else batching.bdim_at_front(operand, axis, size)
                for place, (operand, axis) in enumerate(zip(operands, axes, strict=True))]
    of_leaves, of_kept, _ = _split([None if axis is None else 0 for axis in axes], sizes)
    in_axes = (of_leaves, of_kept, 0)
    mapped = _Map(*(jax.vmap(getattr(linear, field.name), in_axes=in_axes) for field in dataclasses.fields(_Map)))
    outputs = tuple(ShapedArray((size, *output.shape), output.dtype) for output in outputs)
    found = _linear_map.bind(*operands, linear=mapped, sizes=sizes, outputs=outputs, refusal=refusal)
    return found, [0] * len(found)


ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_run, multiple_results=True))
