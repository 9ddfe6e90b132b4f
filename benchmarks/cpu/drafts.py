"""Speculative decoding of prose with a draft model; run by ``python -m benchmarks draft``.

The benchmark trains a model of 3.4M parameters on a text, and a draft model of a tenth of this size
on the same text and on texts that the first model has written. Then both sides, plain decoding and
decoding with the draft, continue the same passages of the text that training did not see. With a
``--workdir``, the trained models are kept for the next run.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

import transformer_jax as tj
from benchmarks.timing import ratios, take_turns
from transformer_jax.json_files import read_json
from transformer_jax.models.functional import Model

_PASSAGE, _HELD_OUT, _PROMPT, _NEW_TOKENS = 2000, 20, 32, 128


def draft(data: str, rounds: int, workdir: str | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """Runs the benchmark.

    Args:
      data: The text file, in prose.
      rounds: The number of rounds.
      workdir: The directory for the trained models; ``None`` to keep nothing.
      tiny: True to use very small sizes, on which the figures mean nothing.

    Returns:
      A row for greedy decoding and one for sampling, each with one prompt at a time and with four
      together. A row has the median seconds, the ratio, the share of the guesses that were right,
      and whether both sides wrote the same tokens.
    """
    text = pathlib.Path(data).read_text(encoding="utf-8")
    passages = [text[start:start + _PASSAGE] for start in range(0, len(text), _PASSAGE)]
    training, held_out = passages[:-_HELD_OUT], passages[-_HELD_OUT:]
    large = tj.train(_config(4, 256, 400, tiny=tiny), texts=training, workdir=workdir and f"{workdir}/model")
    tokenizer = large.tokenizer
    assert isinstance(tokenizer, tj.Tokenizer)  # the config trains one
    written = _written(large, [passage[:40] for passage in training[:16 if tiny else 128]], workdir)
    small = tj.train(_config(1, 128, 1200, tiny=tiny), texts=[*training, *written], tokenizer=tokenizer,
                     workdir=workdir and f"{workdir}/draft")
    sizes = {f"{name} parameters": float(tj.count_parameters(bundle.config))
             for name, bundle in (("model", large), ("draft", small))}
    prompts = [tokenizer.encode(passage)[:_PROMPT] for passage in held_out[:8]]
    return [{**_compare(large.model, tj.Speculation(small.model), prompts, temperature, rows, rounds), **sizes}
            for temperature in (0.0, 0.8) for rows in (1, 4)]


def _written(bundle: tj.Bundle, beginnings: list[str], workdir: str | None) -> list[str]:
    """Returns texts that a model writes. They are kept in the directory, because other texts, which
    another number of threads may give, could not continue the training of the draft model."""
    path = None if workdir is None else pathlib.Path(workdir, "written.json")
    if path is not None and path.exists():
        return read_json(path, list[str])
    written = tj.generate(bundle.model, beginnings, tokenizer=bundle.tokenizer, key=jax.random.key(1),
                          max_new_tokens=_NEW_TOKENS).texts or []
    if path is not None:
        path.write_text(json.dumps(written))
    return written


def _config(num_layers: int, width: int, steps: int, *, tiny: bool) -> tj.ExperimentConfig:
    """Returns how to train a model of the given depth and width."""
    c = tj.config
    model = c.ModelConfig(max_len=192, num_layers=num_layers, num_heads=width // 64, model_dim=width, positions="rope",
                          norm="rmsnorm", use_qk_norm=True, use_bias=False, init_std=0.05, unroll=num_layers)
    return c.ExperimentConfig(
        steps=2 if tiny else steps, batch_size=8 if tiny else 6,
        model=model.replace(num_layers=1, model_dim=64, num_heads=1, unroll=1) if tiny else model,
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=300 if tiny else 1024)),
        optim=c.OptimConfig(name="muon", peak_lr=5e-3, muon_lr=0.03, schedule="linear", end_lr=0.0, warmup_steps=1,
                            beta2=0.95, weight_decay=0.01, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=200), sample=c.SampleConfig(every=0))


def _compare(model: Model, speculation: tj.Speculation, prompts: list[list[int]], temperature: float, rows: int,
             rounds: int) -> dict[str, Any]:
    """Measures both sides with this number of prompts at a time."""
    model = tj.prepare_for_decoding(model)
    found: dict[str, list[tj.Generation]] = {}

    def side(name: str, **options: Any) -> Callable[[], None]:
        generate = functools.partial(tj.generate, model, key=jax.random.key(0), max_new_tokens=_NEW_TOKENS,
                                     sampling=tj.Sampling(temperature=temperature), **options)

        def run() -> None:
            found[name] = [generate(prompts[start:start + rows]) for start in range(0, len(prompts), rows)]

        return run

    seconds = take_turns({"plain": side("plain"), "draft": side("draft", speculation=speculation)}, rounds)
    rates = [one.acceptance_rate or 0.0 for one in found["draft"]]
    return {"temperature": str(temperature), "prompts together": str(rows),
            **{f"{name} s": value for name, value in seconds.items()}, **ratios(seconds["plain"], seconds["draft"]),
            "acceptance rate": sum(rates) / len(rates),
            "equal tokens": str([one.tokens for one in found["plain"]] == [one.tokens for one in found["draft"]])}
