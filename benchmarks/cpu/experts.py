"""A mixture of experts on this machine: products of groups of rows, and tokens per second beside a
dense model in which a token is processed by as many weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import transformer_jax as tj
from benchmarks.timing import take_turns
from transformer_jax.config import ExpertConfig, OptimConfig
from transformer_jax.ops.grouped import grouped_matmul
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

# The rows, experts and widths of the products: one token of two models, and batches of three.
_SHAPES = ((2, 8, 512, 1024), (8, 64, 512, 256), (2048, 8, 256, 512), (4096, 16, 256, 256), (8192, 64, 256, 128))
_DENSE = tj.ModelConfig(
    vocab_size=512, max_len=256, num_layers=4, num_heads=4, model_dim=256, mlp_dim=1024, positions="rope",
    norm="rmsnorm", activation="swiglu", use_bias=False)
_MODELS = {
    "dense": _DENSE,
    "8 experts, 2 per token": _DENSE.replace(moe=ExpertConfig(8, 2, mlp_dim=512)),
    "32 experts, 4 per token": _DENSE.replace(moe=ExpertConfig(32, 4, mlp_dim=256)),
}


def compare(rounds: int) -> list[dict[str, Any]]:
    """Measures products, training steps and decoding.

    Args:
      rounds: The number of rounds; medians are reported.

    Returns:
      A row for each product, with milliseconds, and one for training and one for decoding, with
      tokens per second of each model.
    """
    return [*_products(rounds), _training(rounds), _decoding(rounds)]


def _products(rounds: int) -> Iterator[dict[str, Any]]:
    """Times the products of groups by this library and by ``jax.lax.ragged_dot``, beside one
    product of the same rows with one matrix."""
    for R, E, D, F in _SHAPES:
        rows_RD = jax.random.normal(jax.random.key(0), (R, D))
        kernels_EDF = jax.random.normal(jax.random.key(1), (E, D, F))
        groups_R = jnp.sort(jax.random.randint(jax.random.key(2), (R,), 0, E))
        sizes_E = jnp.bincount(groups_R, length=E)
        sides = {"one matrix": jax.jit(lambda x, k, sizes, groups: x @ k[0]),
                 "blocks": jax.jit(lambda x, k, sizes, groups: grouped_matmul(x, k, sizes)),
                 "ragged_dot": jax.jit(lambda x, k, sizes, groups: jax.lax.ragged_dot(x, k, sizes))}
        if R <= 16:
            sides["copies"] = jax.jit(lambda x, k, sizes, groups: jnp.einsum("RD,RDF->RF", x, k[groups]))
        times = take_turns({name: functools.partial(_run, side, rows_RD, kernels_EDF, sizes_E, groups_R)
                            for name, side in sides.items()}, rounds)
        yield {"product": f"{R} rows, {E} matrices {D}x{F}"} | {f"{name} ms": 1000 * seconds
                                                                for name, seconds in times.items()}


def _training(rounds: int) -> dict[str, Any]:
    """Times training steps of 8 rows of 256 tokens."""
    rows = jax.random.randint(jax.random.key(0), (8, 257), 0, 512)
    batch, optimizer, sides = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}, make_optimizer(OptimConfig(), 100), {}
    for name, config in _MODELS.items():
        state = [init_state(lambda key, config=config: tj.Decoder(config, key=key), optimizer, jax.random.key(1))]
        step = make_train_step(next_token_loss(), optimizer)

        def run(state: list = state, step=step) -> None:
            state[0], metrics = step(state[0], batch)
            jax.block_until_ready(metrics)

        sides[name] = run
    return _rates("training", take_turns(sides, rounds), 8 * 256)


def _decoding(rounds: int) -> dict[str, Any]:
    """Times greedy generation of 64 tokens after one prompt."""
    sides = {}
    for name, config in _MODELS.items():
        model = tj.prepare_for_decoding(tj.Decoder(config, key=jax.random.key(1)))
        sides[name] = functools.partial(tj.generate, model, [[1, 2, 3]], max_new_tokens=64, end_ids=[],
                                        sampling=tj.Sampling(temperature=0))
    return _rates("decoding", take_turns(sides, rounds), 64)


def _run(side, *arguments: jax.Array) -> None:
    """Runs a compiled function to its end."""
    jax.block_until_ready(side(*arguments))


def _rates(work: str, seconds: dict[str, float], tokens: int) -> dict[str, Any]:
    """Makes a row of tokens per second; the names tell how many parameters there are and how many
    process a token."""
    sizes = {name: f"{tj.count_parameters(config):,} parameters, {tj.count_parameters(config, active=True):,} active"
             for name, config in _MODELS.items()}
    return {"work": work} | {f"{name} ({sizes[name]}) tokens/s": tokens / each for name, each in seconds.items()}
