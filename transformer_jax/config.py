"""Frozen, validated, hashable settings of models and experiments."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Self

from transformer_jax.settings import check_choice, check_field_names, check_positive, require

_CHOICES = {
    "family": ("decoder", "encoder", "encoder_decoder", "reward"),
    "positions": ("sinusoidal", "learned", "rope", "alibi", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "activation": ("relu", "gelu", "gelu_tanh", "swiglu"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer.

    ``num_kv_heads``, ``head_dim`` and ``mlp_dim`` left at ``None`` are derived (all heads, ``model_dim //
    num_heads`` and ``4 * model_dim``), and derived anew by :meth:`replace`; so are, in an encoder-decoder,
    ``num_encoder_layers`` and ``num_decoder_layers`` (``num_layers``).

    Attributes:
      family: ``decoder`` (GPT), ``encoder`` (BERT), ``encoder_decoder`` (translation) or ``reward`` (a decoder that
        ends in one number).
      vocab_size: number of token ids; ``None`` only until a tokenizer is known.
      max_len: longest sequence, in tokens.
      positions: ``sinusoidal`` and ``learned`` are added to the embeddings, ``rope`` rotates queries and keys
        (Su et al., 2021), ``alibi`` adds a linear bias (Press et al., 2021).
      activation: ``gelu`` is the exact (erf) one of GPT and BERT, ``gelu_tanh`` that of GPT-2's code;
        ``swiglu`` (Shazeer, 2020) has a gate beside the up projection.
      use_bias: biases in every linear layer and in LayerNorm.
      num_token_types: kinds of tokens with an embedding each, as the two sentences of a pair in BERT; 0: none.
      scale_embeddings: token embeddings start at a standard deviation of 1 / sqrt(model_dim) and are multiplied by
        sqrt(model_dim) (Vaswani et al., 2017, section 3.4).
      use_embedding_norm: a norm after the embeddings, as in BERT.
      use_value_head: a head on the final hidden states that says what reward is to come, for reinforcement learning by
        PPO.
      use_qk_norm: RMSNorm on every query and key head before rotation (Dehghani et al., 2023).
      sliding_window: attend to this many last positions only, the current one included.
      dropout: of embeddings and of what each sub-layer adds; of attention weights too unless
        ``attention_dropout`` says otherwise.
      init_std: standard deviation of the initial weights; under pre-norm, projections into the residual stream are
        scaled by 1 / sqrt(2 * num_layers) (Radford et al., 2019). ``None``: that of Glorot and Bengio (2010),
        sqrt(2 / (in + out)), for each matrix.
      dtype: type of activations and matrix products; softmax, norms and losses are float32 always.
      remat: what the backward pass recomputes: ``none``, all but the matrix products (``dots``), or ``full``.
      unroll: how many layers one iteration of the layer scan holds; ``num_layers`` unrolls the loop.
    """

    family: str = "decoder"
    vocab_size: int | None = None
    max_len: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    model_dim: int = 768
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    num_encoder_layers: int | None = None
    num_decoder_layers: int | None = None
    num_token_types: int = 0
    positions: str = "learned"
    norm: str = "layernorm"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    use_bias: bool = True
    use_embedding_norm: bool = False
    use_qk_norm: bool = False
    use_value_head: bool = False
    scale_embeddings: bool = False
    tie_embeddings: bool = True
    rope_base: float = 10_000.0
    sliding_window: int | None = None
    dropout: float = 0.0
    attention_dropout: float | None = None
    init_std: float | None = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        check_positive(self, "max_len", "num_layers", "num_heads", "model_dim", "unroll")
        for field, choices in _CHOICES.items():
            check_choice(self, field, choices)
        derived = self.derived()
        for field, value in derived.items():
            if getattr(self, field) is None:
                if field == "head_dim":
                    require(self.model_dim % self.num_heads == 0,
                             f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; "
                             "change one of them or set head_dim")
                object.__setattr__(self, field, value)
        check_positive(self, *derived)
        if self.vocab_size is not None:
            check_positive(self, "vocab_size")
        if self.sliding_window is not None:
            check_positive(self, "sliding_window")
        require(self.num_heads % self.num_kv_heads == 0,
                 f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        require(self.positions != "rope" or self.head_dim % 2 == 0,
                 f"positions='rope' rotates pairs: head_dim={self.head_dim} must be even")
        require(self.positions != "sinusoidal" or self.model_dim % 2 == 0,
                 f"positions='sinusoidal' needs an even model_dim, not {self.model_dim}")
        for field in ("dropout", "attention_dropout"):
            value = getattr(self, field)
            require(value is None or 0.0 <= value < 1.0, f"{field}={value} must be in [0, 1)")
        for field in ("norm_epsilon", "init_std", "rope_base"):
            value = getattr(self, field)
            require(value is None or value > 0, f"{field}={value} must be positive")
        require(self.family == "decoder" or not self.use_value_head,
                f"use_value_head is for family='decoder', not {self.family!r}")
        require(self.num_token_types >= 0, f"num_token_types={self.num_token_types} must not be negative")
        for field in ("num_encoder_layers", "num_decoder_layers"):
            require(self.family == "encoder_decoder" or getattr(self, field) is None,
                     f"{field} belongs to family='encoder_decoder'; family={self.family!r} has num_layers")

    def derived(self) -> dict[str, int]:
        """What the fields that may be left at ``None`` are derived as."""
        values = {"num_kv_heads": self.num_heads, "head_dim": self.model_dim // self.num_heads,
                  "mlp_dim": 4 * self.model_dim}
        if self.family == "encoder_decoder":
            values |= {"num_encoder_layers": self.num_layers, "num_decoder_layers": self.num_layers}
        return values

    def replace(self, **changes: Any) -> Self:
        """A validated copy with the given fields changed; derived fields follow unless given."""
        check_field_names(type(self), changes)
        for field, value in self.derived().items():
            if getattr(self, field) == value:
                changes.setdefault(field, None)
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids.

    Attributes:
      kind: ``char``, ``word``, ``bpe`` or ``unigram`` (SentencePiece); ignored when ``path`` is given.
      vocab_size: pieces to learn, special tokens included; ``None`` for ``char`` keeps every character.
      path: a trained SentencePiece model to use instead of training one.
      min_frequency: drop learned ``bpe`` pieces that occur less often in the text; above 1 ``vocab_size`` is an upper
        limit.
      chat: add the role tokens that conversations need, ``<|system|>``, ``<|user|>`` and ``<|assistant|>``.
    """

    kind: str = "char"
    vocab_size: int | None = None
    path: str | None = None
    min_frequency: int = 1
    chat: bool = False

    def __post_init__(self):
        check_choice(self, "kind", ("char", "word", "bpe", "unigram"))
        check_positive(self, "min_frequency")
        require(self.min_frequency == 1 or self.kind == "bpe",
                 f"data.tokenizer.min_frequency={self.min_frequency} is for kind 'bpe', not {self.kind!r}")
        require(self.vocab_size is not None or self.path is not None or self.kind == "char",
                 f"data.tokenizer.kind={self.kind!r} needs data.tokenizer.vocab_size")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from: exactly one of ``path``, ``tfds`` (a data set's name) and ``generated``.

    Attributes:
      path: a text file, a glob or JSONL; for pairs of sentences ``"SOURCE,TARGET"`` (two aligned files) or a TSV file.
      generated: ``"dates"``: dates in words and their ISO form, made up as needed.
      source: where in the data the source sentences are: the column of a TSV file, the language of a TFDS set.
      target: likewise.
      mask_probability: fraction of the tokens to predict in masked language modelling.
      mask_whole_words: mask words rather than tokens.
      validation_fraction: the last part of the tokens, held out.
      validation_path: a file to validate on instead; then nothing is held out of ``path``.
      cache_dir: where token files live; ``None``: inside the workdir.
    """

    path: str | None = None
    tfds: str | None = None
    generated: str | None = None
    source: str | None = None
    target: str | None = None
    text_key: str = "text"
    validation_path: str | None = None
    validation_fraction: float = 0.1
    mask_probability: float = 0.15
    mask_whole_words: bool = False
    cache_dir: str | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self):
        require(0.0 < self.validation_fraction < 1.0,
                 f"data.validation_fraction={self.validation_fraction} must be in (0, 1)")
        require(0.0 < self.mask_probability < 1.0, f"data.mask_probability={self.mask_probability} must be in (0, 1)")
        require(self.generated in (None, "dates"), f"data.generated={self.generated!r} is not 'dates'")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule.

    Attributes:
      schedule: ``constant``, ``linear``, ``cosine``, ``noam`` (inverse square root) or ``wsd``
        (warmup, stable, decay).
      end_lr: what the rate has decayed to after the last step, as a fraction of ``peak_lr``.
      decay_fraction: the last part of the steps that ``wsd`` decays over.
      weight_decay: on matrices and embeddings, never on biases and norms.
      muon_lr: learning rate of the hidden matrices under ``muon``; everything else has ``peak_lr`` (AdamW).
      clip_norm: clip gradients to this global norm; ``None``: never.
      accumulation: microbatches a step; the batch is split, the gradient is that of the whole batch.
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

    def __post_init__(self):
        check_choice(self, "name", ("adamw", "adafactor", "lion", "sgd", "muon"))
        check_choice(self, "schedule", ("constant", "linear", "cosine", "noam", "wsd"))
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
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        require(0 <= self.label_smoothing < 1, f"loss.label_smoothing={self.label_smoothing} must be in [0, 1)")
        require(self.z_loss >= 0, f"loss.z_loss={self.z_loss} must not be negative")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning (Hu et al., 2021): kernels become W + alpha / rank * A B.

    Attributes:
      rank: columns of A and rows of B; 0: no adapters, every weight is trained.
      alpha: scale of what is added, times ``rank``.
      dropout: of the inputs of A beside a linear map, token by token.
      weights: regular expression, searched in the paths of linear maps and embedding tables, such as
        ``"attention.(query|value)|embeddings.token"``: those that get an adapter.
      whole: the same, searched in the paths of all weights: those that are trained themselves, as a new head is.
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
    """Save every so many steps (and at the end, and on Ctrl-C); keep the last few and the best."""

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        check_positive(self, "every", "keep")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate every so many steps on at most ``max_batches`` batches; ``None``: the whole held-out part."""

    every: int = 250
    batch_size: int = 64
    max_batches: int | None = None

    def __post_init__(self):
        check_positive(self, "every", "batch_size")
        if self.max_batches is not None:
            check_positive(self, "max_batches")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Print a sample every so many steps (0: never); ``growing``: at that step, then at twice the step each time."""

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
    """What else a run writes down: every so many steps what each attention head does on a text held out (0: never)."""

    attention_every: int = 0

    def __post_init__(self):
        require(self.attention_every >= 0, f"metrics.attention_every={self.attention_every} must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; ``data=None`` takes all that the others leave."""

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        check_positive(self, "fsdp", "tensor")
        if self.data is not None:
            check_positive(self, "data")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimisation; ``beta`` is the reward of a nat, and so the leash to the reference."""

    beta: float = 0.1

    def __post_init__(self):
        require(self.beta > 0, f"dpo.beta={self.beta} must be positive")


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig:
    """Reinforcement learning of a policy that responds to prompts.

    A rollout is responses to some prompts; each epoch goes through them once in minibatches of ``batch_size``.

    Attributes:
      algorithm: ``ppo`` (a value head tells what was to be expected) or ``grpo`` (the other responses to a prompt do).
      reward: the workdir of a reward model, or ``module:function`` from texts to numbers.
      num_prompts: of a rollout.
      num_samples: responses to each prompt.
      max_new_tokens: longest response.
      epochs: how often a rollout is gone through.
      clip: how far from 1 the ratio of the probabilities now and then still gains.
      value_clip: likewise for values, in units of reward.
      value_coefficient: weight of the value loss.
      entropy_coefficient: weight of the entropy bonus.
      discount: of the reward of the next token; gamma.
      trace_decay: lambda of generalised advantage estimation.
      kl_coefficient: reward lost by a nat of distance from the model that training began with.
      kl_target: change ``kl_coefficient`` so that the distance comes to so many nats a response; ``None``: keep it.
      max_step_kl: leave a rollout for the next when the policy is so many nats a token away from that which drew it;
        ``None``: never.
    """

    algorithm: str = "ppo"
    reward: str | None = None
    num_prompts: int = 64
    num_samples: int = 1
    max_new_tokens: int = 48
    epochs: int = 4
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    discount: float = 1.0
    trace_decay: float = 0.95
    kl_coefficient: float = 0.05
    kl_target: float | None = None
    max_step_kl: float | None = None

    def __post_init__(self):
        check_choice(self, "algorithm", ("ppo", "grpo"))
        check_positive(self, "num_prompts", "num_samples", "max_new_tokens", "epochs")
        require(self.algorithm == "ppo" or self.num_samples > 1,
                "rl.algorithm='grpo' compares the responses to a prompt: rl.num_samples must be at least 2")
        for field in ("clip", "value_clip", "kl_target", "max_step_kl"):
            value = getattr(self, field)
            require(value is None or value > 0, f"rl.{field}={value} must be positive")
        for field in ("value_coefficient", "entropy_coefficient", "kl_coefficient"):
            require(getattr(self, field) >= 0, f"rl.{field}={getattr(self, field)} must not be negative")
        for field in ("discount", "trace_decay"):
            require(0 <= getattr(self, field) <= 1, f"rl.{field}={getattr(self, field)} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides a training run; the same config and seed give the same losses."""

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

    def replace(self, **changes: Any) -> Self:
        """A validated copy with the given top-level fields changed."""
        check_field_names(type(self), changes)
        return dataclasses.replace(self, **changes)
