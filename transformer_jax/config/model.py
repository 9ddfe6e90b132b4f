"""The shape of a model."""

from __future__ import annotations

import dataclasses
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
