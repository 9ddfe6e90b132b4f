"""The road on one text: n-grams, RNN, LSTM, GRU and GPT, with equal tokens and equal time."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from tqdm import tqdm

import transformer_jax as tj
from experiments.road_plan import make_plan, with_steps
from transformer_jax import recipes
from transformer_jax.baselines.gradients import gradient_by_distance
from transformer_jax.baselines.ngram_sampling import generate_ngrams
from transformer_jax.baselines.ngrams import NgramModel
from transformer_jax.data import Tokenizer, read_documents
from transformer_jax.runs.training import train
from transformer_jax.training.bundle import Bundle

MODELS = ("rnn", "lstm", "gru", "gpt")
ORDERS = (1, 2, 3, 4, 5)
_LENGTH, _MOST_WINDOWS, _SAMPLE = 128, 256, 240


def run(path: str, workdir: pathlib.Path, minutes: float, prompt: str) -> dict[str, Any]:
    """Trains and measures all language models.

    Args:
      path: The text.
      workdir: The directory for the plan and the runs.
      minutes: The time for all trainings together.
      prompt: The beginning of the samples.

    Returns:
      ``models``: for each model its numbers; ``gradients``: by cell, the norms by distance.

    Raises:
      ValueError: If the text is too short to hold out a tenth of it.
    """
    text = "\n\n".join(read_documents(path))
    cut = int(0.9 * len(text))
    if len(text) - cut < 10 * _LENGTH:
        raise ValueError(f"{path} has {len(text):,} characters; the road needs at least {100 * _LENGTH:,}, because it "
                         "holds out a tenth")
    tokenizer = Tokenizer.train([text], kind="char")
    data = {"data": [text[:cut]], "held_out": [text[cut:]], "tokenizer": tokenizer}
    windows = held_out_windows(tokenizer, text[cut:])
    found = {f"{order}-gram": ngram(text[:cut], order, tokenizer, windows, prompt) for order in ORDERS}
    configs = {name: recipes.get(f"road_{name}") for name in MODELS}
    plan = make_plan(workdir / "plan.json", configs, minutes, **data)
    gradients = {}
    for name, config in configs.items():
        for budget in ("tokens", "time"):
            steps = plan[name]["token_steps" if budget == "tokens" else "time_steps"]
            if budget == "time" and steps == plan[name]["token_steps"]:
                found[name]["time"] = found[name]["tokens"]  # the slowest model: one run is both
                continue
            bundle = train(with_steps(config, steps), workdir=workdir / f"{name}_{budget}", **data)
            measured = measure(bundle, windows, prompt) | {
                "steps": steps, "training_tokens": steps * config.batch_size * _LENGTH,
                "seconds": steps * plan[name]["step_seconds"]}
            found.setdefault(name, {})[budget] = measured
        gradients[name] = gradient_by_distance(bundle.model, windows[:16, :-1], windows[:16, -1]).tolist()
    return {"models": found, "gradients": gradients}


def held_out_windows(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Cuts a text into rows of tokens. Each row has one token more, the target of the last one.

    Args:
      tokenizer: The tokenizer.
      text: The text.

    Returns:
      At most 256 rows ``[rows, 129]``.
    """
    ids = np.asarray(tokenizer.encode(text), np.int32)
    rows = min((len(ids) - 1) // _LENGTH, _MOST_WINDOWS)
    return np.stack([ids[_LENGTH * row:_LENGTH * (row + 1) + 1] for row in range(rows)])


def summarize(losses_BT: np.ndarray, windows: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the bits per byte of rows of losses, and the mean loss at each position."""
    num_bytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in windows)
    return {"bits_per_byte": float(losses_BT.sum()) / math.log(2) / num_bytes,
            "loss_by_position": losses_BT.mean(0).tolist()}


def ngram(text: str, order: int, tokenizer: Tokenizer, windows: np.ndarray, prompt: str) -> dict[str, Any]:
    """Counts and measures an n-gram model on the same windows; each window starts with no context,
    as for the other models."""
    model = NgramModel.train([text], order=order, tokenizer=tokenizer)
    losses_BT = np.stack([-model.log_probabilities(row) for row in windows])
    sample = generate_ngrams(model, prompt, key=jax.random.key(0), max_new_tokens=_SAMPLE)
    measured = summarize(losses_BT, windows, tokenizer) | {
        "parameters": sum(len(codes) for codes in model.counts.codes) + tokenizer.vocab_size,
        "sample": prompt + cast(list, sample.texts)[0], "seconds": 0.0}
    return {"time": measured, "tokens": measured}


def measure(bundle: Bundle, windows: np.ndarray, prompt: str) -> dict[str, Any]:
    """Measures a trained model on the windows, and draws a sample."""
    losses_BT = np.concatenate([np.asarray(_losses(bundle.model, windows[start:start + 32]))
                                for start in tqdm(range(0, len(windows) - len(windows) % 32 or len(windows), 32),
                                                  desc="measuring", leave=False)])
    tokenizer = cast(Tokenizer, bundle.tokenizer)
    sample = tj.generate(bundle.model, prompt, tokenizer=tokenizer, key=jax.random.key(0), slide=True,
                         max_new_tokens=_SAMPLE, sampling=tj.Sampling(temperature=0.8))
    return summarize(losses_BT, windows[:len(losses_BT)], tokenizer) | {
        "parameters": tj.count_parameters(bundle.config), "sample": prompt + cast(list, sample.texts)[0]}


def _negative_log(model: Any, tokens_BT: jax.Array) -> jax.Array:
    logits_BTV = model(tokens_BT[:, :-1]).logits
    chosen_BT = jax.numpy.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


_losses: Callable[[Any, Any], jax.Array] = jax.jit(_negative_log)
