"""How a model is trained: optimizer, loss, adapters, mesh, and what a run does beside."""

from __future__ import annotations

import dataclasses
import re

from transformer_jax.settings import check_choice, check_positive, require


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule.

    Attributes:
      name: the optimizer.
      peak_lr: the highest learning rate.
      warmup_steps: steps over which the rate rises from zero to ``peak_lr``.
      beta1: decay of the mean of the gradients.
      beta2: decay of the mean of their squares.
      epsilon: added to the root of the mean square.
      schedule: ``constant``, ``linear``, ``cosine``, ``noam`` (inverse square root) or ``wsd``
        (warmup, stable, decay).
      end_lr: what the rate has decayed to after the last step, as a fraction of ``peak_lr``.
      decay_fraction: the last part of the steps that ``wsd`` decays over.
      weight_decay: on matrices and embeddings, never on biases and norms.
      muon_lr: learning rate of the hidden matrices under ``muon``; everything else has ``peak_lr``
        (AdamW).
      clip_norm: clip gradients to this global norm; ``None``: never.
      accumulation: microbatches a step; the batch is split, the gradient is that of the whole
        batch.
      gradient_dtype: ``float32`` or ``bfloat16``: the devices of ``mesh.data``, the only axis then,
        sum their gradients in this type, once a step. ``None``: where the compiler sums them, in
        the type of the products.
    """

    name: str = "adamw"
    peak_lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    end_lr: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    muon_lr: float = 0.02
    clip_norm: float | None = 1.0
    accumulation: int = 1
    gradient_dtype: str | None = None

    def __post_init__(self):
        check_choice(self, "name", ("adamw", "adafactor", "lion", "sgd", "muon"))
        check_choice(self, "schedule", ("constant", "linear", "cosine", "noam", "wsd"))
        if self.gradient_dtype is not None:
            check_choice(self, "gradient_dtype", ("float32", "bfloat16"))
        check_positive(self, "accumulation")
        require(self.peak_lr > 0, f"optim.peak_lr={self.peak_lr} must be positive")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} must not be negative")
        require(self.schedule != "noam" or self.warmup_steps > 0, "optim.schedule='noam' needs optim.warmup_steps > 0")
        require(0 <= self.end_lr <= 1, f"optim.end_lr={self.end_lr} is a fraction of peak_lr, in [0, 1]")
        require(0 < self.decay_fraction <= 1, f"optim.decay_fraction={self.decay_fraction} must be in (0, 1]")
        require(self.clip_norm is None or self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} must be positive")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross entropy.

    Attributes:
      label_smoothing: mass spread evenly over the vocabulary (Szegedy et al., 2016).
      z_loss: weight of log(Z)^2 (de Brebisson and Vincent, 2016).
      most_logits: a batch with this many logits or more never holds them: the loss walks the
        vocabulary in chunks, which costs one more product in the backward pass.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    most_logits: int = 2**26

    def __post_init__(self):
        require(0 <= self.label_smoothing < 1, f"loss.label_smoothing={self.label_smoothing} must be in [0, 1)")
        require(self.z_loss >= 0, f"loss.z_loss={self.z_loss} must not be negative")
        require(self.most_logits >= 0, f"loss.most_logits={self.most_logits} must not be negative")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning (Hu et al., 2021): kernels become W + alpha /
    rank * A B.

    Attributes:
      rank: columns of A and rows of B; 0: no adapters, every weight is trained.
      alpha: scale of what is added, times ``rank``.
      dropout: of the inputs of A beside a linear map, token by token.
      weights: regular expression, searched in the paths of linear maps and embedding tables, such
        as ``"attention.(query|value)|embeddings.token"``: those that get an adapter.
      whole: the same, searched in the paths of all weights: those that are trained themselves, as a
        new head is.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    weights: str = "attention|mlp"
    whole: str | None = None

    def __post_init__(self):
        require(self.rank >= 0, f"lora.rank={self.rank} must not be negative")
        require(self.alpha > 0, f"lora.alpha={self.alpha} must be positive")
        require(0.0 <= self.dropout < 1.0, f"lora.dropout={self.dropout} must be in [0, 1)")
        for field in ("weights", "whole"):
            try:
                re.compile(getattr(self, field) or "")
            except re.error as error:
                raise ValueError(f"lora.{field}={getattr(self, field)!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves: also at the end, on Ctrl-C, and the best of all evaluations.

    Attributes:
      every: steps between two checkpoints.
      keep: how many of the last checkpoints stay, beside the best.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        check_positive(self, "every", "keep")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and on how much a run evaluates.

    Attributes:
      every: steps between two evaluations.
      batch_size: rows of a batch.
      max_batches: at most so many batches; ``None``: the whole held-out part.
    """

    every: int = 250
    batch_size: int = 64
    max_batches: int | None = None

    def __post_init__(self):
        check_positive(self, "every", "batch_size")
        if self.max_batches is not None:
            check_positive(self, "max_batches")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """When a run prints a sample, and how it is drawn.

    Attributes:
      every: steps between two samples; 0: never.
      growing: at the step ``every``, then at twice the step each time.
      prompt: the text to continue.
      max_new_tokens: longest sample, in tokens.
      temperature: 0 is greedy.
      top_k: draw among the k most probable tokens; 0: all.
    """

    every: int = 0
    growing: bool = False
    prompt: str = "\n"
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0

    def __post_init__(self):
        require(self.every >= 0, f"sample.every={self.every} must not be negative")
        check_positive(self, "max_new_tokens")

    def due(self, step: int) -> bool:
        """Whether a sample is due at this step."""
        if not self.every or step % self.every:
            return False
        turn = step // self.every
        return not self.growing or turn & (turn - 1) == 0


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """What else a run writes down.

    Attributes:
      attention_every: steps between two records of what each attention head does on held-out text;
        0: never.
    """

    attention_every: int = 0

    def __post_init__(self):
        require(self.attention_every >= 0, f"metrics.attention_every={self.attention_every} must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis.

    Attributes:
      data: rows of a batch; ``None`` takes all devices that the others leave.
      fsdp: rows of a batch too, and the weights and optimizer state, which each layer puts together
        as it needs them.
      tensor: heads, hidden units and vocabulary.
      sequence: tokens of a row, for long contexts; each layer puts keys and values together.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        check_positive(self, "fsdp", "tensor", "sequence")
        if self.data is not None:
            check_positive(self, "data")
