"""The table of the next token: the most probable tokens after a text, of any language model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax.baselines.ngrams import NgramModel
from transformer_jax.decoding.batch import undecodable
from transformer_jax.models.functional import forward
from transformer_jax.training.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class NextToken:
    """A possible next token.

    Attributes:
      token: The token id.
      piece: A string to display.
      probability: The probability of the token.
    """

    token: int
    piece: str
    probability: float


def next_tokens(model: Bundle | NgramModel, text: str, *, top: int = 10) -> list[NextToken]:
    """Computes the most probable tokens after a text.

    Args:
      model: A bundle with a language model (a decoder, or a recurrent network), or an n-gram model,
        with its tokenizer.
      text: The text. An empty one asks for the first token of a document.
      top: The number of tokens.

    Returns:
      The tokens, the most probable one first.

    Raises:
      ValueError: If the model has no tokenizer or is not a language model, or ``top`` is not
        positive.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read text; load a model that is stored with its "
                         "tokenizer")
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    tokens = tokenizer.encode_prompt(text)
    if isinstance(model, NgramModel):
        probabilities = model.next_token_probabilities(tokens)
    elif model.config.role == "decoder":
        logits = forward(model.model, [tokens[-model.config.max_len:]])[0, -1]
        probabilities = _softmax(np.asarray(logits, np.float64), undecodable(tokenizer, len(logits)))
    else:
        raise ValueError(f"a model of family {model.config.family!r} does not predict the next token; use a language "
                         "model")
    best = np.argsort(-probabilities, kind="stable")[:min(top, tokenizer.vocab_size)].tolist()
    return [NextToken(token, piece, float(probabilities[token]))
            for token, piece in zip(best, tokenizer.pieces(best), strict=True)]


def next_token_table(found: Sequence[NextToken]) -> str:
    """Formats the next tokens as lines of text with bars.

    Args:
      found: The result of ``next_tokens``.

    Returns:
      One line for each token: its probability, a bar, and the token in quotes.
    """
    largest = max(token.probability for token in found)
    return "\n".join(f"{token.probability:8.4f}  {'#' * round(30 * token.probability / (largest or 1.0)):<30}  "
                     f"{token.piece!r}" for token in found)


def plot_next_tokens(found: Sequence[NextToken], text: str, path: str | pathlib.Path) -> None:
    """Draws the next tokens as horizontal bars.

    Args:
      found: The result of ``next_tokens``.
      text: The text before, for the title.
      path: The picture; its ending chooses the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.3 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    # A dollar sign would start a formula.
    labels = [repr(token.piece).replace("$", r"\$") for token in found]
    bars = axes.barh(range(len(found)), [token.probability for token in found])
    axes.bar_label(bars, [f"{token.probability:.3f}" for token in found], padding=3, fontsize=8)
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.15 * max(token.probability for token in found), 1.15) or 1.0)
    axes.set_xlabel("probability of the next token")
    shown = text if len(text) <= 60 else f"... {text[-60:]}"
    axes.set_title(f"after {shown!r}".replace("$", r"\$"), fontsize=10)
    figure.savefig(path, dpi=120)


def _softmax(logits: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """Returns the probabilities of logits, with 0 for the excluded ids."""
    powers = np.where(excluded, 0.0, np.exp(logits - logits[~excluded].max()))
    return powers / powers.sum()
