"""The configuration of a whole experiment."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self

from transformer_jax.config.alignment import PreferenceConfig, ReinforcementConfig
from transformer_jax.config.contrastive import ContrastiveConfig
from transformer_jax.config.data import DataConfig
from transformer_jax.config.families import ModelSettings
from transformer_jax.config.mesh import MeshConfig
from transformer_jax.config.model import ModelConfig
from transformer_jax.config.ranges import check_fields
from transformer_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MetricsConfig,
    OptimConfig,
    SampleConfig,
)
from transformer_jax.settings import check_field_names, require

# Editors and type checkers know the fields of a ModelConfig here, and accept the config of another
# family too.
if TYPE_CHECKING:
    _ModelSettings = ModelConfig | Any
else:
    _ModelSettings = ModelSettings


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a training run. The same config and seed give the same losses.

    Attributes:
      task: The name of the training task in ``tj.tasks``. ``None`` uses the first task of the
        model's family: ``language_model``, ``masked_language_model``, ``translation`` or
        ``reward``.
      seed: The seed of the initial weights, the order of the data, dropout and sampling.
      steps: Number of updates of the weights.
      batch_size: Rows of a batch, over all devices.
      log_every: Steps between two lines of metrics.
      model: The model: a ``ModelConfig``, or the config of another family.
      data: The data and the tokenizer.
      loss: The loss.
      lora: Low-rank adapters.
      optim: The optimizer and the learning rate.
      checkpoint: Checkpoints.
      eval: Evaluation during training.
      sample: Samples that the run prints.
      metrics: Further metrics.
      mesh: The device mesh.
      dpo: Direct preference optimization.
      rl: Reinforcement learning.
      contrastive: Sentence embeddings.
    """

    task: str | None = None
    seed: int = 0
    steps: int = 2000
    batch_size: int = 12
    log_every: int = 10
    model: _ModelSettings = ModelConfig()
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
    contrastive: ContrastiveConfig = ContrastiveConfig()

    def __post_init__(self):
        check_fields(self)
        require(self.batch_size % self.optim.accumulation == 0,
                 f"batch_size={self.batch_size} must be a multiple of optim.accumulation={self.optim.accumulation}")
        require(getattr(self.model, "mup", None) is None or self.optim.name == "adamw",
                f"model.mup sets the learning rates of adamw, but optim.name={self.optim.name!r}")
        require(self.optim.gradient_dtype is None or self.mesh == MeshConfig(self.mesh.data),
                f"optim.gradient_dtype={self.optim.gradient_dtype!r} needs a mesh with the axis mesh.data only, but "
                f"mesh={self.mesh}; leave it out")

    @property
    def row_length(self) -> int:
        """The number of tokens in a row of a batch: ``data.max_len``, limited to what the model can
        read."""
        longest = self.model.max_len
        return longest if self.data.max_len is None else min(self.data.max_len, longest)

    def replace(self, **changes: Any) -> Self:
        """Returns a validated copy in which some top-level fields are changed.

        Args:
          **changes: The fields to change and their new values.

        Returns:
          The new config.

        Raises:
          ValueError: If a field does not exist or a value is not valid.
        """
        check_field_names(type(self), changes)
        return dataclasses.replace(self, **changes)
