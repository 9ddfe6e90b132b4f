"""Reward modelling: a trained decoder gets a head that outputs one number, and learns which of
several answers is preferred."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence

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
from transformer_jax.data import Comparison, read_comparisons
from transformer_jax.data.conversations import AnyTokenizer
from transformer_jax.data.examples import as_comparison
from transformer_jax.models.heads import RewardModel
from transformer_jax.settings import to_dict
from transformer_jax.tasks.answering import AnsweringTask, answering
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import TOKENIZER_FILE, Bundle, load
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.step import Batch, Sums


class RewardModeling(AnsweringTask):
    """Reward modelling on ranked answers. The loss is the negative log-likelihood of the model of
    Bradley and Terry (1952), as in Ouyang et al. (2022)."""

    name = "reward"
    family = "reward"
    examples = "comparisons"
    read_file = staticmethod(read_comparisons)
    read_example = staticmethod(as_comparison)

    def start_from(self, base: Bundle) -> Bundle:
        """Makes a reward model that has the weights of the base and a new head."""
        decoder, tokenizer = answering(base)
        model = RewardModel.of(decoder, key=jax.random.key(self.config.seed))
        return Bundle(model=model, tokenizer=tokenizer, config=model.config)

    def prepare(self, examples: Sequence[Comparison], held_out: Sequence[Comparison], tokenizer: AnyTokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the comparisons. It stores nothing in ``cache_dir``, because there are only a
        few comparisons."""
        self._examples = examples, held_out
        train, validation = (Rankings.build(part, tokenizer, self.config.model.max_len)
                             for part in (examples, held_out))
        return TaskData(train=train, contents=[train.digest, validation.digest],
                        summary=f"{len(train):,} comparisons, {len(validation):,} held out",
                        evaluation_batches=validation.batches, shown=(held_out[0], validation))

    def loss(self, model: RewardModel, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the negative log-likelihood of the rankings, in nats per pair."""
        return reward_loss(model, batch, key)

    def show(self, model: RewardModel, step: int, data: TaskData) -> str:
        """Returns the scores of the answers to the first held-out prompt."""
        comparison, validation = data.shown
        scores = score_rows(model, validation.tokens_NKT[0], validation.segment_ids_NKT[0], batch_size=8)
        lines = [f"{score:8.3f}  {text}" for score, text in zip(scores, comparison.responses, strict=False)]
        return "\n".join([comparison.prompt[-1].content, *lines])

    def measure(self, bundle: Bundle, data: str | Sequence[Comparison] | None = None, *,
                batch_size: int = 32) -> dict[str, float]:
        """Measures how often the model prefers the better answer of a pair, by which margin, and
        how well its preferences are calibrated.

        Args:
          bundle: A trained reward model with its tokenizer.
          data: Comparisons, or a file of them. ``None`` means the held-out part of the training
            data.
          batch_size: Ignored, because the rows of a comparison are scored together.

        Returns:
          ``accuracy`` in [0, 1], ``margin`` in nats, ``calibration_error`` in [0, 1], and
          ``comparisons``, the number of comparisons.

        Raises:
          ValueError: If the file or an example cannot be read, or the model is not a reward model.
        """
        model, tokenizer = _reward_model(bundle)
        if isinstance(data, (str, pathlib.Path)):
            data = read_comparisons(data)
        elif data is None:
            _, data = self.read()
        else:
            data = self._checked(data)
        rankings = Rankings.build(data, tokenizer, bundle.config.max_len)
        margins = pair_margins(_scores(model, rankings), rankings.ranks_NK)
        return {"accuracy": float((0.5 + 0.5 * np.sign(margins)).mean()), "margin": float(margins.mean()),
                "calibration_error": expected_calibration_error(margins), "comparisons": len(rankings)}

    def finish(self) -> str:
        """Stores the mean and the standard deviation of the scores in the best checkpoint, and
        returns a line with its results on the held-out comparisons."""
        bundle = load(self.run_directory, step="best")
        model, tokenizer = _reward_model(bundle)
        train = Rankings.build(self._examples[0], tokenizer, bundle.config.max_len)
        model = normalized(model, _scores(model, train)[train.ranks_NK > 0])
        with contextlib.closing(Checkpoints(self.run_directory / "best", keep=1)) as best:
            best.save(bundle.step, {"params": model}, metadata={"config": to_dict(bundle.experiment)},
                      files={TOKENIZER_FILE: tokenizer.to_bytes()})
        bundle = Bundle(model=model, tokenizer=tokenizer, config=bundle.config, step=bundle.step)
        found = self.measure(bundle, self._examples[1])
        return (f"the best checkpoint, of step {bundle.step}, prefers the better answer in "
                f"{found['accuracy']:.1%} of the held-out pairs; mean margin {found['margin']:.3f}, calibration error "
                f"{found['calibration_error']:.3f}")

    def next_command(self, workdir: str) -> str:
        """Returns the command that trains a policy with this reward model."""
        return f"transformer-jax ppo --config.rl.reward={workdir} --model=... --workdir=... --config.data.path=PROMPTS"


def _scores(model: RewardModel, rankings: Rankings) -> np.ndarray:
    """Returns the scores of all answers, ``[N, K]``."""
    tokens_NT, segment_ids_NT = (x_NKT.reshape(-1, x_NKT.shape[-1])
                                 for x_NKT in (rankings.tokens_NKT, rankings.segment_ids_NKT))
    return score_rows(model, tokens_NT, segment_ids_NT).reshape(rankings.ranks_NK.shape)


def _reward_model(bundle: Bundle) -> tuple[RewardModel, AnyTokenizer]:
    """Returns the reward model and its tokenizer, or raises ValueError if either is missing."""
    if not isinstance(bundle.model, RewardModel) or bundle.tokenizer is None:
        raise ValueError(f"expected a reward model with its tokenizer, got a model of family {bundle.config.family}"
                         f"{'' if bundle.tokenizer is not None else ' without a tokenizer'}")
    return bundle.model, bundle.tokenizer
