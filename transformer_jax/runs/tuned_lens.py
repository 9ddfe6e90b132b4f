"""Training of a tuned lens with the usual training loop."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Int

from transformer_jax.config import CheckpointConfig, ExperimentConfig, OptimConfig
from transformer_jax.data import make_batches
from transformer_jax.inspection.parts import checked_tokens, stack_of
from transformer_jax.inspection.translators import Translators, translation_losses
from transformer_jax.models.functional import Model
from transformer_jax.sharding import make_mesh
from transformer_jax.training.session import run_training
from transformer_jax.training.step import Batch, Sums


class _Rows:
    """Rows of tokens, as a source of batches."""

    def __init__(self, tokens_NT: np.ndarray):
        self._tokens_NT = tokens_NT

    def __len__(self) -> int:
        return len(self._tokens_NT)

    def __getitem__(self, indices_B: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"tokens": self._tokens_NT[indices_B]}


def train_tuned_lens(model: Model, tokens_NT: Int[np.ndarray | Array, "N T"], *, steps: int = 250,
                     batch_size: int = 8, peak_lr: float = 1e-2, seed: int = 0,
                     workdir: str | pathlib.Path | None = None) -> Translators:
    """Trains a tuned lens: for each layer, an affine map after which the stream predicts what the
    model predicts.

    The loss is the sum over the layers of the Kullback-Leibler divergence from the predictions of
    the model. The weights of the model do not change.

    Source: Belrose et al. (2023).

    Args:
      model: a decoder or an encoder.
      tokens_NT: token ids to train on, rows without padding.
      steps: the number of steps.
      batch_size: the number of rows in a step.
      peak_lr: the largest learning rate of AdamW, which decays to a tenth of it.
      seed: the seed of the order of the rows.
      workdir: the directory for checkpoints and metrics. The same call resumes a stopped run.
        ``None`` means that nothing is written.

    Returns:
      The lens. ``tj.inspection.logit_lens(model, lens(trace))`` reads through it.

    Raises:
      ValueError: if the model reads sources, or if the tokens are not token ids of the model.
      Interrupted: if a signal stops a run with a workdir, after its state is saved.
    """
    reads_sources = getattr(model, "reads_sources", False)
    if reads_sources:
        raise ValueError(f"a {type(model).__name__} reads pairs; a tuned lens is trained for a decoder or an encoder")
    rows: Any = checked_tokens(model, tokens_NT, "self")[0]  # pyright: ignore[reportArgumentType]
    config = ExperimentConfig(
        seed=seed, steps=steps, batch_size=batch_size, model=model.config,
        checkpoint=CheckpointConfig(every=max(steps // 5, 1), keep=1),
        optim=OptimConfig(peak_lr=peak_lr, weight_decay=0.0, warmup_steps=min(10, steps - 1)))
    num_layers = stack_of(model, "self").num_layers  # pyright: ignore[reportArgumentType]

    def make_lens(key: jax.Array) -> dict[str, Translators]:
        return {"lens": Translators(num_layers, model.config.model_dim)}

    def loss(model: Any, params: dict[str, Translators], batch: Batch, key: jax.Array | None = None) -> Sums:
        losses_LBT = translation_losses(model, params["lens"], (batch["tokens"],))
        return losses_LBT.sum(), jax.numpy.float32(losses_LBT[0].size)

    batches = make_batches(_Rows(np.asarray(rows)), batch_size=batch_size, seed=seed)
    state = run_training(config, workdir, make_params=make_lens, loss_fn=jax.tree_util.Partial(loss, model),
                         batches=batches, mesh=make_mesh(devices=jax.devices()[:1]))
    return state.params["lens"]
