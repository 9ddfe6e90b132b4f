"""The texts in which features are most active, and the tokens that features make more likely."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.decoding.batch import bucket
from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.features.sources import check_source
from transformer_jax.inspection.characters import shown
from transformer_jax.inspection.reading_activations import PLACES, ActivationReader
from transformer_jax.inspection.viewer import framed

BINS = 40
_LOWEST, _HIGHEST = 2.0**-10, 2.0**10  # of the histograms, in the units of the weights
_WRITES_STREAM = ("residual", "mlp_output", "attention_output", "final")


@dataclasses.dataclass(frozen=True)
class Example:
    """A piece of a text in which a feature is active.

    Attributes:
      tokens: The tokens.
      values: The value of the feature at each token.
      text: The number of the text.
      start: The place of the first token in the text.
    """

    tokens: list[str]
    values: np.ndarray
    text: int
    start: int


@dataclasses.dataclass(frozen=True)
class Feature:
    """What is known about one feature.

    Attributes:
      number: The number of the feature.
      density: The share of tokens for which it is active.
      examples: The pieces of text with its largest values, the largest first, at most one from each
        text.
      histogram: The number of tokens in each of 40 bins of its values, whose borders
        ``histogram_borders`` returns.
      raised: The tokens whose logits it raises most, with the effect of the value 1; the effect of
        the final norm is left out. ``None`` if it does not write to the residual stream of a
        language model.
      lowered: The tokens whose logits it lowers most.
    """

    number: int
    density: float
    examples: list[Example]
    histogram: np.ndarray
    raised: list[tuple[str, float]] | None
    lowered: list[tuple[str, float]] | None


@dataclasses.dataclass(frozen=True)
class FeatureReport:
    """The features of an autoencoder, with examples.

    Attributes:
      features: The features that were chosen.
      densities: The density of every feature of the autoencoder, ``[F]``.
      num_tokens: The number of tokens that were read.
      title: The title of the page.
    """

    features: list[Feature]
    densities: np.ndarray
    num_tokens: int
    title: str

    def to_html(self, path: str | pathlib.Path | None = None) -> str:
        """Makes one page, which needs no network, server or library.

        Args:
          path: The file to write; ``None`` writes none.

        Returns:
          The page.
        """
        from transformer_jax.features.page import page

        return page(self, path)

    def _repr_html_(self) -> str:
        """Returns the page in a frame, for Jupyter and Colab."""
        return framed(self.to_html(), self.title)


def histogram_borders() -> np.ndarray:
    """Returns the borders of the bins of all histograms, which grow by a constant factor."""
    return np.geomspace(_LOWEST, _HIGHEST, BINS + 1)


def examine(bundle: Any, autoencoder: Any, texts: Iterable[Any], *, features: Sequence[int] | None = None,
            num_features: int = 30, num_examples: int = 10, width: int = 24, tokenizer: Any = None,
            batch_size: int = 16) -> FeatureReport:
    """Finds the texts in which features are most active.

    Args:
      bundle: The language model: the result of ``tj.load``, or a model.
      autoencoder: An autoencoder or transcoder of this language model, or its bundle.
      texts: Texts, as for ``tj.inspection.collect``. They are read twice.
      features: The numbers of the features to show. By default ``num_features`` of those that are
        active anywhere, from the rarest to the most frequent.
      num_features: How many features to choose.
      num_examples: How many examples of each.
      width: The number of tokens of an example.
      tokenizer: The tokenizer; by default that of the bundle.
      batch_size: Rows of a batch.

    Returns:
      The report.

    Raises:
      ValueError: If there is no tokenizer, a feature does not exist, or the language model lacks
        the activation.
    """
    autoencoder = getattr(autoencoder, "model", autoencoder)
    config = autoencoder.config
    reader = ActivationReader.make(bundle, texts, config.site, tokenizer=tokenizer, batch_size=batch_size,
                                   dtype="float32", mesh=None)
    check_source(config.replace(target=None, output_dim=None, target_scale=None), reader.dims)
    if reader.tokenizer is None:
        raise ValueError("the tokens of the examples are shown as text; pass a bundle, or tokenizer=...")
    active_F, num_tokens = np.zeros(config.num_features), 0
    for batch in _batches(reader):
        active_F += _encoded(autoencoder, batch[config.site], None)[0]
        num_tokens += len(batch[PLACES[0]])
    numbers = _chosen(active_F, features, num_features)
    tops: list[list[tuple[float, int, int, np.ndarray, np.ndarray]]] = [[] for _ in numbers]
    histograms = np.zeros((len(numbers), BINS), np.int64)
    for batch in _batches(reader):
        values = _encoded(autoencoder, batch[config.site], np.asarray(numbers))[1]
        _add_examples(tops, values, batch, num_examples, width)
        for number, column in enumerate(values.T):
            histograms[number] += np.histogram(column[column > 0].clip(_LOWEST, _HIGHEST), histogram_borders())[0]
    effects = [_effects(reader, autoencoder, number) for number in numbers]
    found = [Feature(number, float(active_F[number] / num_tokens), [
        Example([token.replace("\u00b7", " ") for token in shown(reader.tokenizer.pieces(ids))], values, text, start)
        for _, text, start, values, ids in sorted(top, key=lambda item: -item[0])], histograms[place], *effects[place])
        for place, (number, top) in enumerate(zip(numbers, tops, strict=True))]
    return FeatureReport(found, active_F / num_tokens, num_tokens, f"Features of {config.site}")


def _batches(reader: ActivationReader) -> Iterator[dict[str, np.ndarray]]:
    """Yields the activations of all batches."""
    empty = True
    for batch, _ in reader.read(reader.rows()):
        empty = False
        yield batch
    if empty:
        raise ValueError("there are no texts; pass at least one")


def _chosen(active_F: np.ndarray, features: Sequence[int] | None, count: int) -> list[int]:
    """Returns the numbers of the features to show."""
    if features is not None:
        wrong = [number for number in features if not 0 <= number < len(active_F)]
        if wrong:
            raise ValueError(f"features: {wrong[0]} is not from 0 to {len(active_F) - 1}")
        return list(features)
    alive = np.flatnonzero(active_F)
    by_density = alive[np.argsort(active_F[alive], kind="stable")]
    return by_density[np.unique(np.linspace(0, len(alive) - 1, min(count, len(alive))).round().astype(int))].tolist()


def _encoded(autoencoder: SparseAutoencoder, rows: np.ndarray,
             numbers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns how often each feature is active, and the values of the numbered ones."""
    padded = np.pad(rows, ((0, bucket(len(rows)) - len(rows)), (0, 0)))
    active, values = _encode(autoencoder, padded, len(rows), numbers)
    return np.asarray(active), np.asarray(values)[:len(rows)]


@jax.jit
def _encode(autoencoder: SparseAutoencoder, rows: jax.Array, count: jax.Array,
            numbers: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Computes ``_encoded`` for padded rows."""
    features = autoencoder.encode(rows)
    is_active = (features > 0) & (jnp.arange(len(rows)) < count)[:, None]
    return is_active.sum(0), features[:, :0] if numbers is None else features[:, numbers]


def _add_examples(tops: list[list[Any]], values: np.ndarray, batch: dict[str, np.ndarray], count: int,
                  width: int) -> None:
    """Adds the best tokens of a batch to the examples of each feature."""
    texts, positions = batch["texts"], batch["positions"]
    # A piece of a text is a run of tokens of the same text with increasing positions.
    starts = np.flatnonzero(np.diff(texts, prepend=-1) | (np.diff(positions, prepend=-2) != 1))
    ends = np.append(starts[1:], len(texts))
    for start, end in zip(starts, ends, strict=True):
        best = values[start:end].argmax(0)
        for number, top in enumerate(tops):
            center = start + best[number]
            largest = float(values[center, number])
            if largest <= 0 or (len(top) == count and largest <= top[0][0]) or any(
                    item[1] == texts[center] and item[0] >= largest for item in top):
                continue
            same = [item for item in top if item[1] == texts[center]]
            if same:  # of another piece of the same text
                top.remove(same[0])
                heapq.heapify(top)
            first = max(start, min(center - 2 * width // 3, end - width))
            last = min(end, first + width)
            heapq.heappush(top, (largest, int(texts[center]), int(positions[first]), values[first:last, number].copy(),
                                 batch["tokens"][first:last]))
            if len(top) > count:
                heapq.heappop(top)


def _effects(reader: ActivationReader, autoencoder: SparseAutoencoder, number: int, count: int = 8) -> tuple[Any, Any]:
    """Returns the tokens whose logits a feature raises and lowers most."""
    model, config = reader.model, autoencoder.config
    site = config.targets.rpartition(".")[2]
    if site not in _WRITES_STREAM or not model.predicts_next or model.config.norm_position == "post":
        return None, None
    effects = np.asarray(_logit_effects(model, autoencoder.decoder[...][number] / config.out_scale))
    order = np.argsort(effects)
    pieces = functools.cache(lambda token: shown(reader.tokenizer.pieces([token]))[0])
    known = order[order < reader.tokenizer.vocab_size]
    return tuple([(pieces(int(token)), float(effects[token])) for token in tokens]
                 for tokens in (known[::-1][:count], known[:count]))  # pyright: ignore[reportReturnType]


@jax.jit
def _logit_effects(model: Any, direction_D: jax.Array) -> jax.Array:
    """Returns the effect of a direction in the residual stream on all logits, without the division
    by the scale of the final norm."""
    norm = model.final_norm
    if norm is not None and norm.subtracts_mean:
        direction_D -= direction_D.mean()
    if norm is not None and (factor_D := norm.factor()) is not None:
        direction_D *= factor_D
    return cast(jax.Array, model.embeddings.unembedding_VD.astype(jnp.float32) @ direction_D)
