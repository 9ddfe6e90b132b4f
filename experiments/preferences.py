"""Learning from ranked answers: reward models, and policies by direct preference optimisation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from experiments import answers, runs
from transformer_jax.alignment.dpo import dpo_loss, with_reference
from transformer_jax.alignment.rankings import Rankings
from transformer_jax.alignment.reward import (
    expected_calibration_error,
    normalized,
    pair_margins,
    reward_loss,
    score_rows,
)
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Comparison, Tokenizer
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.settings import to_dict
from transformer_jax.training.bundle import TOKENIZER_FILE, Bundle, load
from transformer_jax.training.checkpoint import Checkpoints, tree_digest
from transformer_jax.training.state import TrainState

Comparisons = Sequence[Comparison]


def train_reward(config: ExperimentConfig, workdir: str | pathlib.Path, base: Bundle, comparisons: Comparisons,
                 held_out: Comparisons) -> dict[str, float]:
    """Trains a reward model that begins as a decoder, or resumes, and normalises the best one.

    Returns:
      What the best one does with the comparisons held out: accuracy, margin and calibration error.

    Raises:
      ValueError: for a base that cannot answer; and as :func:`experiments.runs.run`.
    """
    answers.check_base(base)
    model = RewardModel.of(base.model, key=jax.random.key(config.seed))
    base = Bundle(model=model, tokenizer=base.tokenizer, config=model.config)
    runs.run(config, workdir, (), functools.partial(_reward_task, comparisons, held_out), base)
    return _normalize_best(pathlib.Path(workdir), comparisons, held_out)


def _reward_task(comparisons: Comparisons, held_out: Comparisons, config: ExperimentConfig, tokenizer: Tokenizer,
                 cache_dir: pathlib.Path) -> runs.Task:
    del cache_dir  # comparisons are few, and tokenised anew
    train, validation = (Rankings.build(part, tokenizer, config.model.max_len) for part in (comparisons, held_out))

    def sample(model: RewardModel, step: int) -> None:
        scores = score_rows(model, validation.tokens_NKT[0], validation.segment_ids_NKT[0], batch_size=8)
        lines = [f"{score:8.3f}  {text}" for score, text in zip(scores, held_out[0].responses, strict=False)]
        tqdm.write("\n".join([f"--- step {step} --- {held_out[0].prompt[-1].content}", *lines, ""]))

    return runs.Task(
        train=train, contents=[train.digest, validation.digest],
        summary=f"{len(train):,} comparisons, {len(validation):,} held out", loss_fn=reward_loss, sample=sample,
        evaluate=runs.mean_loss(reward_loss, lambda: validation.batches(config.eval.batch_size),
                                config.eval.max_batches))


def _normalize_best(workdir: pathlib.Path, comparisons: Comparisons, held_out: Comparisons) -> dict[str, float]:
    """Writes the mean and spread of its scores into the best model, and says how good it is."""
    bundle = load(workdir, step="best")
    train, validation = (Rankings.build(part, bundle.tokenizer, bundle.config.max_len)
                         for part in (comparisons, held_out))
    model = normalized(bundle.model, _scores(bundle.model, train)[train.ranks_NK > 0])
    with contextlib.closing(Checkpoints(workdir / "best", keep=1)) as best:
        best.save(bundle.step, {"params": model}, metadata={"config": to_dict(bundle.experiment)},
                  files={TOKENIZER_FILE: bundle.tokenizer.to_bytes()})
    margins = pair_margins(_scores(model, validation), validation.ranks_NK)
    return {"accuracy": float((0.5 + 0.5 * np.sign(margins)).mean()), "margin": float(margins.mean()),
            "calibration_error": expected_calibration_error(margins), "step": bundle.step}


def _scores(model: RewardModel, rankings: Rankings) -> np.ndarray:
    """``[N, K]``."""
    rows = (x_NKT.reshape(-1, x_NKT.shape[-1]) for x_NKT in (rankings.tokens_NKT, rankings.segment_ids_NKT))
    return score_rows(model, *rows).reshape(rankings.ranks_NK.shape)


def train_dpo(config: ExperimentConfig, workdir: str | pathlib.Path, base: Bundle, comparisons: Comparisons,
              held_out: Comparisons) -> TrainState:
    """Trains a policy on comparisons, with the model that it begins as for a reference, or resumes.

    Raises:
      ValueError: for a base that cannot answer; and as :func:`experiments.runs.run`.
    """
    answers.check_base(base)
    return runs.run(config, workdir, (), functools.partial(_dpo_task, comparisons, held_out, base.model,
                                                           pathlib.Path(workdir)), base)


def _dpo_task(comparisons: Comparisons, held_out: Comparisons, reference: Decoder, workdir: pathlib.Path,
              config: ExperimentConfig, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> runs.Task:
    train, validation = (_measured(Rankings.build(part, tokenizer, config.model.max_len), reference, cache_dir,
                                   config.eval.batch_size) for part in (comparisons, held_out))
    loss_fn = dpo_loss(config.dpo)
    show = answers.shower(config, tokenizer, [comparison.prompt for comparison in held_out], workdir)
    show(reference, 0)
    return runs.Task(
        train=train, contents=[train.digest, validation.digest],
        summary=f"{len(train):,} comparisons, {len(validation):,} held out", loss_fn=loss_fn, sample=show,
        evaluate=runs.mean_loss(loss_fn, lambda: validation.batches(config.eval.batch_size), config.eval.max_batches))


def _measured(rankings: Rankings, reference: Decoder, cache_dir: pathlib.Path, batch_size: int) -> Rankings:
    """The rankings with the log-probabilities of the reference, which a run that is resumed reads from a file."""
    path = cache_dir / f"reference-{rankings.digest[:16]}-{tree_digest(reference)[:16]}.npy"
    if path.exists():
        return dataclasses.replace(rankings, reference_logprobs_NK=np.load(path))
    rankings = with_reference(rankings, reference, batch_size)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache_dir, suffix=".partial", delete=False) as file:
        np.save(file, rankings.reference_logprobs_NK)
    pathlib.Path(file.name).replace(path)
    return rankings
