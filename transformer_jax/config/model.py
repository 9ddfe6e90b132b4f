"""The shape of a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, cast

from transformer_jax.settings import check_choice, check_field_names, check_positive, require

_CHOICES = {
    "family": ("decoder", "encoder", "encoder_decoder", "reward"),
    "positions": ("sinusoidal", "sinusoidal_halves", "learned", "rope", "alibi", "relative", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "activation": ("relu", "silu", "gelu", "gelu_tanh", "swiglu", "geglu"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "attention_implementation": ("auto", "xla", "chunked", "cudnn", "splash"),
    "matmul_precision": ("default", "high", "highest"),
    "remat": ("none", "dots", "full", "offload"),
}

# Names that a program has registered, such as those of its own attention kernels.
_FURTHER_CHOICES: dict[str, list[str]] = {}


def allow_choice(field: str, name: str) -> None:
    """Lets a field of :class:`ModelConfig` have one more value, which a registry knows."""
    names = _FURTHER_CHOICES.setdefault(field, [])
    if name not in names:
        names.append(name)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotation of queries and keys is slowed down, for texts longer than those of the first
    training.

    Attributes:
      kind: ``none``; ``linear`` divides every frequency by ``factor`` (Chen et al., 2023);
        ``llama3`` those whose wavelength is above ``original_max_len / low_frequency_factor`` only,
        leaves those below ``original_max_len / high_frequency_factor`` and passes smoothly from one
        to the other (Dubey et al., 2024).
      factor: at least 1.
      low_frequency_factor: of ``llama3``.
      high_frequency_factor: of ``llama3``; more than ``low_frequency_factor``.
      original_max_len: of ``llama3``, the longest text of the first training, in tokens.
    """

    kind: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_len: int = 8192

    def __post_init__(self):
        check_choice(self, "kind", ("none", "linear", "llama3"))
        check_positive(self, "original_max_len")
        require(self.factor >= 1.0, f"rope_scaling.factor={self.factor} must be at least 1")
        require(0.0 < self.low_frequency_factor < self.high_frequency_factor,
                f"rope_scaling.low_frequency_factor={self.low_frequency_factor} must be positive and below "
                f"high_frequency_factor={self.high_frequency_factor}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer.

    ``num_kv_heads``, ``head_dim`` and ``mlp_dim`` left at ``None`` are derived (all heads,
    ``model_dim // num_heads`` and ``4 * model_dim``), and derived anew by :meth:`replace`; so are,
    in an encoder-decoder, ``num_encoder_layers`` and ``num_decoder_layers`` (``num_layers``).

    Attributes:
      family: ``decoder`` (GPT), ``encoder`` (BERT), ``encoder_decoder`` (translation) or ``reward``
        (a decoder that ends in one number).
      vocab_size: number of token ids; ``None`` only until a tokenizer is known.
      max_len: longest sequence, in tokens.
      num_layers: blocks; of an encoder-decoder, on each side.
      num_heads: query heads of each attention.
      model_dim: width of the residual stream.
      num_kv_heads: key and value heads; ``None``: as many as query heads.
      head_dim: width of a head; ``None``: ``model_dim // num_heads``.
      mlp_dim: width of the feed-forward layer; ``None``: ``4 * model_dim``.
      num_encoder_layers: of an encoder-decoder; ``None``: ``num_layers``.
      num_decoder_layers: of an encoder-decoder; ``None``: ``num_layers``.
      norm: kind of the norms.
      norm_position: before each sub-layer (``pre``) or after the residual sum (``post``).
      norm_epsilon: added to the variance inside a norm.
      tie_embeddings: the unembedding shares its weights with the token embeddings.
      rope_base: of ``rope``, the base of the wavelengths.
      attention_dropout: of attention weights; ``None``: as ``dropout``.
      param_dtype: type of the weights.
      positions: ``sinusoidal`` and ``learned`` are added to the embeddings, ``rope`` rotates
        queries and keys (Su et al., 2021), ``alibi`` adds a linear bias (Press et al., 2021),
        ``relative`` a bias learned for each head and bucket of distances (Raffel et al., 2020, T5).
        ``sinusoidal_halves`` has all sines before all cosines, as Marian and Pegasus do. An
        encoder-decoder has learned positions, and a norm of embeddings, for each side.
      position_offset: rows of the table of learned positions before that of position 0 (2 in
        RoBERTa and BART).
      relative_buckets: of ``relative`` positions; half of them hold one distance each, the others
        ever more.
      relative_max_distance: from which on all distances share a bucket.
      attention_scale: factor of the scores; ``None``: 1 / sqrt(head_dim). T5 has 1.
      activation: ``gelu`` is the exact (erf) one of GPT and BERT, ``gelu_tanh`` that of GPT-2's
        code; ``swiglu`` and ``geglu`` (Shazeer, 2020) have a gate beside the up projection, which
        goes through SiLU and through ``gelu_tanh``.
      use_bias: biases in every linear layer and in LayerNorm.
      use_qkv_bias: biases of queries, keys and values, where they differ from ``use_bias``: Qwen2
        has these alone.
      num_token_types: kinds of tokens with an embedding each, as the two sentences of a pair in
        BERT; 0: none.
      scale_embeddings: token embeddings start at a standard deviation of 1 / sqrt(model_dim) and
        are multiplied by sqrt(model_dim) (Vaswani et al., 2017, section 3.4).
      use_embedding_norm: a norm after the embeddings, as in BERT.
      use_output_bias: a bias of the logits, as in BART and Marian; the head of an encoder has one
        always.
      scale_logits: the unembedding reads hidden states over sqrt(model_dim), as in T5 with tied
        embeddings.
      start_ids: the tokens that every target of an encoder-decoder starts with; ``()``: the
        tokenizer's ``<s>``.
      banned_ids: tokens that decoding never draws, such as the padding of Marian.
      use_value_head: a head on the final hidden states that says what reward is to come, for
        reinforcement learning by PPO.
      use_qk_norm: RMSNorm on every query and key head before rotation (Dehghani et al., 2023).
      rope_scaling: of ``rope``, see :class:`RopeScaling`.
      sliding_window: attend to this many last positions only, the current one included.
      dropout: of embeddings and of what each sub-layer adds; of attention weights too unless
        ``attention_dropout`` says otherwise.
      init_std: standard deviation of the initial weights; under pre-norm, projections into the
        residual stream are scaled by 1 / sqrt(2 * num_layers) (Radford et al., 2019). ``None``:
        that of Glorot and Bengio (2010), sqrt(2 / (in + out)), for each matrix.
      dtype: type of activations and matrix products; softmax, norms and losses are float32 always.
      attention_implementation: of :func:`transformer_jax.ops.attend`. ``auto`` takes the fused
        kernel of the platform where it can; any other raises where it cannot.
      matmul_precision: by JAX's ``default`` a TPU rounds float32 operands of products to bfloat16
        (3 significant digits), and a GPU may round them to TF32; ``high`` takes three passes of
        bfloat16 on a TPU, ``highest`` six, which is float32. Products of bfloat16 are the same
        under each.
      remat: what the backward pass recomputes: ``none``, all but the matrix products (``dots``),
        everything (``full``), or as ``dots`` with what is kept in the host's memory (``offload``),
        for accelerators.
      unroll: how many layers one iteration of the layer scan holds; ``num_layers`` unrolls the
        loop.
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
    position_offset: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    attention_scale: float | None = None
    norm: str = "layernorm"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    use_bias: bool = True
    use_qkv_bias: bool | None = None
    use_embedding_norm: bool = False
    use_qk_norm: bool = False
    use_value_head: bool = False
    scale_embeddings: bool = False
    use_output_bias: bool = False
    scale_logits: bool = False
    tie_embeddings: bool = True
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    sliding_window: int | None = None
    dropout: float = 0.0
    attention_dropout: float | None = None
    init_std: float | None = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention_implementation: str = "auto"
    matmul_precision: str = "default"
    remat: str = "none"
    unroll: int = 1
    start_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_positive(self, "max_len", "num_layers", "num_heads", "model_dim", "unroll", "relative_buckets",
                       "relative_max_distance")
        for field, choices in _CHOICES.items():
            check_choice(self, field, (*choices, *_FURTHER_CHOICES.get(field, ())))
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
        num_kv_heads, head_dim = cast(int, self.num_kv_heads), cast(int, self.head_dim)  # filled in above
        require(self.num_heads % num_kv_heads == 0,
                 f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        require(self.positions != "rope" or head_dim % 2 == 0,
                 f"positions='rope' rotates pairs: head_dim={self.head_dim} must be even")
        require(self.positions == "rope" or self.rope_scaling.kind == "none",
                f"rope_scaling.kind={self.rope_scaling.kind!r} is for positions='rope', not {self.positions!r}")
        require(not self.positions.startswith("sinusoidal") or self.model_dim % 2 == 0,
                 f"positions={self.positions!r} needs an even model_dim, not {self.model_dim}")
        require(self.relative_buckets % 4 == 0 and self.relative_max_distance > self.relative_buckets // 2,
                f"relative_buckets={self.relative_buckets} must be a multiple of 4, and relative_max_distance="
                f"{self.relative_max_distance} more than half of it")
        require(self.position_offset == 0 or (self.position_offset > 0 and self.positions == "learned"),
                f"position_offset={self.position_offset} counts rows of a table before that of position 0: it must not "
                f"be negative, and is for positions='learned', not {self.positions!r}")
        for field in ("dropout", "attention_dropout"):
            value = getattr(self, field)
            require(value is None or 0.0 <= value < 1.0, f"{field}={value} must be in [0, 1)")
        for field in ("norm_epsilon", "init_std", "rope_base", "attention_scale"):
            value = getattr(self, field)
            require(value is None or value > 0, f"{field}={value} must be positive")
        require(self.family == "decoder" or not self.use_value_head,
                f"use_value_head is for family='decoder', not {self.family!r}")
        require(self.family in ("decoder", "encoder_decoder") or not self.use_output_bias,
                f"use_output_bias is for decoders and encoder-decoders, not family={self.family!r}")
        require(self.family == "encoder_decoder" or not self.start_ids,
                f"start_ids={self.start_ids} start the targets of an encoder-decoder, not of family={self.family!r}")
        for field in ("start_ids", "banned_ids"):
            value = getattr(self, field)
            require(all(isinstance(token, int) and 0 <= token < (self.vocab_size or token + 1) for token in value),
                    f"{field}={value!r} must be token ids below vocab_size={self.vocab_size}")
            object.__setattr__(self, field, tuple(value))
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

    @property
    def precision(self) -> str | None:
        """``matmul_precision`` as JAX takes it: ``None`` leaves it to
        ``jax.default_matmul_precision``."""
        return None if self.matmul_precision == "default" else self.matmul_precision

    def replace(self, **changes: Any) -> Self:
        """A validated copy with the given fields changed; derived fields follow unless given."""
        check_field_names(type(self), changes)
        for field, value in self.derived().items():
            # A head_dim that the width does not give was set, though rounded down it looks derived.
            derived = field != "head_dim" or self.model_dim % self.num_heads == 0
            if derived and getattr(self, field) == value:
                changes.setdefault(field, None)
        return dataclasses.replace(self, **changes)
