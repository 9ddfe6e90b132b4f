"""Models of Hugging Face here and in transformers: the same files, float32, each side in a process of its own.

python -m experiments.benchmark interop: GPT-2 124M with random weights, loading and greedy decoding of 128 tokens after
prompts of 32, beside transformers with its growing cache, and with its static cache under ``torch.compile``.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

import transformer_jax as tj
from experiments.timing import OtherProcess, take_turns
from transformer_jax.config import ModelConfig

_PROMPT, _NEW = 32, 128
_BATCHES = (1, 8)
_LOADS = 3


def interop(rounds: int, config: ModelConfig | None = None, new_tokens: int = _NEW) -> list[dict[str, Any]]:
    """A row for each batch size, and one of seconds to load.

    Args:
      rounds: turns of each side.
      config: of a decoder in GPT-2's form; by default that of 124M weights.
      new_tokens: to decode.
    """
    config = tj.presets.get("gpt2-small") if config is None else config
    with tempfile.TemporaryDirectory() as folder:
        model = tj.Decoder(config, key=jax.random.key(0))
        tj.to_huggingface(tj.Bundle(model, None, config), folder)
        del model
        sides = {"transformer_jax": OtherProcess(_ours, folder, new_tokens),
                 "transformers": OtherProcess(_theirs, folder, new_tokens, False),
                 "compiled": OtherProcess(_theirs, folder, new_tokens, True)}
        try:
            loads = {name: sorted(side("load") for _ in range(_LOADS))[_LOADS // 2]
                     for name, side in sides.items() if name != "compiled"}
            rows = [{"what": "load", **{f"{name} s": seconds for name, seconds in loads.items()},
                     "ratio": loads["transformers"] / loads["transformer_jax"]}]
            prompts = np.random.default_rng(0).integers(1, config.vocab_size, (max(_BATCHES), _PROMPT))
            for batch in _BATCHES:
                rows.append(_decoding(sides, prompts[:batch].tolist(), rounds, new_tokens))
        finally:
            for side in sides.values():
                side.close()
    return rows


def _decoding(sides: dict[str, OtherProcess], prompts: list[list[int]], rounds: int, new_tokens: int) -> dict[str, Any]:
    found = {name: side(prompts) for name, side in sides.items()}
    # A static cache adds in another order, so an argmax between equals may differ: only the first two must agree.
    if found["transformer_jax"] != found["transformers"]:
        raise RuntimeError("the two sides generated different tokens")
    runs = {name: lambda side=side: side(prompts) for name, side in sides.items()}
    medians = take_turns(runs, rounds)
    best = min(seconds for name, seconds in medians.items() if name != "transformer_jax")
    rate = len(prompts) * new_tokens
    return {"what": f"decode, batch {len(prompts)}",
            **{f"{name} tokens/s": rate / seconds for name, seconds in medians.items()},
            "ratio": best / medians["transformer_jax"]}


def _ours(pipe, directory: str, new_tokens: int) -> None:
    """Answers ``"load"`` with seconds, and prompts with the tokens generated."""
    def load() -> tj.Decoder:
        return jax.block_until_ready(tj.from_huggingface(pathlib.Path(directory)).model)

    model = None
    while True:
        message = pipe.recv()
        if message == "load":
            start = time.perf_counter()
            model = load()
            pipe.send(time.perf_counter() - start)
        else:
            pipe.send(tj.generate(model, message, max_new_tokens=new_tokens, end_ids=[],
                                  sampling=tj.Sampling(temperature=0.0)).tokens)


def _theirs(pipe, directory: str, new_tokens: int, compiled: bool) -> None:
    """As :func:`_ours`, by transformers."""
    import torch
    from transformers import GPT2LMHeadModel

    def load() -> GPT2LMHeadModel:
        return GPT2LMHeadModel.from_pretrained(directory).eval()

    model = load()
    if compiled:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward)
    while True:
        message = pipe.recv()
        if message == "load":
            start = time.perf_counter()
            model = load()
            pipe.send(time.perf_counter() - start)
            continue
        tokens = torch.tensor(message)
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens,
                                 min_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        pipe.send(out[:, tokens.shape[1]:].tolist())
