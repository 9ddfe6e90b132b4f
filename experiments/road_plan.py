"""How long each model of the road trains: the speed of a step is measured once and recorded."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

from transformer_jax.config import CheckpointConfig, EvalConfig, ExperimentConfig
from transformer_jax.files import naming
from transformer_jax.json_files import read_json
from transformer_jax.runs.training import train
from transformer_jax.settings import to_dict

_MEASURED, _WARM = 16, 4
_LEAST_STEPS = 60
_SLOWEST = 0.95  # a model that needs this share of the slowest one's time is trained once, for both comparisons


class StepTimes:
    """A hook that records the time of each step."""

    def __init__(self):
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def __call__(self, loop: Any) -> None:
        float(loop.metrics["loss"])  # waits until the step is finished
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def make_plan(path: pathlib.Path, configs: Mapping[str, ExperimentConfig], minutes: float,
              **data: Any) -> dict[str, Any]:
    """Measures the speed of each model, and divides the time. A plan that exists is used again, so
    that the same command resumes exactly.

    Args:
      path: The file of the plan.
      configs: The config of each model.
      minutes: The time for all trainings together.
      **data: The arguments ``data``, ``held_out`` and ``tokenizer`` of ``tj.train``.

    Returns:
      For each model ``step_seconds``, ``time_steps`` (the steps of equal time) and ``token_steps``
      (the steps of equal tokens).

    Raises:
      ValueError: If the plan was made for other models, other settings of a model or another time.
    """
    settings = {name: json.loads(json.dumps(to_dict(config))) for name, config in configs.items()}
    if path.exists():
        plan = read_json(path, dict[str, Any])
        if plan["minutes"] != minutes or set(plan["models"]) != set(configs):
            raise ValueError(f"{path} holds a plan of {plan['minutes']} minutes for {', '.join(plan['models'])}; "
                             "use the same --minutes to resume, or another --workdir")
        if changed := [name for name in configs if plan["settings"][name] != settings[name]]:
            raise ValueError(f"{path} was made with other settings of {', '.join(changed)}, so that its speed and its "
                             "checkpoints do not fit; use another --workdir")
        return plan["models"]
    speeds = {}
    for name, config in configs.items():
        times = StepTimes()
        train(_trial(config), hooks=[times], **data)
        speeds[name] = statistics.median(times.seconds[_WARM:])
    # Each model trains for the same time t; the faster ones train again for as many tokens as the
    # slowest had.
    slowest = max(speeds.values())
    is_faster = {name: speed < _SLOWEST * slowest for name, speed in speeds.items()}
    shares = sum(1 + is_faster[name] * speed / slowest for name, speed in speeds.items())
    seconds = 60 * minutes / shares
    token_steps = max(int(seconds / slowest), _LEAST_STEPS)
    models = {name: {"step_seconds": speed, "token_steps": token_steps,
                     "time_steps": max(int(seconds / speed), token_steps) if is_faster[name] else token_steps}
              for name, speed in speeds.items()}
    with naming(path):
        path.write_text(json.dumps({"minutes": minutes, "models": models, "settings": settings}, indent=1))
    return models


def with_steps(config: ExperimentConfig, steps: int, saves: int = 4) -> ExperimentConfig:
    """Returns the config of a run of this length, which evaluates and saves so many times, and
    keeps all checkpoints."""
    every = max(steps // saves, 1)
    return config.replace(
        steps=steps, optim=dataclasses.replace(config.optim, warmup_steps=min(config.optim.warmup_steps, steps // 2)),
        checkpoint=CheckpointConfig(every=every, keep=saves + 1), eval=EvalConfig(every=every, max_batches=16),
        sample=dataclasses.replace(config.sample, every=0))


def _trial(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config of a short run that measures the speed."""
    return dataclasses.replace(with_steps(config, _MEASURED + _WARM), eval=EvalConfig(every=10**6), log_every=10**6)
