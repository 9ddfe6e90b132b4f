"""Checks of the inputs of tasks, and the split into training and held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformer_jax.data import Tokenizer
from transformer_jax.training.bundle import Bundle


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """Returns the tokenizer of a model, or raises ValueError if the model has none."""
    if bundle.tokenizer is None:
        raise ValueError("the model has no tokenizer, so its data cannot be read; load a model that is stored with its "
                         "tokenizer")
    return cast(Tokenizer, bundle.tokenizer)  # a tokenizer of Hugging Face has the same methods


def split(examples: Sequence[Any], validation_fraction: float, what: str) -> tuple[list[Any], list[Any]]:
    """Splits examples into a training part and a held-out part, which is the last part.

    Args:
      examples: The examples.
      validation_fraction: The fraction of the examples that is held out.
      what: What the examples are called in the error message, such as ``"pairs"``.

    Returns:
      The training examples and the held-out examples.

    Raises:
      ValueError: If one of the two parts would be empty.
    """
    cut = int(len(examples) * (1 - validation_fraction))
    if not 0 < cut < len(examples):
        raise ValueError(f"data.validation_fraction={validation_fraction} of {len(examples)} {what} leaves a part "
                         "empty; set data.validation_path, or another fraction")
    return list(examples[:cut]), list(examples[cut:])
