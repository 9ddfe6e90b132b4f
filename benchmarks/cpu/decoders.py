"""The benchmarks of decoders; run by ``python -m benchmarks {train,quality,decode,compile}``."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

import transformer_jax as tj
from benchmarks.timing import OtherProcess, ratios, take_turns, timed
from transformer_jax.config import ModelConfig, OptimConfig
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

_ADAMW = OptimConfig(peak_lr=1e-3, end_lr=0.1, warmup_steps=100, beta2=0.99, weight_decay=0.1)
# The config, the rows of a batch, and the steps of a round.
_TRAINING = {
    "4 layers x 128, 12 x 64": (tj.presets.get("nanogpt-char-cpu").replace(unroll=4), 12, 20),
    "6 layers x 384, 4 x 256": (tj.presets.get("nanogpt-char-gpu").replace(unroll=6, dropout=0.0), 4, 5),
}
_DECODING = {
    "124M": (tj.presets.get("gpt2-small"), 32, 128),
    "0.8M": (tj.presets.get("gpt2-small").replace(vocab_size=65, max_len=256, num_layers=4, num_heads=4,
                                                  model_dim=128), 16, 200),
}


def torch_training(pipe, config: ModelConfig, batches: list, *, compiled: bool = False, dtype: str = "float32") -> None:
    """Worker that trains on all batches once for each message, with ``torch.compile`` and in
    autocast if asked."""
    import torch

    from benchmarks.peers.torch_gpt import TorchGPT, train_step
    from benchmarks.peers.torch_gpt import make_optimizer as torch_optimizer

    model = TorchGPT(config)
    optimizer = torch_optimizer(model, _ADAMW)
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")(model.forward)
    if compiled:
        model.compile()
    while pipe.recv():
        for tokens, targets in batches:
            train_step(model, optimizer, 1.0, 1e-3, torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
        pipe.send("done")


def torch_decoding(pipe, config: ModelConfig, prompt: list[int], new_tokens: int) -> None:
    """Worker that generates greedily with Hugging Face and its cache, once for each message."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.model_dim, n_layer=config.num_layers,
        n_head=config.num_heads, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()
    prompt_tensor = torch.tensor([prompt])
    while pipe.recv():
        with torch.no_grad():
            model.generate(prompt_tensor, attention_mask=torch.ones_like(prompt_tensor), do_sample=False,
                           use_cache=True, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        pipe.send("done")


def train(rounds: int) -> list[dict]:
    """Measures the tokens per second of a training step: forward, backward, clipping and AdamW.

    The sides are this library, PyTorch without compilation, and PyTorch with ``torch.compile``, in
    float32 and with products in bfloat16.
    """
    rows = []
    for name, (config, batch_size, steps) in _TRAINING.items():
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, config.vocab_size, (2, batch_size, config.max_len), dtype=np.int32)
                   for _ in range(steps)]
        tokens = len(batches) * batch_size * config.max_len
        for dtype in ("float32", "bfloat16"):
            peers = {side: OtherProcess(functools.partial(torch_training, compiled=compiled, dtype=dtype), config,
                                        batches) for side, compiled in (("PyTorch", False), ("torch.compile", True))}
            seconds = take_turns({"transformer_jax": _training(config.replace(dtype=dtype), batches), **peers}, rounds)
            for peer in peers.values():
                peer.close()
            best = min(seconds[side] for side in peers)
            rows.append({"shape": name, "dtype": dtype,
                         **{f"{side} tokens/s": tokens / each for side, each in seconds.items()},
                         **{f"{side} ms/step": 1e3 * each / len(batches) for side, each in seconds.items()},
                         "ratio to PyTorch": seconds["PyTorch"] / seconds["transformer_jax"],
                         **{f"{key} to the best": value
                            for key, value in ratios(best, seconds["transformer_jax"]).items()}})
    return rows


def _training(config: ModelConfig, batches: list[np.ndarray]) -> Callable[[], None]:
    """Returns a function that trains on all batches once."""
    optimizer = make_optimizer(_ADAMW, 2000)
    step = make_train_step(next_token_loss(), optimizer)
    state = init_state(lambda key: tj.Decoder(config, key=key), optimizer, jax.random.key(0))

    def run() -> None:
        nonlocal state
        for tokens, targets in batches:
            state, metrics = step(state, {"tokens": tokens, "targets": targets})
        jax.block_until_ready((state, metrics))

    return run


def quality(data: str) -> list[dict]:
    """Measures the wall time from the start of the process to the validation loss at the end of the
    run, including compilation."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        ours = [sys.executable, "-m", "experiments.train", f"--config.data.path={data}"]
        cold = os.environ | {"XDG_CACHE_HOME": directory}
        for name, command in {
            "PyTorch, 2,000 steps": [sys.executable, "-m", "benchmarks.peers.torch_gpt", data],
            "shakespeare_char": [*ours, "--config=shakespeare_char", f"--workdir={directory}/char",
                                 "--config.sample.every=0", "--config.eval.every=2000"],
            "shakespeare_fast": [*ours, "--config=shakespeare_fast", f"--workdir={directory}/fast"],
        }.items():
            start = time.perf_counter()
            done = subprocess.run(command, env=cold, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            losses = re.findall(r"validation loss (\d+\.\d+)", done.stdout + done.stderr)
            rows.append({"run": name, "seconds": seconds, "validation loss": float(losses[-1])})
    for row in rows:
        row["share of PyTorch's time"] = row["seconds"] / rows[0]["seconds"]
    return rows


def compilation() -> list[dict]:
    """Measures the compile time of a scanned training step for several depths, and the time to the
    first step with a cold and with a warm cache."""
    rows = []
    for layers in (1, 2, 12):  # XLA unrolls a loop of one iteration, so that a scan needs at least two layers
        config = tj.presets.get("nanogpt-char-cpu").replace(num_layers=layers)
        optimizer = make_optimizer(_ADAMW, 2000)
        state = init_state(lambda key, config=config: tj.Decoder(config, key=key), optimizer, jax.random.key(0))
        batch = {name: np.zeros((12, config.max_len), np.int32) for name in ("tokens", "targets")}

        lowered = []

        def lower(optimizer=optimizer, state=state, batch=batch, lowered=lowered):
            jax.clear_caches()
            lowered.append(make_train_step(next_token_loss(), optimizer).lower(state, batch))

        tracing = statistics.median(timed(lower) for _ in range(5))
        compiling = statistics.median(timed(one.compile) for one in lowered)
        rows.append({"what": f"a step of {layers} scanned layers: trace", "seconds": tracing})
        rows.append({"what": f"a step of {layers} scanned layers: compile", "seconds": compiling})
    for index, row in enumerate(rows[2:]):
        row["ratio to 1 layer"] = row["seconds"] / rows[index % 2]["seconds"]
    with tempfile.TemporaryDirectory() as directory:
        for start in ("cold", "warm"):
            workdir = pathlib.Path(directory, start)
            command = [sys.executable, "-m", "experiments.quickstart", f"--workdir={workdir}", "--config.log_every=1",
                       "--config.sample.every=0"]
            seconds = timed(lambda command=command, workdir=workdir, home=directory: _until_first_step(
                command, workdir, os.environ | {"XDG_CACHE_HOME": home}))
            rows.append({"what": f"process start to the end of the first step, cache {start}", "seconds": seconds})
    rows[-1]["ratio"] = rows[-1]["seconds"] / rows[-2]["seconds"]
    return rows


def _until_first_step(command: list[str], workdir: pathlib.Path, environment: dict[str, str]) -> None:
    """Runs a training program until it writes the metrics of its first step."""
    metrics = workdir / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not (metrics.exists() and metrics.stat().st_size):
            if running.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with status {running.returncode}")
            time.sleep(0.01)
        running.kill()


def memory_bandwidth() -> float:
    """Measures the bytes per second that all cores read together, as the best of several runs of
    PyTorch's sum over 1 GiB."""
    import torch

    ones = torch.ones(2**28)
    best = min(timed(ones.sum) for _ in range(12))
    return ones.numel() * 4 / best


def decode(rounds: int) -> list[dict]:
    """Measures the tokens per second of greedy generation in float32 with batch size 1, including
    the prefill of the prompt."""
    bandwidth = memory_bandwidth()
    rows = []
    for name, (config, prompt_length, new_tokens) in _DECODING.items():
        model = tj.Decoder(config, key=jax.random.key(0))
        prompt = np.random.default_rng(0).integers(1, config.vocab_size, prompt_length).tolist()

        def ours(model=model, prompt=prompt, new_tokens=new_tokens):
            result = tj.generate(model, [prompt], max_new_tokens=new_tokens, sampling=tj.Sampling(temperature=0.0))
            if result.lengths != [new_tokens]:
                raise RuntimeError(f"generated {result.lengths} tokens")

        theirs = OtherProcess(torch_decoding, config, prompt, new_tokens)
        medians = take_turns({"transformer_jax": ours, "transformers": theirs}, rounds)
        theirs.close()
        weights = 4 * (tj.count_parameters(config) - config.max_len * config.model_dim)
        rate = new_tokens / medians["transformer_jax"]
        rows.append({"shape": name, **{f"{side} tokens/s": new_tokens / s for side, s in medians.items()},
                     **ratios(medians["transformers"], medians["transformer_jax"]),
                     "measured bandwidth GB/s": bandwidth / 1e9, "share of bandwidth": rate * weights / bandwidth})
    return rows
