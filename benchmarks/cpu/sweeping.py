"""Eight models in one program beside eight programs; run by ``python -m benchmarks sweep``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import cast

import jax
import numpy as np

import transformer_jax as tj
from benchmarks.timing import take_turns, timed
from transformer_jax.config import ExperimentConfig, OptimConfig
from transformer_jax.sharding import make_mesh
from transformer_jax.training.members import init_members, make_members_step
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import Batch, make_train_step

_RATES, _SEEDS, _STEPS = (1e-3, 2e-3, 4e-3, 8e-3), (0, 1), 300
_SIZES = {"2 layers x 32, 8 x 64": (2, 32, 8), "2 layers x 64, 8 x 64": (2, 64, 8),
          "4 layers x 128, 12 x 64": (4, 128, 12)}


def sweep(data: str, rounds: int) -> list[dict]:
    """Measures eight models that differ in their learning rate and seed.

    Args:
      data: The text file to train on.
      rounds: The number of rounds of the measurement of single steps.

    Returns:
      For each size, the time of a step of eight models together and of eight steps of one model;
      and for the smallest size the time of whole programs, from their start to their end.
    """
    return [*(_steps(name, *size, rounds) for name, size in _SIZES.items()), _programs(data)]


def _steps(name: str, layers: int, width: int, batch_size: int, rounds: int) -> dict:
    """Compares a step of eight models with eight steps of one model."""
    members = [(rate, seed) for rate in _RATES for seed in _SEEDS]
    model = tj.presets.get("nanogpt-char-cpu").replace(num_layers=layers, model_dim=width, unroll=layers)
    config = ExperimentConfig(model=model, optim=OptimConfig())
    rng = np.random.default_rng(0)
    shape = (len(members), batch_size, model.max_len)
    batches = [{key: rng.integers(0, model.vocab_size, shape, dtype=np.int32) for key in ("tokens", "targets")}
               for _ in range(10)]
    mesh = make_mesh(devices=jax.devices()[:1])
    together = init_members(lambda key: tj.Decoder(model, key=key), config, [seed for _, seed in members], mesh)
    all_step = make_members_step(next_token_loss(), config, {"peak_lr": np.array([rate for rate, _ in members])}, mesh)
    optimizer = make_optimizer(config.optim, config.steps)
    alone = init_state(lambda key: tj.Decoder(model, key=key), optimizer, jax.random.key(0))
    one_step = make_train_step(next_token_loss(), optimizer)

    def in_one_program() -> None:
        nonlocal together
        for batch in batches:
            together, metrics = all_step(together, cast(Batch, batch))
        jax.block_until_ready(metrics)

    def one_by_one() -> None:
        nonlocal alone
        for batch in batches:
            for index in range(len(members)):
                alone, metrics = one_step(alone, {key: rows[index] for key, rows in batch.items()})
        jax.block_until_ready(metrics)

    medians = take_turns({"one program": in_one_program, "one by one": one_by_one}, rounds)
    return {"what": f"a step of 8 models, {name}",
            **{f"{side} ms": 1e3 * seconds / len(batches) for side, seconds in medians.items()},
            "share of the time": medians["one program"] / medians["one by one"]}


def _programs(data: str) -> dict:
    """Compares one program with eight, from start to end. All start with an empty compilation cache,
    which the later ones of the eight find filled."""
    settings = ["--config=shakespeare_char", f"--config.data.path={data}", f"--config.steps={_STEPS}",
                "--config.model.num_layers=2", "--config.model.model_dim=32", "--config.batch_size=8",
                "--config.sample.every=0", "--config.eval.batch_size=64", "--config.eval.max_batches=4"]
    with tempfile.TemporaryDirectory() as directory:
        def run(program: str, name: str, *flags: str) -> None:
            command = [sys.executable, "-m", f"experiments.{program}", f"--workdir={directory}/{name}", *settings,
                       *flags]
            cache = f"{directory}/cache_{program}"
            subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": cache}, check=True, capture_output=True)

        def eight() -> None:
            for rate in _RATES:
                for seed in _SEEDS:
                    run("train", f"{rate}_{seed}", f"--config.optim.peak_lr={rate}", f"--config.seed={seed}")

        separate = timed(eight)
        joint = timed(lambda: run("sweep", "all", "--over=optim.peak_lr=" + ",".join(map(str, _RATES)),
                                  "--over=seed=" + ",".join(map(str, _SEEDS))))
    return {"what": f"whole programs, 8 models of 2 layers x 32, {_STEPS} steps", "one program s": joint,
            "8 programs s": separate, "share of the time": joint / separate}
