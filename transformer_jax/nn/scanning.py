"""The scan over layers that repeat after a period, or that differ in their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from transformer_jax.nn.blocks import LayerTrace


def scan_by_period(steps: Sequence[Callable], carry: Any, layers: Any, *, unroll: int = 1) -> tuple[Any, Any]:
    """Applies layers that repeat after a period, so that the compiled program has one copy of each
    layer of a period.

    Args:
      steps: ``step(carry, layer)`` of each layer in a period returns the new carry and an output.
      carry: The input of the first layer.
      layers: A pytree of arrays with a leading axis of layers.
      unroll: The number of layers in one iteration of the loop, rounded to whole periods.

    Returns:
      The output of the last layer, and the outputs of all layers stacked.
    """
    carry, (outputs,) = scan_groups(steps, [0] * len(steps), carry, [layers], unroll=unroll)
    return carry, outputs


def scan_groups(steps: Sequence[Callable], kinds: Sequence[int], carry: Any, groups: Sequence[Any], *,
                unroll: int = 1) -> tuple[Any, list[Any]]:
    """Applies layers whose weights have one of several structures, which repeats after a period too.

    Args:
      steps: ``step(carry, layer)`` of each layer in a period returns the new carry and an output.
      kinds: The index of the group that each layer in a period belongs to.
      carry: The input of the first layer.
      groups: For each structure, a pytree of arrays with a leading axis of the layers that have it,
        in their order.
      unroll: The number of layers in one iteration of the loop, rounded to whole periods.

    Returns:
      The output of the last layer, and for each group the outputs of its layers stacked.
    """
    num_layers, period = sum(jax.tree.leaves(group)[0].shape[0] for group in groups), len(steps)
    if period == 1:
        carry, outputs = jax.lax.scan(steps[0], carry, groups[0], unroll=min(unroll, num_layers))
        return carry, [outputs]
    repeats, rest = divmod(num_layers, period)
    # lax.split has a gradient that concatenates. That of slices would add one array as large as all
    # layers for each slice.
    leaves, trees = zip(*map(jax.tree.flatten, groups), strict=True)
    counts = [list(kinds).count(group) for group in range(len(groups))]
    parts = [[jax.lax.split(leaf, [repeats * count] * (repeats > 0) + [1] * list(kinds[:rest]).count(group))
              for leaf in leaves[group]] for group, count in enumerate(counts)]

    def one(place: int, carry: Any, pieces: list[jax.Array]) -> tuple[Any, Any]:
        layer = jax.tree.unflatten(trees[kinds[place]], [piece[0] for piece in pieces])
        carry, output = steps[place](carry, layer)
        return carry, jax.tree.map(lambda x: x[None], output)

    def index_in_group(place: int) -> int:
        return list(kinds[:place]).count(kinds[place])

    def whole_period(carry: Any, stacked: list[list[jax.Array]]) -> tuple[Any, list[Any]]:
        pieces = [[jax.lax.split(leaf, [1] * count) for leaf in group]
                  for group, count in zip(stacked, counts, strict=True)]
        outputs = []
        for place in range(period):
            carry, output = one(place, carry, [piece[index_in_group(place)] for piece in pieces[kinds[place]]])
            outputs.append(output)
        return carry, outputs

    outputs: list[list[Any]] = [[] for _ in groups]
    if repeats:
        stacked = [[part[0].reshape(repeats, count, *part[0].shape[1:]) for part in group]
                   for group, count in zip(parts, counts, strict=True)]
        carry, places = jax.lax.scan(whole_period, carry, stacked, unroll=min(max(1, unroll // period), repeats))
        for group, found in enumerate(outputs):
            own = [output for place, output in enumerate(places) if kinds[place] == group]
            found.append(jax.tree.map(
                lambda *each: jnp.concatenate(each, axis=1).reshape(-1, *each[0].shape[2:]), *own))
    for place in range(rest):
        carry, output = one(place, carry, [part[index_in_group(place) + (repeats > 0)] for part in parts[kinds[place]]])
        outputs[kinds[place]].append(output)
    return carry, [jax.tree.map(lambda *each: jnp.concatenate(each), *found) for found in outputs]


def joined_traces(traces: Sequence[LayerTrace], layers: Sequence[tuple[int, ...]]) -> LayerTrace:
    """Joins the traces of groups of layers whose weights differ in their structure.

    Args:
      traces: The stacked traces of each group.
      layers: The indices of the layers of each group.

    Returns:
      The trace of all layers in their order. A value that only some layers have, such as the logits
      of a router, is that of these layers alone.
    """
    order = np.argsort(np.concatenate([np.asarray(group) for group in layers]))

    def joined(values: list[Any]) -> Any:
        present = [value for value in values if value is not None]
        if len(present) < len(values) or len(values) == 1:
            return present[0] if present else None
        every = jnp.concatenate(present)
        return every if (order == np.arange(len(order))).all() else every[order]

    return type(traces[0])(**{field.name: joined([getattr(trace, field.name) for trace in traces])
                              for field in dataclasses.fields(traces[0])})
