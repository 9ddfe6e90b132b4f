"""Reward modelling: a trained decoder, with a head of one number, learns which of several answers
is preferred."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.alignment.rankings import Rankings
from transformer_jax.alignment.reward import (
    expected_calibration_error,
    normalized,
    pair_margins,
    reward_loss,
    score_rows,
)
from transformer_jax.data import Comparison, Tokenizer, read_comparisons
from transformer_jax.models.heads import RewardModel
from transformer_jax.settings import to_dict
from transformer_jax.tasks.answering import AnsweringTask, check_can_answer
from transformer_jax.tasks.base import TaskData
from transformer_jax.training.bundle import TOKENIZER_FILE, Bundle, load
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.step import Batch, Sums


class RewardModeling(AnsweringTask):
    """Ranked answers; the loss is that of Bradley and Terry (1952), as used by Ouyang et al.
    (2022)."""

    name = "reward"
    family = "reward"
    examples = "comparisons"
    read_file = staticmethod(read_comparisons)

    def start_from(self, base: Bundle) -> Bundle:
        """A reward model that begins as the base, with a new head."""
        check_can_answer(base)
        model = RewardModel.of(base.model, key=jax.random.key(self.config.seed))
        return Bundle(model=model, tokenizer=base.tokenizer, config=model.config)

    def prepare(self, examples: Sequence[Comparison], held_out: Sequence[Comparison], tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the comparisons; nothing is kept in ``cache_dir``, since they are few."""
        self._examples = examples, held_out
        train, validation = (Rankings.build(part, tokenizer, self.config.model.max_len)
                             for part in (examples, held_out))
        return TaskData(train=train, contents=[train.digest, validation.digest],
                        summary=f"{len(train):,} comparisons, {len(validation):,} held out",
                        evaluation_batches=validation.batches, shown=(held_out[0], validation))

    def loss(self, model: RewardModel, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The negative log-likelihood of the rankings, in nats a pair."""
        return reward_loss(model, batch, key)

    def show(self, model: RewardModel, step: int, data: TaskData) -> str:
        """The scores of the answers to the first held-out prompt."""
        comparison, validation = data.shown
        scores = score_rows(model, validation.tokens_NKT[0], validation.segment_ids_NKT[0], batch_size=8)
        lines = [f"{score:8.3f}  {text}" for score, text in zip(scores, comparison.responses, strict=False)]
        return "\n".join([comparison.prompt[-1].content, *lines])

    def measure(self, bundle: Bundle, data: str | Sequence[Comparison] | None = None, *, batch_size: int = 32,
                **options: Any) -> dict[str, float]:
        """How often the model orders pairs as they are ranked, by what margin, and how well
        calibrated it is.

        Args:
          bundle: a trained reward model with its tokenizer.
          data: comparisons or a file of them; ``None``: those that its run held out.
          batch_size: not used: the rows of a comparison are scored together.

        Returns:
          ``accuracy`` in [0, 1], ``margin`` in nats, ``calibration_error`` in [0, 1],
          ``comparisons``.
        """
        if isinstance(data, (str, pathlib.Path)):
            data = read_comparisons(data)
        elif data is None:
            _, data = self.read()
        rankings = Rankings.build(data, bundle.tokenizer, bundle.config.max_len)
        margins = pair_margins(_scores(bundle.model, rankings), rankings.ranks_NK)
        return {"accuracy": float((0.5 + 0.5 * np.sign(margins)).mean()), "margin": float(margins.mean()),
                "calibration_error": expected_calibration_error(margins), "comparisons": len(rankings)}

    def finish(self) -> str:
        """Writes the mean and spread of its scores into the best model; one line on the held-out
        comparisons."""
        bundle = load(self.workdir, step="best")
        train = Rankings.build(self._examples[0], bundle.tokenizer, bundle.config.max_len)
        model = normalized(bundle.model, _scores(bundle.model, train)[train.ranks_NK > 0])
        with contextlib.closing(Checkpoints(self.workdir / "best", keep=1)) as best:
            best.save(bundle.step, {"params": model}, metadata={"config": to_dict(bundle.experiment)},
                      files={TOKENIZER_FILE: bundle.tokenizer.to_bytes()})
        bundle = Bundle(model=model, tokenizer=bundle.tokenizer, config=bundle.config, step=bundle.step)
        found = self.measure(bundle, self._examples[1])
        return (f"the best, of step {bundle.step}, orders {found['accuracy']:.1%} of the pairs held out as they are; "
                f"mean margin {found['margin']:.3f}, calibration error {found['calibration_error']:.3f}")

    def next_command(self, workdir: str) -> str:
        """Train a policy by this reward."""
        return f"transformer-jax ppo --config.rl.reward={workdir} --model=... --workdir=... --config.data.path=PROMPTS"


def _scores(model: RewardModel, rankings: Rankings) -> np.ndarray:
    """``[N, K]``."""
    rows = (x_NKT.reshape(-1, x_NKT.shape[-1]) for x_NKT in (rankings.tokens_NKT, rankings.segment_ids_NKT))
    return score_rows(model, *rows).reshape(rankings.ranks_NK.shape)
