"""Models of Hugging Face in this library, in transformers and in inference engines for CPUs; run by
``python -m benchmarks interop``.

All sides read the same files of random float32 weights, each in its own process, and their results
are compared:

load, decode: GPT-2 124M; greedy, 128 tokens after prompts of 32 tokens, with one row and with eight
encode: the shape of RoBERTa-base; hidden states of 64 texts of 128 tokens
beam: the shape of BART-base; 32 tokens for each of 16 sources, with a beam of 4

transformers runs in two ways: without compilation and with its growing cache, and with
``torch.compile`` and its static cache. CTranslate2 decodes and searches, llama.cpp decodes one row,
and ONNX Runtime encodes (extra ``engines``). For decoding there are also sides with weights of 8
bits; their tokens may differ.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import transformer_jax as tj
from benchmarks.peers import engines
from benchmarks.timing import OtherProcess, take_turns
from transformer_jax.config import ModelConfig
from transformer_jax.models.functional import make_model

PARTS = ("load", "decode", "encode", "beam")
_BEAM, _LOADS = 4, 5
_THEIRS = {"transformers": False, "torch.compile": True}


@dataclasses.dataclass(frozen=True)
class _Work:
    """The work of a part: rows of ``length`` tokens each, after which ``new_tokens`` are
    generated."""

    config: ModelConfig
    rows: tuple[int, ...]
    length: int
    new_tokens: int = 0

    def tiny(self) -> _Work:
        """Returns the same work with very small sizes."""
        config = self.config.replace(vocab_size=512, num_layers=2, num_heads=4, model_dim=64)
        return _Work(config, tuple(min(rows, 2) for rows in self.rows), 8, min(self.new_tokens, 8))


_WORK = {
    "decode": _Work(tj.presets.get("gpt2-small"), (1, 8), 32, 128),
    "encode": _Work(tj.presets.get("roberta-base").replace(position_offset=2), (64,), 128),
    "beam": _Work(ModelConfig(
        family="encoder_decoder", vocab_size=50_265, max_len=1024, num_layers=6, num_heads=12, model_dim=768,
        norm_position="post", activation="gelu", positions="learned", position_offset=2, use_embedding_norm=True,
        use_output_bias=True, init_std=0.05, start_ids=(2,)), (16,), 32, 32),
}


def interop(rounds: int, parts: list[str] | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """Runs the benchmark.

    Args:
      rounds: The number of rounds.
      parts: The parts to run, among ``PARTS``; by default all.
      tiny: True to use very small sizes.

    Returns:
      A row for each part and number of texts, with the median seconds of each side.
    """
    parts = PARTS if parts is None else parts
    unknown = sorted({*parts} - {*PARTS})
    if unknown:
        sys.exit(f"error: interop has no part {unknown[0]!r}; its parts are {', '.join(PARTS)}")
    rows = []
    for name, work in _WORK.items():
        asked = [part for part in parts if part == name or (part, name) == ("load", "decode")]
        if asked:
            rows += _measure(name, work.tiny() if tiny else work, asked, rounds)
    return rows


def _measure(name: str, work: _Work, asked: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measures the parts that use the same model."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = jax.jit(lambda key: make_model(work.config, key=key))(jax.random.key(0))
        tj.to_huggingface(tj.Bundle(model, None, work.config), directory)
        del model
        sides = {"transformer_jax": OtherProcess(_ours, name, directory, work.new_tokens)} | {
            side: OtherProcess(_theirs, name, directory, work.new_tokens, compiled)
            for side, compiled in _THEIRS.items()}
        small: dict[str, OtherProcess] = {}
        try:
            if "load" in asked:  # before the engines start, which converts the weights
                seconds = {side: statistics.median(sides[side]("load") for _ in range(_LOADS))
                           for side in ("transformer_jax", "transformers")}
                rows.append(_row("load", seconds))
            if name in asked:
                sides |= _engines(name, directory, work.new_tokens, "float32")
            if (name, name in asked) == ("decode", True):
                small = {"transformer_jax": OtherProcess(_ours, name, directory, work.new_tokens, "int8"),
                         **_engines(name, directory, work.new_tokens, "int8")}
            for count in work.rows if name in asked else ():
                tokens = np.random.default_rng(0).integers(4, work.config.vocab_size, (count, work.length))
                what = f"{name}, {count} x {work.length} tokens"
                rows.append(_taking_turns(what, sides, tokens, rounds))
                if len(small) > 1:
                    rows.append(_taking_turns(f"{what}, 8 bits", small, tokens, rounds))
        finally:
            for side in (*sides.values(), *small.values()):
                side.close()
    return rows


def _engines(name: str, directory: str, new_tokens: int, weights: str) -> dict[str, OtherProcess]:
    """Starts the engines that can do a part and are installed."""
    sides = {}
    if name == "encode":
        if _is_installed("onnxruntime", "onnxscript"):
            sides["ONNX Runtime"] = OtherProcess(engines.onnx_runtime, directory)
        return sides
    if _is_installed("ctranslate2"):
        sides["CTranslate2"] = OtherProcess(engines.ctranslate2, name, directory, new_tokens, _BEAM, weights)
    if name == "decode" and _is_installed("llama_cpp", "gguf"):
        sides["llama.cpp"] = OtherProcess(engines.llama_cpp, directory, new_tokens,
                                          {"float32": "F32", "int8": "Q8_0"}[weights])
    return sides


def _is_installed(*packages: str) -> bool:
    """Returns whether the packages of an engine are there, and says if they are not."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"without {missing[0]}, which is not installed: pip install -e \".[engines]\"", file=sys.stderr)
    return not missing


def _taking_turns(what: str, sides: dict[str, OtherProcess], tokens: np.ndarray, rounds: int) -> dict[str, Any]:
    """Measures all sides on the same tokens, and compares their results."""
    answers = {}
    for side, run in list(sides.items()):
        try:
            answers[side] = np.asarray(run(tokens))
        except EOFError:  # the process has ended, and its error is on the terminal
            if side in ("transformer_jax", "transformers"):
                raise
            del sides[side]
    seconds = take_turns({side: lambda run=run: run(tokens) for side, run in sides.items()}, rounds)
    ours = answers.pop("transformer_jax")
    if np.issubdtype(ours.dtype, np.floating):
        agreement = {f"largest difference to {side}": float(np.abs(ours - theirs).max())
                     for side, theirs in answers.items()}
    else:
        agreement = {f"equal rows of {side}": float(np.mean([np.array_equal(a, b) for a, b in zip(
            ours, theirs, strict=True)])) for side, theirs in answers.items()}
    return _row(what, seconds) | agreement


def _row(what: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Returns a row with the seconds of each side, and the ratio to the fastest other side."""
    best = min(value for side, value in seconds.items() if side != "transformer_jax")
    return {"what": what, **{f"{side} s": value for side, value in seconds.items()},
            "ratio to the best": best / seconds["transformer_jax"]}


def _serve(pipe, load: Callable[[], Any], run: Callable[[Any, np.ndarray], Any]) -> None:
    """Answers the message ``"load"`` with the seconds of loading, and tokens with the model's
    output."""
    model = load()
    while True:
        message = pipe.recv()
        if isinstance(message, str):
            del model
            start = time.perf_counter()
            model = load()
            pipe.send(time.perf_counter() - start)
        else:
            pipe.send(run(model, message))


def _ours(pipe, name: str, directory: str, new_tokens: int, weights: str | None = None) -> None:
    """Worker for this library, with float32 weights or those of a kind of
    ``tj.prepare_for_decoding``."""
    encode = jax.jit(lambda model, tokens: model(tokens).hidden)

    def run(model, tokens):
        if name == "encode":
            return np.asarray(encode(model, tokens))
        if name == "decode":
            return tj.generate(model, tokens.tolist(), max_new_tokens=new_tokens, end_ids=[],
                               sampling=tj.Sampling(temperature=0.0)).tokens
        return tj.beam_search(model, tokens.tolist(), beam_size=_BEAM, length_penalty=1.0, penalty="length",
                              max_new_tokens=new_tokens, end_ids=[]).tokens

    def load():
        model = tj.from_huggingface(directory).model
        return jax.block_until_ready(model if weights is None else tj.prepare_for_decoding(model, weights=weights))

    _serve(pipe, load, run)


def _theirs(pipe, name: str, directory: str, new_tokens: int, compiled: bool) -> None:
    """Worker for transformers, with or without ``torch.compile``."""
    import torch
    import transformers

    kind = {"decode": transformers.GPT2LMHeadModel, "encode": transformers.AutoModel,
            "beam": transformers.AutoModelForSeq2SeqLM}[name]
    options = {"decode": {"min_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0},
               "beam": {"num_beams": _BEAM, "length_penalty": 1.0}}.get(name, {})

    def load():
        model = kind.from_pretrained(directory).eval()
        if name == "beam":
            model.generation_config.forced_eos_token_id = None
        if compiled and name != "encode":
            model.generation_config.cache_implementation = "static"
        if compiled:
            model.forward = torch.compile(model.forward)
        return model

    @torch.no_grad()
    def run(model, tokens):
        tokens = torch.from_numpy(tokens).long()
        mask = torch.ones_like(tokens)
        if name == "encode":
            return model(tokens, attention_mask=mask).last_hidden_state.numpy()
        found = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        return found[:, tokens.shape[1] if name == "decode" else 1:].tolist()

    _serve(pipe, load, run)
