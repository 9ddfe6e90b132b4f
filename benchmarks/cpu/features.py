"""Sparse autoencoders of this library and of SAELens, and the speed of collecting activations; run
by ``python -m benchmarks features``.

Both sides take training steps on the same random activations with the same sizes, in float32 on two
cores, with Adam and gradient clipping. A step counts from the batch in memory to the new weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.peers.saelens import train_saelens
from benchmarks.timing import OtherProcess, timed

SIZES = {"input_dim": 512, "num_features": 4096, "k": 32, "batch_size": 2048}
_STEPS = 3


def features(rounds: int) -> list[dict[str, Any]]:
    """Trains both sides in turns, and collects activations.

    Args:
      rounds: The number of rounds.

    Returns:
      For each activation function the steps per second of both sides; and the speed of ``collect``
      beside that of the forward pass alone.
    """
    rows = []
    for activation in ("topk", "relu"):
        sides = {"transformer_jax": OtherProcess(_train_ours, activation),
                 "SAELens": OtherProcess(train_saelens, activation, SIZES)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name, side in sides.items():
                elapsed = side(_STEPS)
                seconds[name] += [elapsed] if turn else []
        for side in sides.values():
            side.close()
        rows += [{"activation": activation, "side": name, "steps/s": _STEPS / statistics.median(found)}
                 for name, found in seconds.items()]
    return [*rows, *_collecting(rounds)]


def _train_ours(pipe: Any, activation: str) -> None:
    """Answers a number of steps with the seconds that they take."""
    import jax

    import transformer_jax as tj
    from transformer_jax.config import OptimConfig, SparseAutoencoderConfig
    from transformer_jax.runtime import keep_freed_memory
    from transformer_jax.training.loop import to_devices
    from transformer_jax.training.optimizer import make_optimizer

    keep_freed_memory()
    sizes = {name: size for name, size in SIZES.items() if name != "batch_size"}
    model = SparseAutoencoderConfig(site="x", activation=activation, **sizes)
    config = tj.ExperimentConfig(model=model, batch_size=SIZES["batch_size"], optim=OptimConfig(weight_decay=0.0))
    task = tj.tasks.make(config)
    step = tj.make_train_step(task.loss, make_optimizer(config.optim, config.steps), after_update=task.after_update())
    state = tj.init_training(config, task)
    rows = np.random.default_rng(0).normal(size=(SIZES["batch_size"], SIZES["input_dim"])).astype(np.float32)
    while True:
        count, start = pipe.recv(), time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, to_devices({"x": rows}))
        jax.block_until_ready((state, metrics))
        pipe.send(time.perf_counter() - start)


def _collecting(rounds: int) -> list[dict[str, Any]]:
    """Measures ``collect`` beside the forward pass of the same batches."""
    import jax

    import transformer_jax as tj
    from transformer_jax.inspection.reading_activations import ActivationReader

    config = tj.ModelConfig(vocab_size=8000, max_len=256, num_layers=6, num_heads=6, model_dim=384)
    model = tj.Decoder(config, key=jax.random.key(0))
    texts = np.random.default_rng(0).integers(0, 8000, (32, 256)).tolist()
    site, batch_size = "layers.3.mlp_output", 16
    reader = ActivationReader.make(model, texts, site, tokenizer=None, batch_size=batch_size, dtype="float32",
                                   mesh=None)
    # The pass up to the last residual stream, without the logits, which activations do not need.
    stream = jax.jit(lambda model, arrays, options: model(*arrays, **options).trace.final)
    batches = [reader.arrays(rows) for rows in reader.rows()]

    def forward() -> None:
        for arrays, options in batches:
            stream(model, arrays, options).block_until_ready()

    def collect() -> None:
        with tempfile.TemporaryDirectory() as directory:
            tj.inspection.collect(model, texts, site, directory, batch_size=batch_size)

    def in_memory() -> None:
        batches = tj.inspection.ActivationBatches(model, texts, site, batch_size=1024, buffer_size=32 * 256,
                                                  model_batch_size=batch_size)
        for _ in range(8):
            next(batches)

    sides = {"forward pass": forward, "collect": collect, "ActivationBatches": in_memory}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            elapsed = timed(run)
            seconds[name] += [elapsed] if turn else []
    return [{"side": name, "tokens/s": 32 * 256 / statistics.median(found)} for name, found in seconds.items()]


