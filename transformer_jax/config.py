"""Frozen, validated, hashable settings of models and experiments."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

_CHOICES = {
    "family": ("decoder", "encoder", "encoder_decoder"),
    "positions": ("sinusoidal", "learned", "rope", "alibi", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "activation": ("relu", "gelu", "gelu_tanh", "swiglu"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}{hint}")


def _check_positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        integer = isinstance(value, int) and not isinstance(value, bool)
        _require(integer and value > 0, f"{field}={value!r} must be a positive integer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer.

    ``num_kv_heads``, ``head_dim`` and ``mlp_dim`` left at ``None`` are derived (all heads, ``model_dim //
    num_heads`` and ``4 * model_dim``), and derived anew by :meth:`replace`; so are, in an encoder-decoder,
    ``num_encoder_layers`` and ``num_decoder_layers`` (``num_layers``).

    Attributes:
      family: ``decoder`` (GPT), ``encoder`` (BERT) or ``encoder_decoder`` (translation).
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
        _check_positive(self, "max_len", "num_layers", "num_heads", "model_dim", "unroll")
        for field, choices in _CHOICES.items():
            _check_choice(self, field, choices)
        derived = self.derived()
        for field, value in derived.items():
            if getattr(self, field) is None:
                if field == "head_dim":
                    _require(self.model_dim % self.num_heads == 0,
                             f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; "
                             "change one of them or set head_dim")
                object.__setattr__(self, field, value)
        _check_positive(self, *derived)
        if self.vocab_size is not None:
            _check_positive(self, "vocab_size")
        if self.sliding_window is not None:
            _check_positive(self, "sliding_window")
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        _require(self.positions != "rope" or self.head_dim % 2 == 0,
                 f"positions='rope' rotates pairs: head_dim={self.head_dim} must be even")
        _require(self.positions != "sinusoidal" or self.model_dim % 2 == 0,
                 f"positions='sinusoidal' needs an even model_dim, not {self.model_dim}")
        for field in ("dropout", "attention_dropout"):
            value = getattr(self, field)
            _require(value is None or 0.0 <= value < 1.0, f"{field}={value} must be in [0, 1)")
        for field in ("norm_epsilon", "init_std", "rope_base"):
            value = getattr(self, field)
            _require(value is None or value > 0, f"{field}={value} must be positive")
        _require(self.num_token_types >= 0, f"num_token_types={self.num_token_types} must not be negative")
        for field in ("num_encoder_layers", "num_decoder_layers"):
            _require(self.family == "encoder_decoder" or getattr(self, field) is None,
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
    """

    kind: str = "char"
    vocab_size: int | None = None
    path: str | None = None
    min_frequency: int = 1

    def __post_init__(self):
        _check_choice(self, "kind", ("char", "word", "bpe", "unigram"))
        _check_positive(self, "min_frequency")
        _require(self.min_frequency == 1 or self.kind == "bpe",
                 f"data.tokenizer.min_frequency={self.min_frequency} is for kind 'bpe', not {self.kind!r}")
        _require(self.vocab_size is not None or self.path is not None or self.kind == "char",
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
        _require(0.0 < self.validation_fraction < 1.0,
                 f"data.validation_fraction={self.validation_fraction} must be in (0, 1)")
        _require(0.0 < self.mask_probability < 1.0, f"data.mask_probability={self.mask_probability} must be in (0, 1)")
        _require(self.generated in (None, "dates"), f"data.generated={self.generated!r} is not 'dates'")


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
        _check_choice(self, "name", ("adamw", "adafactor", "lion", "sgd", "muon"))
        _check_choice(self, "schedule", ("constant", "linear", "cosine", "noam", "wsd"))
        _check_positive(self, "accumulation")
        _require(self.peak_lr > 0, f"optim.peak_lr={self.peak_lr} must be positive")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} must not be negative")
        _require(self.schedule != "noam" or self.warmup_steps > 0, "optim.schedule='noam' needs optim.warmup_steps > 0")
        _require(0 <= self.end_lr <= 1, f"optim.end_lr={self.end_lr} is a fraction of peak_lr, in [0, 1]")
        _require(0 < self.decay_fraction <= 1, f"optim.decay_fraction={self.decay_fraction} must be in (0, 1]")
        _require(self.clip_norm is None or self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} must be positive")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross entropy.

    Attributes:
      label_smoothing: mass spread evenly over the vocabulary (Szegedy et al., 2016).
      z_loss: weight of log(Z)^2 (de Brebisson and Vincent, 2016).
      r_drop: weight of the divergence between two passes with different dropout, in translation (Wu et al., 2021); a
        step then costs twice as much.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    r_drop: float = 0.0

    def __post_init__(self):
        _require(0 <= self.label_smoothing < 1, f"loss.label_smoothing={self.label_smoothing} must be in [0, 1)")
        _require(self.z_loss >= 0, f"loss.z_loss={self.z_loss} must not be negative")
        _require(self.r_drop >= 0, f"loss.r_drop={self.r_drop} must not be negative")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Save every so many steps (and at the end, and on Ctrl-C); keep the last few and the best."""

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        _check_positive(self, "every", "keep")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate every so many steps on at most ``max_batches`` batches; ``None``: the whole held-out part."""

    every: int = 250
    batch_size: int = 64
    max_batches: int | None = None

    def __post_init__(self):
        _check_positive(self, "every", "batch_size")
        if self.max_batches is not None:
            _check_positive(self, "max_batches")


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
        _require(self.every >= 0, f"sample.every={self.every} must not be negative")
        _check_positive(self, "max_new_tokens")

    def due(self, step: int) -> bool:
        """Whether a sample is due at this step."""
        if not self.every or step % self.every:
            return False
        turn = step // self.every
        return not self.growing or turn & (turn - 1) == 0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; ``data=None`` takes all that the others leave."""

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        _check_positive(self, "fsdp", "tensor")
        if self.data is not None:
            _check_positive(self, "data")


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
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _check_positive(self, "steps", "batch_size", "log_every")
        _require(self.batch_size % self.optim.accumulation == 0,
                 f"batch_size={self.batch_size} does not split into optim.accumulation={self.optim.accumulation} parts")

    def replace(self, **changes: Any) -> Self:
        """A validated copy with the given top-level fields changed."""
        check_field_names(type(self), changes)
        return dataclasses.replace(self, **changes)


def check_field_names(cls: type, names: typing.Iterable[str]) -> None:
    """Raises ValueError, with the nearest known name, for a name that is no field of the dataclass."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no field {name!r}; {hint}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The inverse of :func:`to_dict`; unknown names and wrong types raise ValueError."""
    check_field_names(cls, values)
    hints = typing.get_type_hints(cls)
    return cls(**{name: _coerce(f"{cls.__name__}.{name}", hints[name], value) for name, value in values.items()})


def _coerce(name: str, hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_dict(option, value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The fields in which two configs differ, as ``name: old -> new``."""
    found = []
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            found += differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found.append(f"{prefix}{field.name}: {a!r} -> {b!r}")
    return found
