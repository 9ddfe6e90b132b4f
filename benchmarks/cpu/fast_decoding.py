"""Loading, quantised weights and speculative decoding of GPT-2 124M on a CPU; run by
``python -m benchmarks fast``.

All sides run in one process in turns, with the same random float32 weights:

load: ``tj.from_huggingface`` and ``tj.load``, beside a plain read of the file
weights: greedy decoding of 16 tokens with float32, int8 and int4 weights, for one row and for eight
lookup: the same with guesses from the text itself; random weights repeat themselves, so nearly all
guesses are right, which is the bound of what speculation can gain
checks: one pass over 2 to 8 tokens beside one over a single token, which is what a check costs
grammar: sampling with a grammar beside sampling without one, for GPT-2 124M with 50,257 pieces and
for a model of 0.8M parameters that writes characters (package llguidance)
"""

from __future__ import annotations

import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import transformer_jax as tj
from benchmarks.timing import take_turns
from transformer_jax.models.functional import make_model

PARTS = ("load", "weights", "lookup", "checks", "grammar")
_TOKENS, _STEPS, _GREEDY = 16, 4, tj.Sampling(temperature=0.0)


def fast(rounds: int, parts: list[str] | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """Runs the benchmark.

    Args:
      rounds: The number of rounds.
      parts: The parts to run, among ``PARTS``; by default all.
      tiny: True to use very small sizes.

    Returns:
      A row for each comparison, with the median seconds of each side and the ratios to the first.
    """
    parts = list(PARTS) if parts is None else parts
    unknown = sorted({*parts} - {*PARTS})
    if unknown:
        sys.exit(f"error: fast has no part {unknown[0]!r}; its parts are {', '.join(PARTS)}")
    config = tj.presets.get("gpt2-small")
    if tiny:
        config = config.replace(vocab_size=512, num_layers=2, num_heads=4, model_dim=64)
    model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(0))
    measures = {"load": _load, "weights": _weights, "lookup": _lookup, "checks": _checks,
                "grammar": _grammar}
    return [row for part in parts for row in measures[part](model, rounds)]


def _row(what: str, sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Measures the sides, and returns their seconds and how many times faster than the first each
    is."""
    seconds = take_turns(sides, rounds)
    first = next(iter(seconds.values()))
    return {"what": what, **{f"{side} s": value for side, value in seconds.items()},
            **{f"{side} ratio": first / value for side, value in list(seconds.items())[1:]}}


def _load(model: tj.Decoder, rounds: int) -> list[dict[str, Any]]:
    """Measures loading, from files that are in the operating system's memory."""
    bundle = tj.Bundle(model, None, model.config)
    with tempfile.TemporaryDirectory() as directory:
        tj.to_huggingface(bundle, f"{directory}/theirs")
        tj.save(f"{directory}/ours", bundle)
        file = pathlib.Path(directory, "theirs", "model.safetensors")
        return [_row("load", {
            "plain read": file.read_bytes,
            "from_huggingface": lambda: jax.block_until_ready(tj.from_huggingface(f"{directory}/theirs").model),
            "load": lambda: jax.block_until_ready(tj.load(f"{directory}/ours").model)}, rounds)]


def _prompts(model: tj.Decoder, rows: int) -> list[list[int]]:
    """Returns random prompts of 16 tokens."""
    return np.random.default_rng(0).integers(1, model.config.vocab_size, (rows, 16)).tolist()


def _weights(model: tj.Decoder, rounds: int) -> list[dict[str, Any]]:
    """Measures decoding with the weights of each kind."""
    models = {"float32": tj.prepare_for_decoding(model)} | {
        kind: tj.prepare_for_decoding(model, weights=kind) for kind in ("int8", "int4")}
    return [_row(f"decode {rows} x {_TOKENS} tokens", {
        name: functools.partial(tj.generate, one, _prompts(model, rows), max_new_tokens=_TOKENS, sampling=_GREEDY)
        for name, one in models.items()}, rounds) for rows in (1, 8)]


def _lookup(model: tj.Decoder, rounds: int) -> list[dict[str, Any]]:
    """Measures decoding with guesses that are nearly always right."""
    model, found = tj.prepare_for_decoding(model), []
    for rows in (1, 4):
        generate = functools.partial(tj.generate, model, _prompts(model, rows), max_new_tokens=2 * _TOKENS,
                                     sampling=_GREEDY)
        guess = functools.partial(generate, speculation=tj.Speculation())
        plain, fast = generate(), guess()
        found.append(_row(f"look up {rows} x {2 * _TOKENS} tokens", {"plain": generate, "speculation": guess}, rounds)
                     | {"equal tokens": plain.tokens == fast.tokens, "acceptance rate": fast.acceptance_rate})
    return found


def _checks(model: tj.Decoder, rounds: int) -> list[dict[str, Any]]:
    """Measures passes over several tokens of one row."""
    model = tj.prepare_for_decoding(model)

    @functools.partial(jax.jit, static_argnums=1)
    def run(model: tj.Decoder, num_tokens: int) -> jax.Array:
        def step(_: int, carry: tuple) -> tuple:
            cache, token = carry
            out = model.step(jnp.broadcast_to(token, (1, num_tokens)), cache)
            return out.cache, out.logits[:, -1].argmax(-1)[:, None].astype(jnp.int32)

        start = model.start_cache(1, _STEPS * num_tokens), jnp.zeros((1, 1), jnp.int32)
        return jax.lax.fori_loop(0, _STEPS, step, start)[1]

    return [_row("a pass over several tokens", {
        f"{count} tokens": lambda count=count: jax.block_until_ready(run(model, count))
        for count in (1, 2, 3, 5, 8)}, rounds)]


def _grammar(model: tj.Decoder, rounds: int) -> list[dict[str, Any]]:
    """Measures sampling in a form that a regular expression gives, beside free sampling."""
    draw = np.random.default_rng(0)
    letters = draw.integers(ord("a"), ord("z") + 1, (model.config.vocab_size * 4, 6), dtype=np.uint8)
    words = [row.tobytes().decode() for row in letters]
    characters = tj.Tokenizer.train([" ".join(words)], kind="char")
    pieces = tj.Tokenizer.train([" ".join(words[start:start + 100]) for start in range(0, len(words), 100)],
                                kind="bpe", vocab_size=model.config.vocab_size)
    small = model.config.replace(vocab_size=characters.vocab_size, max_len=256, num_layers=4, num_heads=4,
                                 model_dim=128)
    grammar, found = tj.Grammar.regex("[a-z ]{4,9999}"), []
    for name, one, tokenizer, new_tokens in (("GPT-2 124M", model, pieces, 2 * _TOKENS),
                                             ("0.8M parameters", tj.Decoder(small, key=jax.random.key(0)),
                                              characters, 200)):
        one = tj.prepare_for_decoding(one)
        for rows in (1, 8):
            generate = functools.partial(tj.generate, one, ["the "] * rows, tokenizer=tokenizer, end_ids=[],
                                         key=jax.random.key(0), max_new_tokens=new_tokens)
            lengths = generate(grammar=grammar).lengths
            found.append(_row(f"grammar, {name}, {rows} x {new_tokens} tokens", {
                "free": generate, "with a grammar": functools.partial(generate, grammar=grammar)}, rounds)
                | {"complete": all(length == new_tokens for length in lengths)})
    return found
