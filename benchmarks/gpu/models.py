"""The parts of the GPU benchmark that run models. ``benchmarks.gpu.suite`` runs them."""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time

import jax
import numpy as np

import transformer_jax as tj
from benchmarks.gpu.kernels import has_torch
from benchmarks.gpu.sizes import Sizes
from benchmarks.timing import OtherProcess, timed
from transformer_jax.config import ModelConfig, OptimConfig
from transformer_jax.training.chips import CHIPS
from transformer_jax.training.metrics import flops_per_token
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_eval_step, make_train_step

# If this variable is set, the training benchmark runs only the first model, and not PyTorch. The
# process that uses deterministic kernels sets it.
FIRST_ONLY = "TRANSFORMER_JAX_BENCHMARK_FIRST_ONLY"
_ADAMW = OptimConfig(peak_lr=6e-4, beta2=0.95, weight_decay=0.1, warmup_steps=100)
# The settings of nanoGPT's config/train_shakespeare_char.py.
_CHARACTERS = OptimConfig(peak_lr=1e-3, end_lr=0.1, warmup_steps=100, beta2=0.99, weight_decay=0.1, clip_norm=1.0)
_CHARACTER_BATCH, _CHARACTER_LOSS, _EVALUATE_EVERY = 64, 1.4697, 250


def _batch(config: ModelConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, config.vocab_size, (batch_size, config.max_len), dtype=np.int32)
            for name in ("tokens", "targets")}


def _state(config: ModelConfig, optimizer):
    """Returns the training state before the first step."""
    return init_state(lambda key: tj.Decoder(config, key=key), optimizer, jax.random.key(0))


def training(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the tokens per second of a training step, as a fraction of the peak rates of the
    device, and compared with compiled PyTorch."""
    del data
    rows = []
    first_only = bool(os.environ.get(FIRST_ONLY))
    for name, (config, batch_size) in list(sizes.train.items())[:1 if first_only else None]:
        optimizer = make_optimizer(_ADAMW, 1000)
        state, batch = _state(config, optimizer), jax.device_put(_batch(config, batch_size))
        start = time.perf_counter()
        step = make_train_step(next_token_loss(), optimizer)
        compiled = step.lower(state, batch).compile()
        compiling = time.perf_counter() - start
        step = functools.partial(compiled, **step.keywords)  # a call of the jitted function would compile again

        def some_steps(step=step, batch=batch):
            nonlocal state
            for _ in range(sizes.steps):
                state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

        some_steps()
        seconds = statistics.median(timed(some_steps) for _ in range(sizes.repeats)) / sizes.steps
        flops = flops_per_token(config, tj.count_parameters(config)) * batch["tokens"].size
        row = {"model": name, "rows x tokens": f"{batch_size} x {config.max_len}",
               "tokens/s": batch["tokens"].size / seconds, "ms a step": 1e3 * seconds,
               "TFLOP/s": flops / seconds / 1e12, **_shares(flops / seconds, found), "compile s": compiling,
               "memory GB": compiled.memory_analysis().temp_size_in_bytes / 1e9}
        del state, batch
        rows.append(row | ({} if first_only else _peer(config, batch_size, sizes, row["tokens/s"])))
    return rows


def _shares(rate: float, found: dict) -> dict[str, float]:
    """Returns a rate as a fraction of the published and of the measured peak rate."""
    device = jax.devices()[0].device_kind.lower()
    published = [chip.peak_flops for name, chip in CHIPS.items() if name in device]
    measured = [row["TFLOP/s"] for row in found.get("ceilings", []) if "TFLOP/s" in row]
    return ({f"MFU of {published[0] / 1e12:.0f} TFLOP/s": rate / published[0]} if published else {}) | (
        {"share of the measured product": rate / 1e12 / measured[0]} if measured else {})


def _peer(config: ModelConfig, batch_size: int, sizes: Sizes, ours: float) -> dict:
    """Measures the same training in PyTorch."""
    if not has_torch():
        return {"PyTorch tokens/s": "not installed, or no GPU"}
    from benchmarks.peers.torch_gpu import training as torch_training

    peer = OtherProcess(torch_training, config, batch_size, sizes.steps)
    peer()
    theirs = batch_size * config.max_len / statistics.median(peer() for _ in range(sizes.repeats))
    peer.close()
    return {"PyTorch tokens/s": theirs, "ratio": ours / theirs}


def decoding(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the tokens per second of greedy generation, without the prefill of the prompt. Each
    token reads all weights, so that the memory bandwidth limits the rate."""
    del data
    rows = []
    bandwidth = next((1e9 * row["memory GB/s"] for row in found.get("ceilings", []) if "memory GB/s" in row), None)
    for name, config in sizes.decode.items():
        model = tj.Decoder(config, key=jax.random.key(0))
        weights = 2 * (tj.count_parameters(config) - config.max_len * config.model_dim)
        for batch_size in (1, sizes.rows) if config is next(iter(sizes.decode.values())) else (1,):
            prompts = np.random.default_rng(0).integers(1, config.vocab_size, (batch_size, 8)).tolist()

            def generate(new_tokens: int, model=model, prompts=prompts):
                tj.generate(model, prompts, max_new_tokens=new_tokens, sampling=tj.Sampling(temperature=0.0))

            few, many = sizes.new_tokens // 2, sizes.new_tokens
            times = []
            for new_tokens in (few, many):
                generate(new_tokens)
                times.append(statistics.median(timed(lambda: generate(new_tokens)) for _ in range(sizes.repeats)))  # noqa: B023
            row = {"model": name, "rows": batch_size, "tokens/s": batch_size * (many - few) / (times[1] - times[0]),
                   "tokens/s with the prompt's pass": batch_size * many / times[1]}
            if bandwidth and batch_size == 1:
                row["share of the measured bandwidth"] = row["tokens/s"] * weights / bandwidth
            rows.append(row | (_generation_peer(config, sizes) if batch_size == 1 else {}))
        del model
    return rows


def _generation_peer(config: ModelConfig, sizes: Sizes) -> dict:
    """Measures the same generation in Hugging Face transformers."""
    if not has_torch():
        return {"Hugging Face tokens/s": "not installed, or no GPU"}
    from benchmarks.peers.torch_gpu import generation

    peer = OtherProcess(generation, config)
    few, many = sizes.new_tokens // 2, sizes.new_tokens
    seconds = [[peer(new_tokens) for _ in range(sizes.repeats + 1)][1:] for new_tokens in (few, many)]
    peer.close()
    return {"Hugging Face tokens/s": (many - few) / (statistics.median(seconds[1]) - statistics.median(seconds[0]))}


def compiling(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the seconds to compile the first model's training step, with a cold and with a warm
    cache."""
    del found, data
    name, (config, batch_size) = next(iter(sizes.train.items()))
    row = {"model": name}
    # JAX reads both settings when it compiles a program. The programs set them in
    # transformer_jax.cli.flags.
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    with tempfile.TemporaryDirectory() as directory:
        _cache_in(directory, 0.0)
        try:
            for start in ("cold", "warm"):
                jax.clear_caches()
                optimizer = make_optimizer(_ADAMW, 1000)
                state, batch = _state(config, optimizer), _batch(config, batch_size)
                start_time = time.perf_counter()
                lowered = make_train_step(next_token_loss(), optimizer).lower(state, batch)
                row[f"trace, {start} s"] = time.perf_counter() - start_time
                start_time = time.perf_counter()
                lowered.compile()
                row[f"compile, {start} s"] = time.perf_counter() - start_time
        finally:
            _cache_in(*before)
    return [row]


def _cache_in(directory: str | None, least_seconds: float) -> None:
    """Sets the directory of the compilation cache, and the shortest compile time that it stores."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    compilation_cache.reset_cache()


def characters(sizes: Sizes, found: dict, data: str | None) -> list[dict]:
    """Measures the wall time, including compilation, in which the character model of Shakespeare
    reaches nanoGPT's validation loss."""
    del found
    if data is None:
        return [{"left out": "no text is given: pass --data=input.txt"}]
    with open(data, encoding="utf-8") as file:
        text = file.read()
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = np.array([numbers[character] for character in text], np.int32)
    cut = int(0.9 * len(tokens))
    config, rng = sizes.char.replace(vocab_size=max(len(numbers), 65)), np.random.default_rng(1337)
    T = config.max_len
    start_time = time.perf_counter()
    optimizer = make_optimizer(_CHARACTERS, sizes.char_steps)
    state, step = _state(config, optimizer), make_train_step(next_token_loss(), optimizer)
    evaluate = make_eval_step(next_token_loss())
    held_out = tokens[cut:]
    count = min((len(held_out) - 1) // T, 16 * _CHARACTER_BATCH) // _CHARACTER_BATCH * _CHARACTER_BATCH
    count = count or (len(held_out) - 1) // T
    inputs, targets = held_out[:count * T].reshape(-1, T), held_out[1:count * T + 1].reshape(-1, T)

    def validation_loss() -> float:
        sums = np.sum([[float(x) for x in evaluate(state.params, {
            "tokens": inputs[i:i + _CHARACTER_BATCH], "targets": targets[i:i + _CHARACTER_BATCH]})]
            for i in range(0, count, _CHARACTER_BATCH)], axis=0)
        return sums[0] / sums[1]

    best, reached = (np.inf, 0), None
    every = min(_EVALUATE_EVERY, sizes.char_steps)
    for number in range(1, sizes.char_steps + 1):
        starts = rng.integers(0, cut - T - 1, _CHARACTER_BATCH)
        windows = tokens[starts[:, None] + np.arange(T + 1)]
        state, _ = step(state, {"tokens": windows[:, :-1], "targets": windows[:, 1:]})
        if number % every == 0:
            best = min(best, (validation_loss(), number))
            if reached is None and best[0] <= _CHARACTER_LOSS:
                reached = time.perf_counter() - start_time
    return [{"steps": sizes.char_steps, "best validation loss": best[0], "at step": best[1],
             f"seconds to {_CHARACTER_LOSS}": "not reached" if reached is None else reached,
             "seconds in all": time.perf_counter() - start_time}]
