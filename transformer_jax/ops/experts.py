"""The feed-forward layers of a mixture of experts, each applied to the tokens that are routed to
it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from transformer_jax.derivatives import with_gradient
from transformer_jax.ops.attention import platform
from transformer_jax.ops.grouped import grouped_matmul
from transformer_jax.sharding import is_sharded, sharded_axes

# On a CPU, so few rows are multiplied with copies of their matrices; sorting would take longer.
_FEW_ROWS = 16
# The axes of matrices and biases.
_AXES = {"up": ("experts", "embed", "mlp"), "gate": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed"),
         "up_bias": ("experts", "mlp"), "gate_bias": ("experts", "mlp"), "down_bias": ("experts", None)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertKernels:
    """The matrices and biases of E experts.

    Attributes:
      up: ``[E, D, F]``.
      gate: ``[E, D, F]``; ``None`` if the activation has no gate.
      down: ``[E, F, D]``.
      up_bias: ``[E, F]``; ``None`` if there are no biases, like the next two.
      gate_bias: ``[E, F]``.
      down_bias: ``[E, D]``.
    """

    up: jax.Array
    gate: jax.Array | None
    down: jax.Array
    up_bias: jax.Array | None = None
    gate_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


def apply_experts(x_BTD: Float[Array, "B T D"], experts_BTk: Int[Array, "B T k"], weights_BTk: Float[Array, "B T k"],
                  kernels: ExpertKernels, activate: Callable[[jax.Array, jax.Array | None], jax.Array], *,
                  precision: str | None = None, product_name: str = "") -> Float[Array, "B T D"]:
    """Applies to each token its experts, and adds their outputs with the given weights.

    No token is dropped: an expert processes as many tokens as choose it. On a mesh, the devices of
    the axis ``expert`` gather each other's tokens, apply the experts that they hold, and sum the
    results.

    Args:
      x_BTD: The tokens ``[B, T, D]``.
      experts_BTk: The indices of the experts of each token ``[B, T, k]``.
      weights_BTk: The weights of their outputs ``[B, T, k]``.
      kernels: The matrices of all experts.
      activate: ``activate(up, gate)`` computes the neurons; ``gate`` is ``None`` if there is none.
      precision: The precision of the products.
      product_name: The name under which ``jax.checkpoint`` may save the products.

    Returns:
      ``[B, T, D]``, in the type of ``x_BTD``.
    """
    apply = functools.partial(_apply, activate=activate, precision=precision, product_name=product_name)
    if not is_sharded():
        return apply(x_BTD, experts_BTk, weights_BTk, kernels, None)
    batch, tokens = sharded_axes(x_BTD.shape[0], "batch"), sharded_axes(x_BTD.shape[1], "sequence")
    axes = {name: tuple(sharded_axes(size, axis) for size, axis in zip(value.shape, _AXES[name], strict=True))
            for name, value in vars(kernels).items() if value is not None}
    owners, fsdp, tensor = axes["up"]
    exchanges = owners is not None and owners in (batch if isinstance(batch, tuple) else (batch,))

    def local(x_BTD, experts_BTk, weights_BTk, kernels):
        if exchanges:
            x_BTD, experts_BTk, weights_BTk = (jax.lax.all_gather(x, owners, axis=0, tiled=True)
                                               for x in (x_BTD, experts_BTk, weights_BTk))
        if owners is not None:
            experts_BTk = experts_BTk - jax.lax.axis_index(owners) * kernels.up.shape[0]
        if tensor is not None and kernels.down_bias is not None:
            # The outputs of the devices are summed, and only one of them adds the bias.
            is_first = jax.lax.axis_index(tensor) == 0
            kernels = dataclasses.replace(kernels, down_bias=jnp.where(is_first, kernels.down_bias, 0))
        y_BTD = apply(x_BTD, experts_BTk, weights_BTk, kernels, fsdp)
        if exchanges:
            y_BTD = jax.lax.psum_scatter(y_BTD, owners, scatter_dimension=0, tiled=True)
        elif owners is not None:
            y_BTD = jax.lax.psum(y_BTD, owners)
        return y_BTD if tensor is None else jax.lax.psum(y_BTD, tensor)

    rows = PartitionSpec(batch, tokens, None)
    specs: Any = ExpertKernels(**{name: cast(Any, PartitionSpec(*axes[name]) if name in axes else None)
                                  for name in _AXES})
    return jax.shard_map(local, in_specs=(rows, rows, rows, specs), out_specs=rows, check_vma=False)(
        x_BTD, experts_BTk, weights_BTk, kernels)


def _apply(x_BTD: jax.Array, experts_BTk: jax.Array, weights_BTk: jax.Array, kernels: ExpertKernels,
           fsdp: str | tuple[str, ...] | None, *, activate: Callable, precision: str | None,
           product_name: str) -> jax.Array:
    """Applies the experts whose kernels are here; choices outside of ``[0, E)`` count as zero."""
    k, (num_experts, _, _) = experts_BTk.shape[-1], kernels.up.shape
    experts_R = experts_BTk.reshape(-1)
    is_here_R = (experts_R >= 0) & (experts_R < num_experts)
    here_R = jnp.where(is_here_R, experts_R, 0)
    weights_R = jnp.where(is_here_R, weights_BTk.reshape(-1), 0).astype(jnp.float32)
    rows_RD = jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), k, axis=0)
    if len(experts_R) <= _FEW_ROWS and platform() == "cpu":
        # Experts of other devices have the weight 0.
        multiply = functools.partial(_with_copies, groups_R=here_R, precision=precision)
        order_R = inverse_R = None
    else:
        groups_R = jnp.where(is_here_R, experts_R, num_experts)
        order_R = jnp.argsort(groups_R)
        inverse_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(len(order_R)), unique_indices=True)
        multiply = functools.partial(grouped_matmul, sizes_E=jnp.bincount(groups_R, length=num_experts),
                                     precision=precision)
        rows_RD = _permuted(jnp.where(is_here_R[:, None], rows_RD, 0), order_R, inverse_R)

    own_R = here_R if order_R is None else here_R[order_R]  # the expert of each row that is multiplied

    def product(rows_RD: jax.Array, kernel_EDF: jax.Array, bias_EF: jax.Array | None, fsdp_axis: int) -> jax.Array:
        def compute(rows_RD: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
            kernel_EDF = kernel_EDF.astype(rows_RD.dtype)
            if fsdp is not None:
                kernel_EDF = jax.lax.all_gather(kernel_EDF, fsdp, axis=fsdp_axis, tiled=True)
            return multiply(rows_RD, kernel_EDF)

        # The gradient casts and gathers the kernels again; the product is not recomputed.
        out_RF = checkpoint_name(jax.checkpoint(compute, prevent_cse=False)(rows_RD, kernel_EDF), product_name)
        return out_RF if bias_EF is None else out_RF + bias_EF.astype(out_RF.dtype)[own_R]

    gate_RF = None if kernels.gate is None else product(rows_RD, kernels.gate, kernels.gate_bias, 1)
    hidden_RF = activate(product(rows_RD, kernels.up, kernels.up_bias, 1), gate_RF)
    out_RD = product(hidden_RF, kernels.down, kernels.down_bias, 2)
    if order_R is not None and inverse_R is not None:
        out_RD = jnp.where(is_here_R[:, None], _permuted(out_RD, inverse_R, order_R), 0)
    out_RD = out_RD.astype(jnp.float32) * weights_R[:, None]
    return out_RD.reshape(*x_BTD.shape[:-1], k, -1).sum(-2).astype(x_BTD.dtype)


def _with_copies(rows_RD: jax.Array, kernels_EDF: jax.Array, *, groups_R: jax.Array,
                 precision: str | None) -> jax.Array:
    """Multiplies every row with a copy of the matrix of its group."""
    return jnp.einsum("RD,RDF->RF", rows_RD, kernels_EDF[groups_R], precision=precision)


def _permuted(rows_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """Permutes rows; the gradient permutes them back instead of adding row by row."""
    return with_gradient(lambda rows_RD, order_R, inverse_R: rows_RD[order_R],
                         lambda args, kept, gradient_RD: (gradient_RD[args[2]], None, None),
                         rows_RD, order_R, inverse_R)
