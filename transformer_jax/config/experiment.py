"""Everything that decides a run."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from transformer_jax.config.alignment import PreferenceConfig, ReinforcementConfig
from transformer_jax.config.data import DataConfig
from transformer_jax.config.model import ModelConfig
from transformer_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    MetricsConfig,
    OptimConfig,
    SampleConfig,
)
from transformer_jax.settings import check_field_names, check_positive, require


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides a training run; the same config and seed give the same losses.

    Attributes:
      task: what the model learns, a name of ``tj.tasks``; ``None``: the first task of the model's
        family, which is ``language_model``, ``masked_language_model``, ``translation`` or
        ``reward``.
      seed: of the weights, the order of the data, dropout and samples.
      steps: updates of the weights.
      batch_size: rows a step, over all devices.
      log_every: steps between two lines of metrics.
    """

    task: str | None = None
    seed: int = 0
    steps: int = 2000
    batch_size: int = 12
    log_every: int = 10
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    metrics: MetricsConfig = MetricsConfig()
    mesh: MeshConfig = MeshConfig()
    dpo: PreferenceConfig = PreferenceConfig()
    rl: ReinforcementConfig = ReinforcementConfig()

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "log_every")
        require(self.batch_size % self.optim.accumulation == 0,
                 f"batch_size={self.batch_size} does not split into optim.accumulation={self.optim.accumulation} parts")
        require(self.optim.gradient_dtype is None or self.mesh.fsdp == self.mesh.tensor == self.mesh.sequence == 1,
                f"optim.gradient_dtype={self.optim.gradient_dtype!r} is for meshes of mesh.data alone, and here are "
                f"fsdp={self.mesh.fsdp}, tensor={self.mesh.tensor}, sequence={self.mesh.sequence}; leave it out")

    def replace(self, **changes: Any) -> Self:
        """A validated copy with the given top-level fields changed."""
        check_field_names(type(self), changes)
        return dataclasses.replace(self, **changes)
