"""Sparse autoencoders and transcoders: features are learned from the activations of a model."""

from __future__ import annotations

import pathlib
from typing import Any, cast

import jax
import numpy as np

from transformer_jax.config.cross_layer_transcoder import CrossLayerTranscoderConfig
from transformer_jax.config.sparse_autoencoder import SparseAutoencoderConfig
from transformer_jax.features.measuring import measure
from transformer_jax.features.objective import FeatureModel, after_update, objective
from transformer_jax.features.sources import ActivationSource, Selected, check_source
from transformer_jax.settings import require
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.step import AfterUpdate, Batch, Sums


class SparseAutoencoding(Task):
    """A sparse autoencoder, a transcoder or a cross-layer transcoder on activations that
    ``tj.inspection.collect`` wrote, or on batches of ``tj.inspection.ActivationBatches``. A row of a
    batch is one token."""

    name = "sparse_autoencoder"
    family = "sparse_autoencoder"
    reads_text = False

    def read(self, data: ActivationSource | None = None, held_out: ActivationSource | None = None) -> tuple[Any, Any]:
        """Takes the activations; the last ``data.validation_fraction`` of the rows is held out."""
        if data is None or not hasattr(data, "dims"):
            raise ValueError(f"the task {self.name!r} learns from activations; pass what tj.inspection.collect "
                             "returns, a tj.inspection.ActivationBatches, or tj.features.Rows")
        for given in (data, held_out):
            if given is not None:
                check_source(self._settings, given.dims)
        names = tuple(self._settings.inputs | self._settings.outputs)
        if held_out is not None:
            return Selected(data, names, range(len(data))), Selected(held_out, names, range(len(held_out)))
        cut = int(len(data) * (1 - self.config.data.validation_fraction))
        require(0 < cut < len(data), f"data.validation_fraction={self.config.data.validation_fraction} of {len(data)} "
                "rows leaves a part empty; pass more activations, or held_out=...")
        return Selected(data, names, range(cut)), Selected(data, names, range(cut, len(data)))

    def prepare(self, examples: Selected, held_out: Selected, tokenizer: Any, cache_dir: pathlib.Path) -> TaskData:
        """Passes the activations on."""
        return TaskData(train=examples, contents=[*examples.contents, *held_out.contents], shown=held_out,
                        summary=f"{len(examples):,} tokens to train on, {len(held_out):,} held out")

    def loss(self, model: FeatureModel, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the squared error and the penalties, in the units of the weights."""
        return objective(model, batch, key)

    def after_update(self) -> AfterUpdate:
        """Returns the function that keeps the rows of the decoder at length 1, and counts dead
        features."""
        return after_update

    def evaluate(self, model: FeatureModel, data: TaskData) -> dict[str, float] | None:
        """Measures the model on the held-out rows. The validation loss is the unexplained
        variance."""
        if data.shown is None:
            return None
        found = measure(model, data.shown, batch_size=self.config.batch_size,
                        max_batches=self.config.eval.max_batches)
        return {"validation_loss": 1 - found.explained_variance,
                **{f"validation_{name}": value for name, value in found.numbers().items()}}

    def measure(self, bundle: Bundle, data: Any = None, *, batch_size: int = 4096) -> dict[str, float]:
        """Measures a trained model on activations.

        Args:
          bundle: The autoencoder or transcoder.
          data: The activations.
          batch_size: Rows of a batch.

        Returns:
          ``explained_variance``, ``squared_error``, ``l0`` and ``dead``.

        Raises:
          ValueError: If no activations are given, or they do not fit the model.
        """
        if data is None:
            raise ValueError("no activations are given; pass what tj.inspection.collect returns")
        return measure(cast(Any, bundle.model), data, batch_size=batch_size).numbers()

    def forward(self, model: FeatureModel, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Returns what the model computes from the activations of a batch."""
        del key
        return model(model.read(batch)[0])

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of activations."""
        shapes = {name: jax.ShapeDtypeStruct((batch_size, dim), np.float32)
                  for name, dim in (self._settings.inputs | self._settings.outputs).items()}
        return shapes | {"tokens": jax.ShapeDtypeStruct((batch_size,), np.int32)}

    def next_command(self, workdir: str) -> str:
        """Returns the Python line that loads the model."""
        return f'python -c "import transformer_jax as tj; print(tj.load({workdir!r}).model)"'

    @property
    def _settings(self) -> SparseAutoencoderConfig | CrossLayerTranscoderConfig:
        return cast(Any, self.config.model)
