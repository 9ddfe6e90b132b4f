"""The parts of the GPU benchmark that run single operations: peak rates, attention and cross
entropy. ``benchmarks.gpu.suite`` runs them."""

from __future__ import annotations

import functools
import importlib.util
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.sizes import Sizes
from benchmarks.timing import OtherProcess, timed
from transformer_jax.ops import AttentionMask, attend
from transformer_jax.ops.attention import why_not
from transformer_jax.ops.losses import linear_cross_entropy

_CHECKED_ROWS = 1024
_TOLERANCE = 0.02


def has_torch() -> bool:
    """True if PyTorch is installed and has a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def seconds_of(function, *arguments, repeats: int, calls: int = 1) -> float:
    """Measures the median seconds of a call after a warm-up. ``calls`` calls follow each other
    without waiting for the result."""
    jax.block_until_ready(function(*arguments))

    def run():
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)

    return statistics.median(timed(run) for _ in range(repeats)) / calls


def ceilings(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the peak rates of the device: of a large bfloat16 matrix product, and of a copy
    within its memory."""
    del found, data
    n = sizes.matrix
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.dot)
    seconds = seconds_of(product, a, b, repeats=sizes.repeats, calls=20)
    x = jnp.ones(sizes.copied, jnp.float32)
    copying = seconds_of(jax.jit(lambda x: x + 1), x, repeats=sizes.repeats, calls=5)
    return [{"product": f"{n} x {n} x {n}, bfloat16, normal numbers", "TFLOP/s": 2 * n**3 / seconds / 1e12,
             "memory GB/s": 2 * x.nbytes / copying / 1e9}]


def _problem(shape: tuple[int, int, int, int, int]) -> tuple[list[jax.Array], jax.Array]:
    """Returns queries, keys and values, and a cotangent of the output that is zero after some
    rows."""
    B, T, N, K, H = shape
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (B, T, heads, H), jnp.bfloat16)
              for key, heads in zip(keys, (N, K, K, N), strict=True)]
    return arrays[:3], arrays[3].at[:, _CHECKED_ROWS:].set(0)


def _both(implementation: str):
    """Returns a function that computes the output and the gradients of attention."""
    def loss(q, k, v, probe):
        out = attend(q, k, v, AttentionMask.causal(), implementation=implementation)
        return (out.astype(jnp.float32) * probe).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def _float64(q, k, v, probe) -> list[np.ndarray]:
    """Computes gradients and output in float64 for the first head of the first example, for the
    rows in which the cotangent is not zero."""
    rows = min(_CHECKED_ROWS, q.shape[1])
    q, k, v, probe = (np.asarray(x[0, :rows, 0].astype(jnp.float32), np.float64) for x in (q, k, v, probe))
    scores = np.where(np.tri(rows, dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    d_weights = probe @ v.T
    d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return [d_scores @ k, d_scores.T @ q, weights.T @ probe, weights @ v]


def _error(implementation: str, shape: tuple[int, int, int, int, int]) -> float:
    """Returns the largest error of the output and the gradients, each divided by the largest true
    value.

    With grouped queries, the gradients of keys and values sum over several heads, so that only the
    output and the gradient of the queries are checked.
    """
    arrays, probe = _problem(shape)
    (d_q, d_k, d_v), out = _both(implementation)(*arrays, probe)
    wanted = _float64(*arrays, probe)
    got = [np.asarray(x[0, :len(true), 0].astype(jnp.float32)) for x, true in zip((d_q, d_k, d_v, out), wanted,
                                                                               strict=True)]
    checked = range(4) if shape[2] == shape[3] else (0, 3)
    return max(np.abs(got[i] - wanted[i]).max() / np.abs(wanted[i]).max() for i in checked)


def _implementations(shape: tuple[int, int, int, int, int]) -> list[str]:
    """Returns the kernels that can run this shape on this device."""
    (q, k, _), _ = _problem((1, *shape[1:]))
    scores = shape[0] * shape[2] * shape[1] ** 2
    return [name for name in ("cudnn", "xla", "chunked")
            if why_not(name, q, k, AttentionMask.causal()) is None and (name != "xla" or scores <= 2**30)]


def errors(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Compares the output and the gradients of every kernel with NumPy in float64, for the shapes
    that are timed."""
    del found, data
    return [{"B, T, N, K, H": shape, "kernel": name, "largest relative error": (error := _error(name, shape)),
             "within 2 %": bool(error < _TOLERANCE)}
            for shape in sizes.attention for name in _implementations(shape)]


def attention(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the TFLOP/s of causal attention by shape, compared with PyTorch's cuDNN kernel. A
    kernel with wrong results is not timed."""
    del data
    wrong = {(row["B, T, N, K, H"], row["kernel"]) for row in found.get("kernels against float64", [])
             if not row.get("within 2 %", True)}
    rows = []
    peer = OtherProcess(torch_attention) if has_torch() else None
    for shape in sizes.attention:
        B, T, N, _, H = shape
        flops = 2.0 * B * N * T * T * H  # two products, each over half of the square
        (q, k, v), probe = _problem(shape)
        for name in _implementations(shape):
            if (shape, name) in wrong:
                rows.append({"B, T, N, K, H": shape, "kernel": name, "note": "wrong results, not timed"})
                continue
            forward = jax.jit(functools.partial(attend, implementation=name))
            one = seconds_of(forward, q, k, v, AttentionMask.causal(), repeats=sizes.repeats, calls=10)
            both = seconds_of(_both(name), q, k, v, probe, repeats=sizes.repeats, calls=10)
            rows.append({"B, T, N, K, H": shape, "kernel": name, "forward TFLOP/s": flops / one / 1e12,
                         "forward and backward TFLOP/s": 3.5 * flops / both / 1e12})
        if peer is None:
            rows.append({"B, T, N, K, H": shape, "kernel": "cuDNN through PyTorch", "note": "not installed, or no GPU"})
        else:
            one, both = peer(shape)
            rows.append({"B, T, N, K, H": shape, "kernel": "cuDNN through PyTorch",
                         "forward TFLOP/s": flops / one / 1e12,
                         "forward and backward TFLOP/s": 3.5 * flops / both / 1e12})
    if peer is not None:
        peer.close()
    return rows


def torch_attention(pipe) -> None:
    """Worker that answers each shape with the seconds of the forward pass, and of the forward and
    backward pass."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    while True:
        B, T, N, K, H = pipe.recv()
        q, k, v = (torch.randn(B, heads, T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                   for heads in (N, K, K))

        def forward(q=q, k=k, v=v, grouped=N != K):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        def both(forward=forward, probe=torch.ones_like(q)):  # noqa: B008
            forward().backward(probe)

        found = []
        for run in (forward, both):
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            found.append(timed(lambda run=run: ([run() for _ in range(10)], torch.cuda.synchronize())) / 10)
        pipe.send(found)


def cross_entropy(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the loss over GPT-2's vocabulary with its gradients, without materializing the
    logits."""
    del found, data
    M, D, V = sizes.cross_entropy
    hidden = jax.random.normal(jax.random.key(0), (M, D), jnp.bfloat16)
    table = 0.02 * jax.random.normal(jax.random.key(1), (V, D))
    targets = jax.random.randint(jax.random.key(2), (M,), 0, V)
    losses = jax.jit(linear_cross_entropy)(hidden, table, targets)[:16]
    logits = np.asarray(hidden[:16].astype(jnp.float32), np.float64) @ np.asarray(table, np.float64).T
    wanted = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), np.asarray(targets[:16])]
    step = jax.jit(jax.grad(lambda hidden, table: linear_cross_entropy(hidden, table, targets).sum(), (0, 1)))
    compiled = step.lower(hidden, table).compile()
    seconds = seconds_of(compiled, hidden, table, repeats=sizes.repeats, calls=3)
    extra = compiled.memory_analysis().temp_size_in_bytes
    return [{"tokens x vocabulary": f"{M} x {V}", "extra memory GiB": extra / 2**30,
             "ms": 1e3 * seconds, "TFLOP/s": 8.0 * M * D * V / seconds / 1e12,
             "largest error against float64": float(np.abs(np.asarray(losses) - wanted).max())}]
