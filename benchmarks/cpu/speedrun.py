"""The steps and the time to fixed validation losses; run by ``python -m benchmarks speedrun``.

The ladder, ``speedrun.json``, has an entry for each attempt: the date, what changed, the settings
that differ from the recipe ``shakespeare_char``, and the validation losses of five seeds. To add an
entry, append it with an empty list of losses, and run the program: it measures the entry and writes
the losses into the file. The last entry of a target whose mean loss reaches it is today's best.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any, TypedDict

import jax
import numpy as np

import transformer_jax as tj
from benchmarks.cpu.decoders import torch_training
from benchmarks.timing import OtherProcess, take_turns
from transformer_jax.config import ExperimentConfig
from transformer_jax.json_files import read_json
from transformer_jax.settings import check_field_names
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

LADDER = pathlib.Path(__file__).with_name("speedrun.json")
SEEDS = (0, 1, 2, 3, 4)
_TORCH_STEPS = 2000  # nanoGPT's CPU recipe
_TIMED_STEPS = 20


class Entry(TypedDict):
    """One attempt.

    Attributes:
      target: The validation loss to reach, in nats per character.
      date: The day of the measurement.
      change: What is different from the entry before it.
      settings: The settings that differ from the recipe, by their dotted names.
      losses: The validation losses of the five seeds, of the whole last tenth of tinyshakespeare;
        empty for an entry that is not measured yet.
    """

    target: float
    date: str
    change: str
    settings: dict[str, Any]
    losses: list[float]


def read_ladder() -> list[Entry]:
    """Returns all entries, in the order in which they were made."""
    return read_json(LADDER, list[Entry])


def config_of(entry: Entry) -> ExperimentConfig:
    """Returns the config of an entry.

    Args:
      entry: An entry of the ladder.

    Returns:
      The config, which evaluates the whole held-out text once, after the last step.

    Raises:
      ValueError: If a setting does not exist, or its value is not valid.
    """
    config = tj.recipes.get("shakespeare_char")
    rare = 10**9  # the last step is always logged and evaluated
    groups: dict[str, dict[str, Any]] = {"": {"log_every": rare}, "checkpoint": {"every": rare},
                                         "eval": {"every": rare}, "sample": {"every": 0}}
    for name, value in entry["settings"].items():
        group, _, field = name.rpartition(".")
        groups.setdefault(group, {})[field] = value
    for group, changes in groups.items():
        if group:
            old = getattr(config, group)
            check_field_names(type(old), changes)
            new = old.replace(**changes) if group == "model" else dataclasses.replace(old, **changes)
            changes = {group: new}
        config = config.replace(**changes)
    # Without a loop over layers, which XLA cannot optimise across, small models train faster.
    return config.replace(model=config.model.replace(unroll=config.model.num_layers))


def speedrun(data: str, rounds: int, targets: list[str] | None = None) -> list[dict]:
    """Measures the entries that are new, trains today's best entry of each target with five seeds
    again, and times its steps.

    Args:
      data: The file of tinyshakespeare.
      rounds: The number of rounds of the timing.
      targets: The targets to run, such as ``["1.87"]``; ``None`` for all.

    Returns:
      For each target, the losses, the steps, the tokens, the time of all steps, and its share of the
      time of nanoGPT's steps in PyTorch, if torch is installed. Compilation is not included.

    Raises:
      ValueError: If there is no entry for a target.
    """
    ladder = read_ladder()
    known = list(dict.fromkeys(_name(entry) for entry in ladder))
    wanted = known if targets is None else targets
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"there is no entry for the target {', '.join(unknown)}; there are {', '.join(known)}")
    for entry in ladder:
        if _name(entry) in wanted and not entry["losses"]:
            entry["losses"] = measure(entry, data)
            LADDER.write_text(json.dumps(ladder, indent=1) + "\n")
    best = {_name(entry): entry for entry in ladder if entry["losses"] and reaches(entry)}
    return [_run(best[target], data, rounds) if target in best else
            {"target": target, "reached": "by no entry"} for target in wanted]


def reaches(entry: Entry) -> bool:
    """Returns True if the mean loss of an entry that is measured reaches its target."""
    return bool(np.mean(entry["losses"]) <= entry["target"])


def _name(entry: Entry) -> str:
    """Returns the name of the target of an entry."""
    return f"{entry['target']:.2f}"


def measure(entry: Entry, data: str) -> list[float]:
    """Trains an entry with each of the five seeds, in one program.

    Args:
      entry: An entry of the ladder.
      data: The file of tinyshakespeare.

    Returns:
      The validation losses.
    """
    return tj.sweep(config_of(entry), {"seed": list(SEEDS)}, data).losses.tolist()


def _run(entry: Entry, data: str, rounds: int) -> dict:
    """Measures one entry."""
    config, losses = config_of(entry), measure(entry, data)
    medians = _time(config, rounds)
    seconds = config.steps * medians["transformer_jax"]
    row = {"target": entry["target"], "mean loss": float(np.mean(losses)), "lowest": min(losses),
           "highest": max(losses), "reached": str(reaches({**entry, "losses": losses})), "steps": str(config.steps),
           "tokens": float(config.steps * config.batch_size * config.row_length), "seconds": seconds}
    if "PyTorch" in medians:
        row["nanoGPT's 2,000 steps in PyTorch s"] = _TORCH_STEPS * medians["PyTorch"]
        row["share of its time"] = seconds / row["nanoGPT's 2,000 steps in PyTorch s"]
    return row


def _time(config: ExperimentConfig, rounds: int) -> dict[str, float]:
    """Returns the median seconds of a step of an entry, and of nanoGPT's step in PyTorch."""
    rng = np.random.default_rng(0)

    def batches(batch_size: int, length: int) -> list[np.ndarray]:
        return [rng.integers(0, 65, (2, batch_size, length), dtype=np.int32) for _ in range(_TIMED_STEPS)]

    model = config.model.replace(vocab_size=65)
    optimizer = make_optimizer(config.optim, config.steps)
    step = make_train_step(next_token_loss(config.loss), optimizer, config.optim.accumulation)
    state = init_state(lambda key: tj.Decoder(model, key=key), optimizer, jax.random.key(0))
    own = batches(config.batch_size, config.row_length)

    def ours() -> None:
        nonlocal state
        for tokens, targets in own:
            state, metrics = step(state, {"tokens": tokens, "targets": targets})
        jax.block_until_ready((state, metrics))

    if importlib.util.find_spec("torch") is None:
        medians = take_turns({"transformer_jax": ours}, rounds)
    else:
        nano = tj.presets.get("nanogpt-char-cpu")
        theirs = OtherProcess(torch_training, nano, [tuple(pair) for pair in batches(12, nano.max_len)])
        medians = take_turns({"transformer_jax": ours, "PyTorch": theirs}, rounds)
        theirs.close()
    return {side: value / _TIMED_STEPS for side, value in medians.items()}
