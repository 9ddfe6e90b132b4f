"""The settings of recurrent networks: language models, translators and ELMo."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.families import ModelSettings
from transformer_jax.config.model import ModelConfig
from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require

_CHOICES = {"family": ("recurrent", "recurrent_pairs", "elmo"), "cell": ("rnn", "lstm", "gru"),
            "dtype": ("float32", "bfloat16")}
_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(ModelSettings):
    """The shape of a recurrent network.

    Attributes:
      family: ``recurrent`` (a language model), ``recurrent_pairs`` (an encoder and a decoder, for
        translation) or ``elmo`` (a language model in each direction, for contextual vectors).
      vocab_size: Number of token ids. It may be ``None`` only until the tokenizer is known.
      max_len: The longest sequence that a task gives the model, in tokens. The network itself has
        no limit.
      num_layers: Number of layers; in ``recurrent_pairs``, on each side.
      cell: ``rnn`` (Elman, 1990, with tanh), ``lstm`` (Hochreiter and Schmidhuber, 1997, with the
        forget gate of Gers et al., 2000) or ``gru`` (Cho et al., 2014).
      model_dim: Width of the embeddings and of the state of each layer.
      use_attention: Whether the decoder of ``recurrent_pairs`` attends to all states of the encoder
        (Bahdanau et al., 2015). Without attention, it reads only the last state of the encoder
        (Sutskever et al., 2014; Cho et al., 2014).
      dropout: Dropout rate of the input of each layer and of the output of the last (Zaremba et
        al., 2014).
      tie_embeddings: Whether the unembedding shares its weights with the token embeddings.
      dtype: Type of activations and matrix products. Weights, softmax and losses use float32.
    """

    family: str = "recurrent"
    vocab_size: int | None = None
    max_len: int = 256
    num_layers: int = 1
    cell: str = "lstm"
    model_dim: int = 256
    use_attention: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self)
        for field, choices in _CHOICES.items():
            check_choice(self, field, choices)
        require(self.use_attention or self.family == "recurrent_pairs",
                f"use_attention=False is for family='recurrent_pairs'; family={self.family!r} has no attention to "
                "switch off")

    @property
    def num_gates(self) -> int:
        """The number of linear maps of an input and of a state in a cell."""
        return _GATES[self.cell]

    @property
    def num_heads(self) -> int:
        """The number of attention heads: additive attention has one."""
        return 1

    @property
    def embedding_config(self) -> ModelConfig:
        """The settings of the token embeddings and the unembedding."""
        return ModelConfig(vocab_size=self.vocab_size, max_len=self.max_len, num_layers=1, num_heads=1,
                           model_dim=self.model_dim, positions="none", tie_embeddings=self.tie_embeddings,
                           use_output_bias=True, init_std=self.model_dim ** -0.5, dtype=self.dtype)

    def flops_per_token(self, num_parameters: int, length: int) -> float:
        """Computes the number of floating point operations for training on one token.

        Args:
          num_parameters: The number of parameters of the model.
          length: The number of tokens in a row.

        Returns:
          6 for each parameter that is not only looked up, and those of additive attention, whose
          scores are 4 operations for each source token and each dimension.
        """
        looked_up = 0 if self.tie_embeddings else (self.vocab_size or 0) * self.model_dim
        attends = self.family == "recurrent_pairs" and self.use_attention
        return 6.0 * (num_parameters - looked_up) + 3 * 8.0 * attends * length * self.model_dim
