"""Runs a model over a corpus and yields the activations of its tokens, without those of padding."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax.decoding.batch import pad_right, whole_number
from transformer_jax.inspection.parts import LanguageModel, checked_model
from transformer_jax.models.functional import checked_options
from transformer_jax.models.output import Output
from transformer_jax.models.texts import read_target, read_text
from transformer_jax.settings import nearest, to_dict
from transformer_jax.sharding import batch_sharding, shardings

PLACES = ("tokens", "texts", "positions")  # the arrays that say where each activation comes from

_DTYPES = ("float32", "bfloat16")
_NOT_OF_TOKENS = ("attention_bias", "scores", "pattern")
_OF_SOURCES = ("cross_keys", "cross_values")

Batch = dict[str, np.ndarray]
_Row = tuple[int, int, Sequence[int], Sequence[int] | None]  # text, position, ids, ids of the source


@dataclasses.dataclass(frozen=True)
class ActivationReader:
    """The activations of a corpus, batch by batch, always in the same order.

    Attributes:
      model: The model.
      tokenizer: Its tokenizer, which is needed for texts that are strings.
      texts: The texts: strings or lists of token ids; for an encoder-decoder, pairs of a source and
        a target. They can be iterated several times.
      sites: The names of the activations, such as ``"layers.3.mlp_output"``.
      batch_size: Rows of a batch of the model.
      dtype: ``"float32"`` or ``"bfloat16"``.
      mesh: The devices that share each batch; ``None`` for the default device.
    """

    model: LanguageModel
    tokenizer: Any
    texts: Iterable[Any]
    sites: tuple[str, ...]
    batch_size: int
    dtype: str
    mesh: Mesh | None = None

    @classmethod
    def make(cls, bundle_or_model: Any, texts: Iterable[Any], sites: str | Sequence[str], *, tokenizer: Any,
             batch_size: int, dtype: str, mesh: Mesh | None) -> ActivationReader:
        """Checks the arguments of ``collect`` and makes a reader.

        Raises:
          ValueError: If an argument is not valid, or the model has no such site.
        """
        model = checked_model(getattr(bundle_or_model, "model", bundle_or_model))
        tokenizer = getattr(bundle_or_model, "tokenizer", None) if tokenizer is None else tokenizer
        if isinstance(texts, (str, Iterator)):
            raise ValueError(f"texts is of type {type(texts).__name__}; pass a list of texts, or another iterable that "
                             "can be read several times")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
        batch_size = whole_number("batch_size", batch_size)
        if mesh is not None:
            model = jax.device_put(model, shardings(model, mesh))
        return cls(model, tokenizer, texts, _resolved(model, [sites] if isinstance(sites, str) else sites), batch_size,
                   dtype, mesh)

    @functools.cached_property
    def dims(self) -> dict[str, int]:
        """The number of values of each site for one token."""
        shapes = _shapes(self.model)
        return {name: int(np.prod(shapes[name][2:])) for name in self.sites}

    @property
    def of_sources(self) -> bool:
        """True if the activations belong to the tokens of an encoder-decoder's sources."""
        return _is_of_source(self.sites[0])

    def digest(self) -> str:
        """Returns the SHA-256 of the weights of the model and of the settings of the reader."""
        settings = [to_dict(self.model.config), self.sites, self.batch_size, self.dtype]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for leaf in jax.tree.leaves(self.model):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def rows(self) -> Iterator[list[_Row]]:
        """Yields the rows of each batch: pieces of texts that are at most ``max_len`` tokens
        long."""
        rows = itertools.chain.from_iterable(map(self._pieces, itertools.count(), self.texts))
        while batch := list(itertools.islice(rows, self.batch_size)):
            yield batch

    def read(self, batches: Iterable[list[_Row]]) -> Iterator[tuple[Batch, list[_Row]]]:
        """Runs the model on batches of rows.

        Args:
          batches: The batches, as ``rows`` yields them.

        Yields:
          For each batch the activations ``[tokens, dim]`` by name, with the ``tokens``, ``texts``
          and ``positions`` that they belong to; and the rows.
        """
        waiting = None
        for rows in batches:
            # The model starts on a batch before the activations of the one before are copied.
            started = self._start(rows)
            if waiting is not None:
                yield _finished(*waiting[0]), waiting[1]
            waiting = started, rows
        if waiting is not None:
            yield _finished(*waiting[0]), waiting[1]

    def _pieces(self, text: int, given: Any) -> Iterator[_Row]:
        """Yields the pieces of one text."""
        if self.model.reads_sources:
            if isinstance(given, str) or len(given) != 2:
                raise ValueError(f"texts[{text}] is {given!r}; for an encoder-decoder, pass pairs of a source and a "
                                 "target")
            source, target = given
            start = self.model.config.start_ids or (() if self.tokenizer is None else (self.tokenizer.bos_id,))
            target = [*start, *self._ids(target, lambda text: read_target(self.model, text, self.tokenizer, start))]
            yield text, 0, target, self._ids(source, lambda text: read_text(self.model, text, self.tokenizer))
            return
        ids = self._ids(given, lambda text: read_text(self.model, text, self.tokenizer))
        length = self.model.config.max_len
        for start in range(0, len(ids), length):
            yield text, start, ids[start:start + length], None

    def _ids(self, given: Any, encode: Any) -> Any:
        """Returns the token ids of a text."""
        if isinstance(given, str) and self.tokenizer is None:
            raise ValueError("texts are strings, but there is no tokenizer; pass a bundle, tokenizer=..., or lists of "
                             "token ids")
        return encode(given) if isinstance(given, str) else given

    def arrays(self, rows: list[_Row]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pads the rows of a batch; the last batch is filled up with empty rows.

        Args:
          rows: The rows, as ``rows`` yields them.

        Returns:
          The tokens ``[B, T]``, for an encoder-decoder those of the sources and of the targets; and
          the segment ids as options of the model's call, 0 for padding.
        """
        missing, max_len = [[]] * (self.batch_size - len(rows)), self.model.config.max_len
        ids_BT, segments_BT = pad_right([*(row[2] for row in rows), *missing], max_len)
        arrays, options = (ids_BT,), {"segment_ids_BT": segments_BT}
        if self.model.reads_sources:
            ids_BS, segments_BS = pad_right([*(cast(Sequence[int], row[3]) for row in rows), *missing], max_len)
            arrays = (ids_BS, ids_BT)
            options = {"source_segment_ids_BS": segments_BS, "target_segment_ids_BT": segments_BT}
        return arrays, checked_options(cast(Any, self.model), cast(Any, arrays), options)

    def _start(self, rows: list[_Row]) -> tuple[Mapping[str, jax.Array], Batch]:
        """Starts the forward pass of a batch."""
        arrays, options = self.arrays(rows)
        side = 0 if self.of_sources else -1
        ids, is_token = arrays[side], list(options.values())[side] != 0
        if self.mesh is not None:
            arrays, options = jax.device_put((arrays, options), batch_sharding(self.mesh))
        values = _values(self.model, arrays, options, self.sites, self.dtype)
        missing = [0] * (self.batch_size - len(rows))
        texts, starts = (np.array([[row[place] for row in rows] + missing], np.int32).T for place in (0, 1))
        places = {"tokens": ids, "texts": np.broadcast_to(texts, ids.shape),
                  "positions": starts + np.arange(ids.shape[1], dtype=np.int32)}
        return values, {name: place[is_token] for name, place in places.items()} | {"is_token": is_token.ravel()}


def _finished(values: Mapping[str, jax.Array], places: Batch) -> Batch:
    """Waits for the activations of a batch and drops those of padding."""
    is_token = places.pop("is_token")
    return {name: np.asarray(value)[is_token] for name, value in values.items()} | places


@functools.partial(jax.jit, static_argnames=("sites", "dtype"))
def _values(model: LanguageModel, arrays: tuple[jax.Array, ...], options: dict[str, jax.Array],
            sites: tuple[str, ...], dtype: str) -> dict[str, jax.Array]:
    """Returns the activations of all tokens ``[B * T, dim]``."""
    trace = cast(Output, model(*arrays, **options)).trace
    values = {name: trace[name] for name in sites}
    return {name: value.reshape(value.shape[0] * value.shape[1], -1).astype(dtype) for name, value in values.items()}


def _shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all values of a trace of two tokens."""
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    return jax.eval_shape(lambda model, *ids: model(*ids).trace, model,
                          *(ids,) * (2 if model.reads_sources else 1)).names()


def _is_of_source(name: str) -> bool:
    """True if an activation belongs to a token of the source."""
    site = name.rpartition(".")[2]
    return site.startswith("encoder_") or site in _OF_SOURCES


def _resolved(model: LanguageModel, sites: Sequence[str]) -> tuple[str, ...]:
    """Returns full names of sites: ``"mlp_output"`` means this site in all layers.

    Raises:
      ValueError: If the model has no such site, the site has no value for each token, or one site
        is of sources and another of targets.
    """
    known = [name for name in _shapes(model) if not name.endswith(_NOT_OF_TOKENS)]
    found: list[str] = []
    for site in sites:
        matching = [name for name in known if name == site or name.endswith(f".{site}")]
        if not matching:
            parts = site.split(".") if isinstance(site, str) else []
            hint = nearest(str(site), [*known, *dict.fromkeys(name.rpartition(".")[2] for name in known)])
            if len(parts) == 3 and parts[1].startswith("-"):
                hint = "; count layers from 0"
            raise ValueError(f"sites: {site!r} is not a value that the model has for each token{hint}")
        found += matching
    if not found:
        raise ValueError('sites is empty; pass names such as "layers.0.mlp_output"')
    if len({_is_of_source(name) for name in found}) > 1:
        raise ValueError(f"sites: {', '.join(found)} belong partly to tokens of the source and partly to tokens of the "
                         "target; collect them in two calls")
    return tuple(dict.fromkeys(found))


