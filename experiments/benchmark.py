"""Measures this library beside its peers, on the same work in the same run (extra ``bench``).

python -m experiments.benchmark train  [--data=input.txt]   training step beside eager PyTorch
python -m experiments.benchmark quality --data=input.txt    time to a validation loss, beside eager PyTorch
python -m experiments.benchmark decode                      generation beside Hugging Face transformers
python -m experiments.benchmark compile                     compile time by depth, and with the cache warm

Medians over rounds in which both sides take turns; warm, unless compilation is what is measured.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

import transformer_jax as tj
from transformer_jax.config import OptimConfig
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step, next_token_loss

_DATA = flags.DEFINE_string("data", None, "A text file, for train and quality.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each side; the median is reported.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures here.")
_SHAPES = flags.DEFINE_list("shapes", [], "Only these shapes.")

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


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def train() -> list[dict]:
    """Tokens per second of one training step: forward, backward, clipping, AdamW."""
    import torch

    from experiments.torch_gpt import TorchGPT
    from experiments.torch_gpt import make_optimizer as torch_optimizer
    from experiments.torch_gpt import train_step as torch_step

    rows = []
    for name, (config, batch_size) in _TRAINING.items():
        if _SHAPES.value and name not in _SHAPES.value:
            continue
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, config.vocab_size, (2, batch_size, config.max_len), dtype=np.int32)
                   for _ in range(20)]
        optimizer = make_optimizer(_ADAMW, 2000)
        step = make_train_step(next_token_loss(), optimizer)
        state = init_state(lambda key, config=config: tj.Decoder(config, key=key), optimizer, jax.random.key(0))
        peer = TorchGPT(config)
        peer_optimizer = torch_optimizer(peer, _ADAMW)

        def ours(step=step, batches=batches):
            nonlocal state
            for tokens, targets in batches:
                state, metrics = step(state, {"tokens": tokens, "targets": targets})
            jax.block_until_ready((state, metrics))

        def theirs(peer=peer, peer_optimizer=peer_optimizer, batches=batches):
            for tokens, targets in batches:
                torch_step(peer, peer_optimizer, 1.0, 1e-3, torch.from_numpy(tokens).long(),
                           torch.from_numpy(targets).long())

        medians = take_turns({"transformer_jax": ours, "PyTorch": theirs}, _ROUNDS.value)
        tokens = len(batches) * batch_size * config.max_len
        rows.append({"shape": name, **{f"{side} tokens/s": tokens / seconds for side, seconds in medians.items()},
                     **{f"{side} ms/step": 1e3 * seconds / len(batches) for side, seconds in medians.items()},
                     "ratio": medians["PyTorch"] / medians["transformer_jax"]})
    return rows


def memory_bandwidth() -> float:
    """Bytes per second that both cores read together: the best of several passes of PyTorch's sum over 1 GiB."""
    import torch

    ones = torch.ones(2**28)
    best = min(_timed(ones.sum) for _ in range(12))
    return ones.numel() * 4 / best


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def decode() -> list[dict]:
    """Tokens per second of greedy generation, batch 1, float32, the prompt's pass included."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    bandwidth = memory_bandwidth()
    rows = []
    for name, (config, prompt_length, new_tokens) in _DECODING.items():
        if _SHAPES.value and name not in _SHAPES.value:
            continue
        model = tj.Decoder(config, key=jax.random.key(0))
        peer = GPT2LMHeadModel(GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.model_dim,
            n_layer=config.num_layers, n_head=config.num_heads, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()
        prompt = np.random.default_rng(0).integers(1, config.vocab_size, prompt_length).tolist()
        prompt_tensor = torch.tensor([prompt])
        greedy = tj.Sampling(temperature=0.0)

        def ours(model=model, prompt=prompt, new_tokens=new_tokens, greedy=greedy):
            result = tj.generate(model, [prompt], max_new_tokens=new_tokens, sampling=greedy)
            if result.lengths != [new_tokens]:
                raise RuntimeError(f"generated {result.lengths} tokens")

        def theirs(peer=peer, prompt_tensor=prompt_tensor, new_tokens=new_tokens):
            with torch.no_grad():
                peer.generate(prompt_tensor, attention_mask=torch.ones_like(prompt_tensor), do_sample=False,
                              use_cache=True, min_new_tokens=new_tokens, max_new_tokens=new_tokens)

        medians = take_turns({"transformer_jax": ours, "transformers": theirs}, _ROUNDS.value)
        weights = 4 * (tj.count_parameters(config) - config.max_len * config.model_dim)
        rate = new_tokens / medians["transformer_jax"]
        rows.append({"shape": name, **{f"{side} tokens/s": new_tokens / s for side, s in medians.items()},
                     "ratio": medians["transformers"] / medians["transformer_jax"],
                     "measured bandwidth GB/s": bandwidth / 1e9, "share of bandwidth": rate * weights / bandwidth})
    return rows


def main(arguments: list[str]) -> None:
    programs = {"train": train, "decode": decode}
    if len(arguments) != 2 or arguments[1] not in programs:
        sys.exit(f"error: say what to measure: python -m experiments.benchmark {{{','.join(programs)}}}")
    rows = programs[arguments[1]]()
    for row in rows:
        print("  ".join(f"{name} {value:,.3g}" if isinstance(value, float) and value < 100 else
                        f"{name} {value:,.0f}" if isinstance(value, float) else str(value)
                        for name, value in row.items()))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
