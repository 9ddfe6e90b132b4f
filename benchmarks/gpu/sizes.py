"""The sizes of each part of the GPU benchmark."""

from __future__ import annotations

import dataclasses

from transformer_jax import presets
from transformer_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all parts.

    Attributes:
      matrix: The number of rows and columns of the matrix product that measures the peak rate.
      copied: The number of floats of the copy that measures the memory bandwidth.
      repeats: The number of repeated measurements, whose median is reported.
      train: The models to train, each with its rows per step.
      steps: The number of training steps that are timed together.
      attention: The shapes (B, T, N, K, H) of attention.
      cross_entropy: The number of tokens, the width and the size of the vocabulary.
      decode: The models that generate.
      new_tokens: The number of tokens of each generation.
      rows: The number of rows of the generation in a batch.
      char: The character model.
      char_steps: The number of training steps of the character model.
    """

    matrix: int
    copied: int
    repeats: int
    train: dict[str, tuple[ModelConfig, int]]
    steps: int
    attention: tuple[tuple[int, int, int, int, int], ...]
    cross_entropy: tuple[int, int, int]
    decode: dict[str, ModelConfig]
    new_tokens: int
    rows: int
    char: ModelConfig
    char_steps: int


def _model(name: str, **changes) -> ModelConfig:
    return presets.get(name).replace(dtype="bfloat16", **changes)


FULL = Sizes(
    matrix=8192, copied=2**30, repeats=5,
    train={"124M": (_model("gpt2-small"), 64), "350M": (_model("gpt2-medium"), 32)}, steps=10,
    attention=((16, 1024, 12, 12, 64), (8, 2048, 16, 16, 128), (8, 2048, 32, 8, 128), (2, 8192, 16, 16, 128)),
    cross_entropy=(64 * 1024, 768, 50_257),
    decode={"124M": _model("gpt2-small", param_dtype="bfloat16"), "1.5B": _model("gpt2-xl", param_dtype="bfloat16")},
    new_tokens=256, rows=256, char=_model("nanogpt-char-gpu"), char_steps=5000)
_TOY = dict(vocab_size=97, max_len=64, num_layers=2, num_heads=2, model_dim=32)
TINY = Sizes(
    matrix=128, copied=2**16, repeats=1, train={"toy": (_model("gpt2-small", **_TOY), 2)}, steps=2,
    attention=((1, 64, 4, 2, 16),), cross_entropy=(64, 16, 97),
    decode={"toy": _model("gpt2-small", param_dtype="bfloat16", **_TOY)}, new_tokens=8, rows=2,
    char=_model("nanogpt-char-gpu", **_TOY), char_steps=4)
