"""The road on pairs of texts: RNN, GRU with attention, and Transformer, with equal tokens and equal
time."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import transformer_jax as tj
from experiments.road_plan import make_plan, with_steps
from transformer_jax import recipes
from transformer_jax.config import DataConfig, TokenizerConfig
from transformer_jax.inspection import plots
from transformer_jax.runs.completing import make_tokenizer
from transformer_jax.runs.training import train
from transformer_jax.tasks.translating import translate
from transformer_jax.tasks.translation import read_translation_data
from transformer_jax.tasks.translation_scores import scores
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.checkpoint import Checkpoints

MODELS = {"rnn": "road_pairs_rnn", "attention": "road_pairs_attention", "transformer": "dates"}
_MOST_TESTED = 400
_SAVES, _MOST_TESTED_PER_SAVE = 8, 100
_BUCKETS = 4


def run(pairs: str, workdir: pathlib.Path, minutes: float, language: str | None) -> dict[str, Any]:
    """Trains and measures all translators.

    Args:
      pairs: ``dates``, or files of pairs as in ``config.data.path``.
      workdir: The directory for the plan and the runs.
      minutes: The time for all trainings together.
      language: The language of the targets, for BLEU; ``None`` to count exact matches only.

    Returns:
      For each model its numbers, also by length of the source, and its translation curve.
    """
    data = recipes.get("dates").data
    if pairs != "dates":  # a text may have fewer pieces than this size
        data = DataConfig(path=pairs, tokenizer=TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2))
    examples, held_out = read_translation_data(data)
    tokenizer = make_tokenizer(data, [text for pair in examples for text in pair])
    given = {"data": list(examples), "held_out": list(held_out), "tokenizer": tokenizer}
    tested = list(held_out)[:_MOST_TESTED]
    configs = {name: recipes.get(recipe) for name, recipe in MODELS.items()}
    configs = {name: config.replace(batch_size=16, data=DataConfig(tokenizer=data.tokenizer))
               for name, config in configs.items()}
    plan = make_plan(workdir / "plan.json", configs, minutes, **given)
    found: dict[str, Any] = {}
    for name, config in configs.items():
        for budget in ("tokens", "time"):
            steps = plan[name]["token_steps" if budget == "tokens" else "time_steps"]
            if budget == "time" and steps == plan[name]["token_steps"]:
                found[name]["time"] = found[name]["tokens"]  # the slowest model: one run is both
                continue
            place = workdir / f"{name}_{budget}"
            bundle = train(with_steps(config, steps, _SAVES), workdir=place, **given)
            measured = by_length(bundle, tested, language) | {
                "steps": steps, "seconds": steps * plan[name]["step_seconds"],
                "curve": validation_curve(place, plan[name]["step_seconds"]),
                "scores": score_curve(place, plan[name]["step_seconds"], tested, language),
                "parameters": tj.count_parameters(bundle.config)}
            found.setdefault(name, {})[budget] = measured
        if "cross" in bundle.model.stacks():
            draw_alignment(bundle, tested[0], workdir / f"alignment_{name}.png")
    return {"models": found}


def validation_curve(workdir: pathlib.Path, step_seconds: float) -> list[tuple[float, float]]:
    """Reads the held-out loss by training time from the metrics of a run."""
    return [(line["step"] * step_seconds, line["validation_loss"])
            for line in tj.training.read_metrics(workdir / "metrics.jsonl") if "validation_loss" in line]


def score_curve(workdir: pathlib.Path, step_seconds: float, pairs: list[tuple[str, str]],
                language: str | None) -> list[tuple[float, float]]:
    """Scores some of the held-out pairs at every checkpoint of a run.

    Args:
      workdir: The directory of the run.
      step_seconds: The time of a training step.
      pairs: The held-out pairs.
      language: The language of the targets for BLEU, or ``None`` for exact matches.

    Returns:
      The seconds of training and the score of each checkpoint, the earliest first.
    """
    name = "exact" if language is None else "bleu"
    steps = Checkpoints(workdir / "checkpoints", read_only=True).steps()
    return [(step * step_seconds, by_length(tj.load(workdir, step=step), pairs[:_MOST_TESTED_PER_SAVE], language)[name])
            for step in steps]


def seconds_to_equal_score(curves: Mapping[str, list[tuple[float, float]]]) -> tuple[float, dict[str, float | None]]:
    """Finds when each model reaches the best score that at least two models reach.

    Args:
      curves: For each model the seconds of training and the score at each checkpoint.

    Returns:
      The score, which is the second best of the best scores of the models, and for each model the
      seconds at which it first has it, interpolated between two checkpoints. They are ``None`` for
      a model that never has it.
    """
    equal = sorted(max(score for _, score in curve) for curve in curves.values())[-2:][0]
    seconds: dict[str, float | None] = {}
    for name, curve in curves.items():
        least = next((index for index, (_, score) in enumerate(curve) if score >= equal), None)
        if least is None:
            seconds[name] = None
            continue
        before = curve[least - 1] if least else (0.0, 0.0)
        (start, low), (end, high) = before, curve[least]
        seconds[name] = end if high == low else start + (end - start) * (equal - low) / (high - low)
    return equal, seconds


def by_length(bundle: Bundle, pairs: list[tuple[str, str]], language: str | None) -> dict[str, Any]:
    """Translates greedily, and scores all sentences and those of each range of lengths.

    Args:
      bundle: The translator.
      pairs: The held-out pairs.
      language: The language of the targets, or ``None`` for exact matches only.

    Returns:
      ``exact``, with a language ``bleu``, and the same in ``by_length`` for four equal parts of the
      sentences, the shortest first, with the ``longest`` source of each in characters.
    """
    sources, targets = map(list, zip(*pairs, strict=True))
    texts = [(found[0].text or "").strip() for found in translate(bundle, sources, beam_size=1, length_penalty=1.0)]

    def score(rows: np.ndarray) -> dict[str, float]:
        chosen, wanted = [texts[row] for row in rows], [targets[row] for row in rows]
        exact = sum(text == target for text, target in zip(chosen, wanted, strict=True)) / len(rows)
        bleu = {} if language is None else {"bleu": float(scores(chosen, wanted, language=language)["bleu"])}
        return {"exact": exact, **bleu}

    order = np.argsort([len(source) for source in sources], kind="stable")
    parts = [{"longest": len(sources[rows[-1]]), **score(rows)} for rows in np.array_split(order, _BUCKETS)]
    return {**score(order), "by_length": parts}


def draw_alignment(bundle: Bundle, pair: tuple[str, str], path: pathlib.Path) -> None:
    """Draws what each token of a target attends to in the source, for the reference translation."""
    inspected = tj.inspect_text(bundle, pair[0], target=pair[1])
    weights_TS = np.asarray(inspected.attention("cross", layers=-1)).mean(0)
    queries, keys = inspected.labels("cross")
    plots.save(plots.alignment(weights_TS, keys, queries, title=type(bundle.model).__name__), path)
