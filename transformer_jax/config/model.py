"""The settings that define the architecture of a model."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Self, cast

from transformer_jax.config.choices import CHOICES, choices_of
from transformer_jax.config.classifier import ClassifierConfig
from transformer_jax.config.experts import ExpertConfig
from transformer_jax.config.families import ModelSettings
from transformer_jax.config.latent import LatentConfig
from transformer_jax.config.layers import LayerKind, Limits
from transformer_jax.config.model_checks import check_model, config_of_kind
from transformer_jax.config.mup import MupConfig
from transformer_jax.config.ranges import check_fields
from transformer_jax.config.rope_scaling import RopeLayout, RopeScaling
from transformer_jax.settings import check_choice, check_field_names, require

# Sizes that a caller may leave at None: the config then derives them, so that they are never None.
if TYPE_CHECKING:
    _Derived = int
else:
    _Derived = int | None
_UNSET = cast(int, None)


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelSettings):
    """The architecture of a Transformer.

    Fields with a derived default, such as ``head_dim``, are computed from other fields if they are
    ``None``. ``replace`` computes them again.

    Attributes:
      family: ``decoder`` (GPT), ``encoder`` (BERT), ``encoder_decoder`` (translation), ``reward``
        (a decoder that outputs one number), or one of the families of classifiers.
      vocab_size: Number of token ids. It may be ``None`` only until the tokenizer is known.
      max_len: The longest sequence, in tokens.
      num_layers: Number of blocks; in an encoder-decoder, on each side.
      num_heads: Number of query heads in each attention layer.
      model_dim: Width of the residual stream.
      num_kv_heads: Number of key and value heads. ``None``: ``num_heads``.
      head_dim: Width of the queries and keys of a head, and of its values without ``latent``.
        ``None``: ``model_dim // num_heads``.
      latent: Multi-head latent attention, with its small cache; see ``LatentConfig``. ``None``:
        every head has its own keys and values, or shares them (``num_kv_heads``).
      mlp_dim: Width of the feed-forward layer. ``None``: ``4 * model_dim``.
      embedding_dim: Width of the embeddings of an encoder. If it differs from ``model_dim``, a
        linear map follows them (ALBERT, Lan et al., 2020). ``None``: ``model_dim``.
      shared_layers: Whether all blocks of an encoder have the same weights, as in ALBERT.
      num_encoder_layers: Blocks of the encoder in an encoder-decoder. ``None``: ``num_layers``.
      num_decoder_layers: Blocks of the decoder in an encoder-decoder. ``None``: ``num_layers``.
      num_token_types: Number of token types that have an embedding, such as the two sentences of a
        pair in BERT. 0 disables these embeddings.
      positions: The position encoding. ``sinusoidal`` and ``learned`` are added to the embeddings.
        ``rope`` rotates queries and keys (Su et al., 2021). ``alibi`` adds a linear bias to the
        scores (Press et al., 2021). ``relative`` adds a bias that is learned for each head and
        bucket of distances (T5, Raffel et al., 2020). ``sinusoidal_halves`` places all sines before
        all cosines, as Marian and Pegasus do; ``sinusoidal_fairseq`` does too, with the frequencies
        of M2M100. ``none`` adds nothing. An encoder-decoder has its own learned positions and its
        own embedding norm on each side. ``transformer_jax.nn.register_positions`` adds further
        names.
      position_offset: Rows of the table of learned positions before position 0 (2 in RoBERTa and
        BART), or the first position of ``sinusoidal_fairseq``.
      relative_buckets: Number of buckets of ``relative`` positions. Half of the buckets hold one
        distance each; each of the others holds a range of distances, which grows.
      relative_max_distance: All distances from this one on share a bucket.
      attention_scale: Factor of the attention scores. ``None``: 1 / sqrt(head_dim). T5 uses 1.
      norm: ``layernorm``, ``rmsnorm``, ``layernorm_without_weights`` (OLMo 1), or
        ``rmsnorm_one_plus``, which multiplies by 1 plus the stored scale (Gemma).
      norm_position: ``pre`` normalizes before each sub-layer, ``post`` after the residual sum,
        ``output`` the output of each sub-layer before the sum (OLMo 2), ``both`` the input and the
        output of each sub-layer (Gemma 2).
      residual: ``sequential``: the feed-forward layer reads the sum of the stream and attention.
        ``parallel`` (GPT-NeoX): both read the stream before attention, each through its own norm.
        ``parallel_shared`` (GPT-J, Phi): both read it through one norm.
      norm_epsilon: The value that a norm adds to the variance.
      activation: The activation of the feed-forward layer. ``gelu`` is the exact (erf) version of
        GPT and BERT, ``gelu_tanh`` the approximation in the code of GPT-2, ``relu_squared`` the
        square of ``relu`` (So et al., 2021). ``swiglu`` and ``geglu`` (Shazeer, 2020) multiply the
        up projection by a gate after SiLU or ``gelu_tanh``, ``geglu_erf`` (ModernBERT) after
        ``gelu``. ``swiglu_plus_one`` (gpt-oss) adds 1 to it; its gate is g * sigmoid(1.702 g).
      head_activation: The activation in the head of an encoder. BERT uses the same as in its
        layers; RoBERTa always uses ``gelu``.
      use_bias: Whether linear layers and LayerNorm have biases.
      use_qkv_bias: Whether queries, keys and values have biases. ``None``: ``use_bias``. Qwen2 has
        only these biases.
      use_mlp_bias: Whether the feed-forward layer has biases. ``None``: ``use_bias``.
      use_norm_bias: Whether LayerNorm has biases. ``None``: ``use_bias``.
      use_embedding_norm: Whether a norm follows the embeddings, as in BERT.
      use_first_norm: Whether a norm precedes the first attention. In ModernBERT there is none.
      use_qk_norm: Whether RMSNorm is applied to queries and keys before the rotation (Dehghani et
        al., 2023).
      qk_norm_width: What this norm covers: each ``head`` alone, or ``all`` heads (OLMo 2).
      use_sinks: Whether the softmax of each head has one more learned score, which takes weight
        away from the keys and adds no value (gpt-oss).
      limits: Limits of scores, logits and projections; see ``Limits``.
      use_value_head: Whether a head on the final hidden states estimates the expected reward, for
        reinforcement learning with PPO.
      scale_embeddings: Whether token embeddings are initialized with standard deviation 1 /
        sqrt(model_dim) and multiplied by sqrt(model_dim) (Vaswani et al., 2017, section 3.4).
      use_output_bias: Whether the logits have a bias, as in BART and Marian. The head of an encoder
        always has one.
      scale_logits: Whether hidden states are divided by sqrt(model_dim) before the unembedding, as
        in T5 with tied embeddings.
      tie_embeddings: Whether the unembedding shares its weights with the token embeddings.
      rope_base: The base of the wavelengths of ``rope``.
      rope_scaling: How ``rope`` is scaled for longer texts; see ``RopeScaling``.
      rope_layout: Which channels ``rope`` rotates, and in which pairs; see ``RopeLayout``.
      sliding_window: The number of last positions that a token attends to, its own included.
        ``None``: all.
      layer_pattern: The kinds of the first layers, which repeat until the last layer; see
        ``LayerKind``. ``()``: all layers are alike.
      moe: A mixture of experts in place of feed-forward layers; see ``ExpertConfig``. ``None``: no
        experts.
      mup: One best learning rate for all widths and depths; see ``MupConfig``. ``None``: off.
      dropout: Dropout rate of the embeddings and of the output of each sub-layer.
      attention_dropout: Dropout rate of the attention weights. ``None``: ``dropout``.
      init_std: Standard deviation of the initial weights. With ``pre`` norms, projections into the
        residual stream are scaled by 1 / sqrt(2 * num_layers) (Radford et al., 2019). ``None`` uses
        sqrt(2 / (in + out)) for each matrix (Glorot and Bengio, 2010).
      dtype: Type of activations and matrix products. Softmax, norms and losses always use float32.
      param_dtype: Type of the weights.
      attention_implementation: The kernel of ``transformer_jax.ops.attend``. ``auto`` uses the
        fused kernel of the platform where it can run. Any other choice raises an error where it
        cannot run.
      matmul_precision: Precision of float32 matrix products. With ``default``, a TPU rounds the
        operands to bfloat16 (3 significant digits), and a GPU may round them to TF32. On a TPU
        ``high`` uses three passes of bfloat16, and ``highest`` six, which is equal to float32. This
        setting does not affect bfloat16 products.
      remat: What the backward pass recomputes: nothing (``none``), everything but the matrix
        products (``dots``), or everything (``full``). ``offload`` is like ``dots``, but keeps the
        stored values in the memory of the host; it needs an accelerator.
      unroll: Number of layers in one iteration of the scan over layers. ``num_layers`` unrolls the
        whole loop.
      start_ids: The tokens that every target of an encoder-decoder starts with. ``()``: the
        tokenizer's ``<s>``.
      banned_ids: Tokens that decoding never selects, such as the padding of Marian.
      classifier: The head of a classifier, see ``ClassifierConfig``.
    """

    family: str = "decoder"
    vocab_size: int | None = None
    max_len: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    model_dim: int = 768
    num_kv_heads: _Derived = _UNSET
    head_dim: _Derived = _UNSET
    latent: LatentConfig | None = None
    mlp_dim: _Derived = _UNSET
    embedding_dim: _Derived = _UNSET
    shared_layers: bool = False
    num_encoder_layers: _Derived = _UNSET
    num_decoder_layers: _Derived = _UNSET
    num_token_types: int = 0
    positions: str = "learned"
    position_offset: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    attention_scale: float | None = None
    norm: str = "layernorm"
    norm_position: str = "pre"
    residual: str = "sequential"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    head_activation: str = "gelu"
    use_bias: bool = True
    use_qkv_bias: bool | None = None
    use_mlp_bias: bool | None = None
    use_norm_bias: bool | None = None
    use_embedding_norm: bool = False
    use_first_norm: bool = True
    use_qk_norm: bool = False
    qk_norm_width: str = "head"
    use_sinks: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)
    use_value_head: bool = False
    scale_embeddings: bool = False
    use_output_bias: bool = False
    scale_logits: bool = False
    tie_embeddings: bool = True
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    rope_layout: RopeLayout = dataclasses.field(default_factory=RopeLayout)
    sliding_window: int | None = None
    layer_pattern: tuple[LayerKind, ...] = ()
    moe: ExpertConfig | None = None
    mup: MupConfig | None = None
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
    classifier: ClassifierConfig = dataclasses.field(default_factory=ClassifierConfig)

    def __post_init__(self):
        check_fields(self)
        for field in CHOICES:
            check_choice(self, field, choices_of(field))
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        for field, value in self.derived().items():
            if getattr(self, field) is None:
                require(field != "head_dim" or self.model_dim % self.num_heads == 0,
                        f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; "
                        "change one of them or set head_dim")
                object.__setattr__(self, field, value)
        object.__setattr__(self, "classifier", self.classifier.of_family(self.family))
        check_model(self, is_built_in=self.positions in CHOICES["positions"])
        for group in (self.moe, self.latent, self.mup):
            if group is not None:
                group.check(self)
        for field in ("start_ids", "banned_ids"):
            value = getattr(self, field)
            require(all(isinstance(token, int) and 0 <= token < (self.vocab_size or token + 1) for token in value),
                    f"{field}={value!r} must be token ids below vocab_size={self.vocab_size}")
            object.__setattr__(self, field, tuple(value))

    def derived(self) -> dict[str, int]:
        """Computes the values of the fields that may be left at ``None``.

        Returns:
          The name and the derived value of each of these fields.
        """
        values = {"num_kv_heads": self.num_heads, "head_dim": self.model_dim // self.num_heads,
                  "mlp_dim": 4 * self.model_dim, "embedding_dim": self.model_dim}
        if self.family == "encoder_decoder":
            values |= {"num_encoder_layers": self.num_layers, "num_decoder_layers": self.num_layers}
        return values

    def of_places(self) -> tuple[ModelConfig, ...]:
        """Returns the config of each place in the pattern of layers.

        Returns:
          One config without a pattern for each place; only this config if all layers are alike.
        """
        return tuple(config_of_kind(self, kind) for kind in self.layer_pattern) or (self,)

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Returns the sliding window of each layer of a stack.

        Args:
          num_layers: The number of layers of the stack.

        Returns:
          The window of each layer; ``None`` for a layer without one.
        """
        places = self.of_places()
        return tuple(places[layer % len(places)].sliding_window for layer in range(num_layers))

    @property
    def max_source_len(self) -> int:
        """The longest source of an encoder-decoder, in tokens: ``max_len``. Relative positions have
        no table and therefore no limit."""
        return sys.maxsize if self.positions == "relative" else self.max_len

    @property
    def cached_per_token(self) -> int:
        """The number of values that a decoding cache stores for each token of a row: in each layer
        a key and a value for each head, or the latent and the rotated key."""
        layers = self.num_decoder_layers or self.num_layers
        if self.latent is not None:
            return layers * self.latent.cached_width(self)
        return 2 * layers * cast(int, self.num_kv_heads) * cast(int, self.head_dim)

    @property
    def precision(self) -> str | None:
        """The value of ``matmul_precision`` for JAX. ``None`` means that
        ``jax.default_matmul_precision`` decides."""
        return None if self.matmul_precision == "default" else self.matmul_precision

    def replace(self, **changes: Any) -> Self:
        """Returns a validated copy in which some fields are changed.

        Fields that had their derived value are derived again, unless ``changes`` gives them.

        Args:
          **changes: The fields to change and their new values.

        Returns:
          The new config.

        Raises:
          ValueError: If a field does not exist or a value is not valid.
        """
        check_field_names(type(self), changes)
        for field, value in self.derived().items():
            # If num_heads does not divide model_dim, head_dim was given.
            derived = field != "head_dim" or self.model_dim % self.num_heads == 0
            if derived and getattr(self, field) == value:
                changes.setdefault(field, None)
        return dataclasses.replace(self, **changes)
