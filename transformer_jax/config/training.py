"""Settings of training: optimizer, loss, adapters, checkpoints, evaluation and samples."""

from __future__ import annotations

import dataclasses
import re

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer and of the learning rate schedule.

    Attributes:
      name: The optimizer: ``adamw``, ``adafactor``, ``lion``, ``sgd`` or ``muon``.
      peak_lr: The highest learning rate.
      schedule: ``constant``, ``linear``, ``cosine``, ``noam`` (inverse square root) or ``wsd``
        (warmup, stable, decay).
      warmup_steps: Steps during which the learning rate rises from zero to ``peak_lr``.
      end_lr: The learning rate after the last step, as a fraction of ``peak_lr``.
      decay_fraction: The fraction of the steps, at the end, in which ``wsd`` decays the rate.
      weight_decay: The weight decay of matrices and embeddings. Biases and norms have none.
      layer_weight_decay: The weight decay of the matrices of each layer, one number for each, in
        place of ``weight_decay``. Only with ``adamw``. Empty means ``weight_decay`` for all.
      beta1: Decay rate of the mean of the gradients.
      beta2: Decay rate of the mean of the squared gradients.
      epsilon: The value added to the root of the mean square.
      muon_lr: The learning rate of the hidden matrices with ``muon``. All other weights use AdamW
        with ``peak_lr``.
      clip_norm: Gradients are clipped to this global norm. ``None`` disables clipping.
      accumulation: Number of microbatches in a step. The batch is split into this many parts, and
        the gradient is that of the whole batch.
      gradient_dtype: ``float32`` or ``bfloat16``: the type in which the devices of ``mesh.data``
        sum their gradients, once in each step. No other mesh axis may be used then. With ``None``,
        the compiler decides where to sum them, in the type of the matrix products.
    """

    name: str = "adamw"
    peak_lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    end_lr: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    layer_weight_decay: tuple[float, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    muon_lr: float = 0.02
    clip_norm: float | None = 1.0
    accumulation: int = 1
    gradient_dtype: str | None = None

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "name", ("adamw", "adafactor", "lion", "sgd", "muon"))
        check_choice(self, "schedule", ("constant", "linear", "cosine", "noam", "wsd"))
        if self.gradient_dtype is not None:
            check_choice(self, "gradient_dtype", ("float32", "bfloat16"))
        require(all(isinstance(decay, int | float) and 0 <= decay <= 1e6 for decay in self.layer_weight_decay),
                f"optim.layer_weight_decay={self.layer_weight_decay} must be numbers that are not negative")
        require(not self.layer_weight_decay or self.name == "adamw",
                f"optim.layer_weight_decay={self.layer_weight_decay} needs optim.name='adamw', not {self.name!r}")
        require(self.schedule != "noam" or self.warmup_steps > 0, "optim.schedule='noam' needs optim.warmup_steps > 0")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the loss, in addition to the cross entropy.

    Attributes:
      label_smoothing: The probability mass that is spread evenly over the vocabulary (Szegedy et
        al., 2016).
      z_loss: Weight of log(Z)^2 (de Brebisson and Vincent, 2016).
      most_logits: If a batch has this many logits or more, they are never materialized together.
        The loss is computed in chunks of the vocabulary, which costs one more matrix product in the
        backward pass.
      ablated_heads: Heads of self-attention whose output is zero while the model is trained and
        evaluated, written as ``"LAYER.HEAD"`` and counted from 0, such as ``("1.0", "1.3")``. Their
        output weights get no gradient. A checkpoint keeps these weights, and the model that training
        returns has zeros in their place.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    most_logits: int = 2**26
    ablated_heads: tuple[str, ...] = ()

    def __post_init__(self):
        check_fields(self)
        for head in self.ablated_heads:
            require(re.fullmatch(r"\d+\.\d+", str(head)) is not None,
                    f"loss.ablated_heads has {head!r}; expected 'LAYER.HEAD', such as '1.0'")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning (Hu et al., 2021).

    A kernel W becomes W + alpha / rank * A B.

    Attributes:
      rank: Number of columns of A and of rows of B. With 0 there are no adapters, and every weight
        is trained.
      alpha: The scale of the product A B, multiplied by ``rank``.
      dropout: Dropout rate of the inputs of A in a linear layer, drawn for each token.
      weights: A regular expression that is searched in the paths of linear layers and embedding
        tables, such as ``"attention.(query|value)|embeddings.token"``. Those that match get an
        adapter.
      whole: A regular expression that is searched in the paths of all weights. Those that match are
        trained in full, such as a new head.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    weights: str = "attention|mlp"
    whole: str | None = None

    def __post_init__(self):
        check_fields(self)
        for field in ("weights", "whole"):
            try:
                re.compile(getattr(self, field) or "")
            except re.error as error:
                raise ValueError(f"lora.{field}={getattr(self, field)!r} is not a valid regular expression: "
                                 f"{error}") from error


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves checkpoints.

    A run also saves a checkpoint at its end, on Ctrl-C, and for the best of all evaluations.

    Attributes:
      every: Steps between two checkpoints.
      keep: How many of the last checkpoints are kept, in addition to the best one.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and on how much data a run evaluates the model.

    Attributes:
      every: Steps between two evaluations.
      batch_size: Rows of an evaluation batch.
      max_batches: The largest number of batches. ``None`` uses the whole held-out data.
    """

    every: int = 250
    batch_size: int = 64
    max_batches: int | None = None

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """When a run prints a sample, and how it draws the sample.

    Attributes:
      every: Steps between two samples. 0 disables samples.
      growing: Whether the interval doubles each time: the samples come at the steps ``every``, ``2
        * every``, ``4 * every`` and so on.
      at_start: Whether the run also prints a sample before the first step, when the weights are
        still random.
      prompt: The text to continue.
      max_new_tokens: The longest sample, in tokens.
      temperature: The sampling temperature. 0 is greedy decoding.
      top_k: Sample from the k most probable tokens. 0 samples from all tokens.
    """

    every: int = 0
    growing: bool = False
    at_start: bool = False
    prompt: str = "\n"
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0

    def __post_init__(self):
        check_fields(self)

    def due(self, step: int) -> bool:
        """Tells whether the run prints a sample at this step.

        Args:
          step: The number of updates so far.

        Returns:
          True if a sample is due.
        """
        if not self.every or step % self.every:
            return False
        interval = step // self.every
        return not self.growing or interval & (interval - 1) == 0  # a power of 2


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Further metrics that a run records.

    Attributes:
      attention_every: Steps between two records of the attention patterns of each head on held-out
        text. 0 disables them.
    """

    attention_every: int = 0

    def __post_init__(self):
        check_fields(self)
