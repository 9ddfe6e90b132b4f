"""Attention with Pallas's splash kernel, on TPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import is_sharded, num_shards, partition_spec

_LANES, _LONGEST_BLOCK = 128, 512


def why_not_splash(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | None, bias: object) -> str | None:
    """Says why the kernel does not support these arguments on a TPU; ``None`` if it does."""
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if bias is not None:
        return "the kernel has no bias"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32) or k_BSKH.dtype != q_BTNH.dtype:
        return f"the kernel takes bfloat16 or float32, not queries of {q_BTNH.dtype} and keys of {k_BSKH.dtype}"
    parts = num_shards(T, "sequence")
    if T % (_LANES * parts) or S % _LANES:
        return (f"the kernel takes lengths that are multiples of {_LANES} on each device, not {T} queries on "
                f"{parts} and {S} keys")
    if H % 64 or H > 256:
        return f"the kernel takes head dims of 64, 128, 192 and 256, not {H}"
    if num_shards(N, "heads") != num_shards(K, "kv_heads"):
        return f"the mesh shards the {N} query heads and the {K} key heads differently"
    if mask is None:
        return None
    if mask.allowed_BNTS is not None:
        return "the kernel has no explicit mask"
    if mask.window is not None and mask.positions is not None:
        return "the kernel's windows count indices of keys, and this window counts positions"
    if mask.query_start is not None:
        return "the kernel's masks start at the first key, and these queries start later, after those in a cache"
    if len(mask.segment_pairs) > 1:
        return f"the kernel takes one pair of segment ids, not {len(mask.segment_pairs)}"
    if mask.window is not None and T != S:
        return f"the kernel supports a window in self-attention only, not for {T} queries and {S} keys"
    return None


def splash_attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask | None,
                  scale: float | None, cap: float | None = None, *, interpret: bool = False) -> jax.Array:
    """Computes ``transformer_jax.ops.attend`` for arguments that the kernel supports.

    On a mesh, each device computes its own shard of the rows, heads and queries, with all keys of
    its rows. With ``interpret=True`` the kernel is interpreted on any platform, for tests.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    mask = AttentionMask() if mask is None else mask
    q_BTNH = q_BTNH * (H**-0.5 if scale is None else scale)
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    ids = _segment_ids(mask, B, T, S)
    mesh = jax.sharding.get_abstract_mesh()
    is_unsharded = not is_sharded()
    heads, queries = (1, 1) if is_unsharded else (num_shards(N, "heads"), num_shards(T, "sequence"))
    kernel = _kernel(mask.is_causal, mask.window, N, T, S, heads, queries, cap, interpret)

    def attend(kernel, q_BNTH, k_BKSH, v_BKSH, ids) -> Any:
        return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, None if ids is None else _kernel_module().SegmentIds(*ids))

    if is_unsharded:
        out_BNTH = attend(kernel, q_BNTH, k_BKSH, v_BKSH, ids)
    else:
        rows, head, query = (partition_spec(axis)[0] if num_shards(size, axis) > 1 else None
                             for axis, size in (("batch", B), ("heads", N), ("sequence", T)))
        kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, PartitionSpec(head, query)))
        q_spec, k_spec = PartitionSpec(rows, head, query, None), PartitionSpec(rows, head, None, None)
        id_specs = None if ids is None else (PartitionSpec(rows, query), PartitionSpec(rows, None))
        out_BNTH = jax.shard_map(attend, in_specs=(kernel_spec, q_spec, k_spec, k_spec, id_specs), out_specs=q_spec,
                                 check_vma=False)(kernel, q_BNTH, k_BKSH, v_BKSH, ids)
    may_attend_BT = _may_attend(mask, T, S)
    out_BTNH = out_BNTH.swapaxes(1, 2)
    return out_BTNH if may_attend_BT is None else jnp.where(may_attend_BT[:, :, None, None], out_BTNH, 0)


def _kernel_module():
    """Imports the kernel on first use, because the import is slow."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


def _kernel(is_causal: bool, window: int | None, num_heads: int, num_queries: int, num_keys: int, head_parts: int,
            query_parts: int, cap: float | None, interpret: bool):
    """Makes the kernel for a mask and a cap of the scores, for the given numbers of shards of heads and queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (num_queries, num_keys)
    if window is not None:
        head_mask = masks.LocalMask(shape, (window - 1, 0 if is_causal else window - 1), 0)
    else:
        head_mask = masks.CausalMask(shape) if is_causal else masks.FullMask(shape)
    rows, columns = _block_size(num_queries // query_parts), _block_size(num_keys)
    blocks = _kernel_module().BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns)
    return _kernel_module().make_splash_mha(masks.MultiHeadMask([head_mask] * num_heads), block_sizes=blocks,
                                            head_shards=head_parts, q_seq_shards=query_parts, attn_logits_soft_cap=cap,
                                            interpret=interpret)


def _block_size(length: int) -> int:
    """Returns the largest block size of 128, 256 and 512 that divides a length.

    Larger blocks take fewer steps, and up to 512 they fit in VMEM.
    """
    return next(size for size in (_LONGEST_BLOCK, _LONGEST_BLOCK // 2, _LANES) if length % size == 0)


def _needs_segment_ids(mask: AttentionMask) -> bool:
    """Whether the kernel needs segment ids to apply the mask."""
    return bool(mask.segment_pairs) or mask.valid_BS is not None or mask.lengths_B is not None


def _segment_ids(mask: AttentionMask, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array] | None:
    """Makes segment ids of queries and keys. They are equal if the query may attend to the key.

    Keys to which no query may attend have the id -1.
    """
    if not _needs_segment_ids(mask):
        return None
    if mask.segment_pairs:
        query_ids_BT, key_ids_BS = mask.segment_pairs[0]
        key_ids_BS = jnp.where(key_ids_BS == 0, -1, key_ids_BS)
    else:
        query_ids_BT, key_ids_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    if mask.valid_BS is not None:
        key_ids_BS = jnp.where(mask.valid_BS, key_ids_BS, -1)
    if mask.lengths_B is not None:
        key_ids_BS = jnp.where(jnp.arange(S) < mask.lengths_B[:, None], key_ids_BS, -1)
    return jnp.broadcast_to(query_ids_BT, (B, T)), jnp.broadcast_to(key_ids_BS, (B, S))


def _may_attend(mask: AttentionMask, T: int, S: int) -> jax.Array | None:
    """Returns which queries may attend to at least one key, ``[B, T]``; ``None`` means all."""
    if not _needs_segment_ids(mask):
        return None
    (query_ids, key_ids), = mask.segment_pairs or ((None, None),)
    if query_ids is not None and query_ids is key_ids and mask.valid_BS is None and mask.lengths_B is None:
        return query_ids != 0  # every token may attend to itself
    allowed = mask.materialize(T, S)
    return None if allowed is None else allowed.any(-1)[:, 0]
