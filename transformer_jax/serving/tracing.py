"""Inspection and steering of single requests: what the model computed for each new token, and
changes to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from transformer_jax.config import ModelConfig
from transformer_jax.decoding.batch import pad_right
from transformer_jax.inspection.lens import logit_lens
from transformer_jax.models.functional import trace
from transformer_jax.serving.edits import TextEdits, row_edits
from transformer_jax.serving.fields import ApiError, Fields
from transformer_jax.serving.served_model import ServedModel
from transformer_jax.settings import shown

_KINDS = ("attention", "logit_lens", "residuals")
_MOST_NUMBERS = 2_000_000  # of attention weights or activations in a response
_MOST_TOP_K = 100
_LARGEST_SCALE = 1e6


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request wants to see of each new token.

    Attributes:
      attention: the layers and heads whose attention rows are returned, or ``None``.
      lens_layers: the layers of the logit lens, or ``None``; the number of layers stands for the
        model's own prediction.
      top_k: the number of tokens of the logit lens.
      residual_layers: the layers whose residual stream is returned, or ``None``; the number of
        layers stands for the stream after the last one.
    """

    attention: tuple[list[int], list[int]] | None = None
    lens_layers: list[int] | None = None
    top_k: int = 5
    residual_layers: list[int] | None = None


def wanted(fields: Fields, served: ServedModel) -> Wanted | None:
    """Reads the field ``inspect``: an object with ``attention``, ``logit_lens`` or ``residuals``,
    whose values are objects with ``layers`` and, for attention, ``heads``, and for the lens
    ``top_k``.

    Args:
      fields: the fields of the request.
      served: the model.

    Returns:
      What is wanted, or ``None``.

    Raises:
      ApiError: if the field has another form, or the server does not allow it.
    """
    value = fields.get("inspect")
    if value is None:
        return None
    _check_allowed(served, "inspect")
    if not isinstance(value, Mapping) or not value or not value.keys() <= set(_KINDS) or not all(
            isinstance(each, Mapping) for each in value.values()):
        raise ApiError(f"inspect={shown(value)} must be an object with {', '.join(_KINDS)}, whose values are objects "
                       'such as {"layers": [0]}', param="inspect")
    config, found = served.model.config, {kind: Fields(value[kind]) for kind in _KINDS if kind in value}
    attention, lens, residuals = map(found.get, _KINDS)
    return Wanted(
        None if attention is None else (_indices(attention, "layers", config.num_layers),
                                        _indices(attention, "heads", config.num_heads)),
        None if lens is None else _indices(lens, "layers", config.num_layers + 1),
        5 if lens is None else lens.whole("top_k", 5, 1, min(_MOST_TOP_K, config.vocab_size or 1)),
        None if residuals is None else _indices(residuals, "layers", config.num_layers + 1))


def _check_allowed(served: ServedModel, name: str) -> None:
    """Raises ApiError if the server does not allow inspection."""
    if not served.allows_inspection:
        raise ApiError(f"{name} is switched off on this server, which can be started with --allow_inspection",
                       code="unsupported_parameter", param=name)


def _indices(fields: Fields, name: str, size: int) -> list[int]:
    """Returns the indices of layers or heads; without the field, all."""
    value = fields.get(name, list(range(size)))
    if not isinstance(value, list) or not value or not all(
            isinstance(each, int) and not isinstance(each, bool) and 0 <= each < size for each in value):
        raise ApiError(f"{name}={shown(value)} must be a list of whole numbers from 0 to {size - 1}", param="inspect")
    return value


def text_edits(fields: Fields, served: ServedModel) -> TextEdits | None:
    """Reads the fields ``steer`` and ``ablate``. ``steer`` is a list of objects with ``layer``,
    ``vector`` (the name of a stored one, or its numbers) and ``scale``; ``ablate`` is a list of
    objects with ``layer`` and ``heads``.

    Args:
      fields: the fields of the request.
      served: the model.

    Returns:
      The edits, or ``None``.

    Raises:
      ApiError: if a field has another form, or the server does not allow it.
    """
    edits, config = TextEdits.none(served.model.config), served.model.config
    for name in ("steer", "ablate"):
        value = fields.get(name)
        if value is not None:
            _check_allowed(served, name)
            if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
                raise ApiError(f"{name}={shown(value)} must be a list of objects with a layer", param=name)
    for each in map(Fields, fields.get("steer", [])):
        scale = each.number("scale", 1.0, -_LARGEST_SCALE, _LARGEST_SCALE)
        edits.steering_LD[_layer(each, config)] += np.float32(scale) * _vector(each.get("vector"), served)
    for each in map(Fields, fields.get("ablate", [])):
        edits.is_ablated_LN[_layer(each, config), _indices(each, "heads", config.num_heads)] = True
    return edits if fields.get("steer") or fields.get("ablate") else None


def _layer(fields: Fields, config: ModelConfig) -> int:
    """Returns the field ``layer``."""
    if fields.get("layer") is None:
        raise ApiError("an edit has no layer", param="layer")
    return fields.whole("layer", None, 0, config.num_layers - 1)


def _vector(value: Any, served: ServedModel) -> Float[np.ndarray, " D"]:
    """Returns a steering vector, by its name or from its numbers."""
    size = served.model.config.model_dim
    if isinstance(value, str):
        if value not in served.steering_vectors:
            raise ApiError(f"there is no steering vector {value!r}; there are: "
                           f"{', '.join(served.steering_vectors) or 'none'}", param="steer")
        return served.steering_vectors[value]
    if not isinstance(value, list) or len(value) != size or not all(
            isinstance(each, int | float) and not isinstance(each, bool) and abs(each) <= _LARGEST_SCALE
            for each in value):
        raise ApiError(f"vector must be the name of a stored vector, or a list of {size} numbers of at most "
                       f"{_LARGEST_SCALE:g}", param="steer")
    return np.asarray(value, np.float32)


def inspection(served: ServedModel, what: Wanted, prompt: Sequence[int], new: Sequence[int],
               edits: TextEdits | None) -> dict[str, Any]:
    """Runs the model once more over a complete text, and returns what it computed where it drew the
    new tokens.

    Args:
      served: the model.
      what: what to return.
      prompt: the tokens of the prompt.
      new: the new tokens.
      edits: the edits with which they were drawn.

    Returns:
      For ``attention`` rows ``[layer][head][new token][token]``, for ``logit_lens`` the most
      probable tokens ``[layer][new token]``, for ``residuals`` vectors ``[layer][new token]``.

    Raises:
      ApiError: if the answer would be too large.
    """
    config, ids = served.model.config, [*prompt, *new][:-1]
    places = np.arange(len(prompt) - 1, len(ids))
    layers, heads = what.attention or ([], [])
    size = max(len(layers) * len(heads) * len(places) * len(ids),
               len(what.residual_layers or []) * len(places) * config.model_dim)
    if size > _MOST_NUMBERS:
        raise ApiError(f"the inspection has {size} numbers; at most {_MOST_NUMBERS} are returned, so choose fewer "
                       "layers or heads, or reduce max_tokens", param="inspect")
    tokens_1T, segment_ids_1T = pad_right([ids], config.max_len)
    options = {} if edits is None else {"intervene": row_edits([edits], config)}
    model: Any = served.model  # a decoder, because it has written a text
    traced: Any = trace(model, tokens_1T, segment_ids_BT=segment_ids_1T, **options)
    result: dict[str, Any] = {"token_ids": [*prompt, *new]}
    if what.attention is not None:
        weights_LBNRS = np.asarray(traced.attention(layers=layers, heads=heads, queries=places.tolist()))
        result["attention"] = {"layers": layers, "heads": heads,
                               "weights": _rounded(weights_LBNRS[:, 0, :, :, :len(ids)])}
    if what.lens_layers is not None:
        lens = jax.tree.map(lambda x: np.asarray(x)[what.lens_layers, 0],
                            logit_lens(model, traced, positions=places.tolist(), top_k=what.top_k))
        result["logit_lens"] = {"layers": what.lens_layers, "token_ids": lens.ids.tolist(),
                                "tokens": [[[served.token_text(token) for token in some] for some in of_layer]
                                           for of_layer in lens.ids.tolist()],
                                "probabilities": _rounded(lens.probabilities)}
    if what.residual_layers is not None:
        residual_LBTD = np.asarray(traced.residual, np.float32)[what.residual_layers]
        result["residuals"] = {"layers": what.residual_layers, "vectors": residual_LBTD[:, 0, places].tolist()}
    return result


def _rounded(x: np.ndarray) -> list[Any]:
    """Converts probabilities to lists of numbers with six digits."""
    return np.round(np.asarray(x, np.float64), 6).tolist()
