"""Measures this library beside its peers, on the same work in the same run (extra ``bench``).

python -m experiments.benchmark train                       training step beside eager PyTorch
python -m experiments.benchmark quality --data=input.txt    time to a validation loss, beside eager PyTorch
python -m experiments.benchmark decode                      generation beside Hugging Face transformers
python -m experiments.benchmark compile                     compile time by depth, and with the cache warm
python -m experiments.benchmark mlm --data=dom_casmurro.txt masked language modelling beside Hugging Face's RoBERTa
python -m experiments.benchmark translate --workdir=DIR     beam search beside Hugging Face's Marian, same weights
python -m experiments.benchmark interop                     GPT-2, RoBERTa and BART from the same files as transformers
python -m experiments.benchmark rl                          GRPO and PPO beside TRL's GRPO
python -m experiments.benchmark gpu --data=input.txt        everything that is measured on a GPU, in ten minutes
python -m experiments.benchmark tpu                         programs compiled for TPUs that are not here

Medians over rounds in which both sides take turns, each in a process of its own; warm, unless compilation is what is
measured.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

import transformer_jax as tj
from experiments.timing import OtherProcess, take_turns, timed
from transformer_jax.config import ModelConfig, OptimConfig
from transformer_jax.runtime import keep_freed_memory
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

_DATA = flags.DEFINE_string("data", None, "A text file, for quality and mlm.")
_WORKDIR = flags.DEFINE_string("workdir", None, "What a translator was trained in, for translate.")
_STEPS = flags.DEFINE_integer("steps", 300, "Training steps of mlm.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each side; the median is reported.")
_TINY = flags.DEFINE_bool("tiny", False, "Run gpu or interop at toy size, on any machine.")
_PARTS = flags.DEFINE_list("parts", None, "Only these parts of gpu or interop, or programs of tpu.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures here.")

_ADAMW = OptimConfig(peak_lr=1e-3, end_lr=0.1, warmup_steps=100, beta2=0.99, weight_decay=0.1)
_TRAINING = {
    "4 layers x 128, 12 x 64": (tj.presets.get("nanogpt-char-cpu").replace(unroll=4), 12),
    "6 layers x 384, 4 x 256": (tj.presets.get("nanogpt-char-gpu").replace(unroll=6, dropout=0.0), 4),
}
_DECODING = {
    "124M": (tj.presets.get("gpt2-small"), 32, 128),
    "0.8M": (tj.presets.get("gpt2-small").replace(vocab_size=65, max_len=256, num_layers=4, num_heads=4,
                                                  model_dim=128), 16, 200),
}


def torch_training(pipe, config: ModelConfig, batches: list) -> None:
    """Worker: one pass over the batches whenever told to."""
    import torch

    from experiments.torch_gpt import TorchGPT, train_step
    from experiments.torch_gpt import make_optimizer as torch_optimizer

    model = TorchGPT(config)
    optimizer = torch_optimizer(model, _ADAMW)
    while pipe.recv():
        for tokens, targets in batches:
            train_step(model, optimizer, 1.0, 1e-3, torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
        pipe.send("done")


def torch_decoding(pipe, config: ModelConfig, prompt: list[int], new_tokens: int) -> None:
    """Worker: one greedy generation by Hugging Face, with its cache, whenever told to."""
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


def train() -> list[dict]:
    """Tokens per second of one training step: forward, backward, clipping, AdamW."""
    rows = []
    for name, (config, batch_size) in _TRAINING.items():
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, config.vocab_size, (2, batch_size, config.max_len), dtype=np.int32)
                   for _ in range(20)]
        optimizer = make_optimizer(_ADAMW, 2000)
        step = make_train_step(next_token_loss(), optimizer)
        state = init_state(lambda key, config=config: tj.Decoder(config, key=key), optimizer, jax.random.key(0))

        def ours(step=step, batches=batches):
            nonlocal state
            for tokens, targets in batches:
                state, metrics = step(state, {"tokens": tokens, "targets": targets})
            jax.block_until_ready((state, metrics))

        theirs = OtherProcess(torch_training, config, batches)
        medians = take_turns({"transformer_jax": ours, "PyTorch": theirs}, _ROUNDS.value)
        theirs.close()
        tokens = len(batches) * batch_size * config.max_len
        rows.append({"shape": name, **{f"{side} tokens/s": tokens / seconds for side, seconds in medians.items()},
                     **{f"{side} ms/step": 1e3 * seconds / len(batches) for side, seconds in medians.items()},
                     "ratio": medians["PyTorch"] / medians["transformer_jax"]})
    return rows


def quality() -> list[dict]:
    """Wall time from process start to the validation loss that ends the run, compilation included."""
    data, rows = _given("data", _DATA.value), []
    with tempfile.TemporaryDirectory() as directory:
        ours = [sys.executable, "-m", "experiments.train", f"--config.data.path={data}"]
        cold = os.environ | {"XDG_CACHE_HOME": directory}
        for name, command in {
            "PyTorch, 2,000 steps": [sys.executable, "-m", "experiments.torch_gpt", data],
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
    """Compile time of a scanned training step by depth, and a second start's first step with the cache warm."""
    rows = []
    for layers in (1, 2, 12):  # XLA takes apart a loop of one turn: only from two layers on is there a scan
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
    """Runs a training program until its metrics tell of a step."""
    metrics = workdir / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not (metrics.exists() and metrics.stat().st_size):
            if running.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with status {running.returncode}")
            time.sleep(0.01)
        running.kill()


def memory_bandwidth() -> float:
    """Bytes per second that both cores read together: the best of several passes of PyTorch's sum over 1 GiB."""
    import torch

    ones = torch.ones(2**28)
    best = min(timed(ones.sum) for _ in range(12))
    return ones.numel() * 4 / best


def decode() -> list[dict]:
    """Tokens per second of greedy generation, batch 1, float32, the prompt's pass included."""
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
        medians = take_turns({"transformer_jax": ours, "transformers": theirs}, _ROUNDS.value)
        theirs.close()
        weights = 4 * (tj.count_parameters(config) - config.max_len * config.model_dim)
        rate = new_tokens / medians["transformer_jax"]
        rows.append({"shape": name, **{f"{side} tokens/s": new_tokens / s for side, s in medians.items()},
                     "ratio": medians["transformers"] / medians["transformer_jax"],
                     "measured bandwidth GB/s": bandwidth / 1e9, "share of bandwidth": rate * weights / bandwidth})
    return rows


def _given(flag: str, value: str | None) -> str:
    return value if value is not None else sys.exit(f"error: --{flag} is missing")


def main(arguments: list[str]) -> None:
    def of(module: str):  # imported when asked for: a machine with a GPU need not have what the others need
        return importlib.import_module(f"experiments.{module}")

    programs = {"train": train, "quality": quality, "decode": decode, "compile": compilation,
                "mlm": lambda: of("benchmark_families").mlm(_given("data", _DATA.value), _STEPS.value),
                "translate": lambda: of("benchmark_families").translate(
                    _given("workdir", _WORKDIR.value), _ROUNDS.value),
                "interop": lambda: of("benchmark_interop").interop(
                    _ROUNDS.value, _PARTS.value, tiny=_TINY.value),
                "rl": lambda: of("benchmark_alignment").rl(_ROUNDS.value),
                "gpu": lambda: of("benchmark_gpu").gpu(_DATA.value, tiny=_TINY.value, parts=_PARTS.value),
                "tpu": lambda: of("benchmark_tpu").tpu(_PARTS.value)}
    if len(arguments) != 2 or arguments[1] not in programs:
        sys.exit(f"error: say what to measure: python -m experiments.benchmark {{{','.join(programs)}}}")
    if arguments[1] in ("train", "mlm", "rl"):
        keep_freed_memory()  # as programs that train do
    rows = programs[arguments[1]]()
    for row in [] if arguments[1] == "gpu" else rows:  # which shows its tables as they come
        print("  ".join(f"{name} {value:,.3g}" if isinstance(value, float) and value < 100 else
                        f"{name} {value:,.0f}" if isinstance(value, float) else str(value)
                        for name, value in row.items()))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
