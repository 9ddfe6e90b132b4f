"""The activations that sparse autoencoders are trained and measured on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from transformer_jax.config.cross_layer_transcoder import CrossLayerTranscoderConfig
from transformer_jax.config.sparse_autoencoder import SparseAutoencoderConfig
from transformer_jax.inspection.collecting import ActivationBatches
from transformer_jax.settings import nearest

_MEASURED_ROWS = 4096


class ActivationSource(Protocol):
    """Activations that can be read many at a time, such as ``tj.inspection.Activations``.

    Attributes:
      dims: The number of values of each site.
      contents: Digests that change when the activations change.
    """

    @property
    def dims(self) -> Mapping[str, int]: ...

    @property
    def contents(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices_B: np.ndarray, /) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Activations that are in memory, for example from a program of your own.

    Attributes:
      arrays: For each name, one row for each token, ``[N, dim]``.

    Raises:
      ValueError: If the arrays have no rows, or different numbers of rows.
    """

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self):
        shapes = {name: np.shape(values) for name, values in self.arrays.items()}
        if not shapes or len({shape[:1] for shape in shapes.values()}) != 1 or min(map(len, shapes.values())) < 1 or (
                not len(self)):
            raise ValueError(f"arrays have the shapes {shapes}; expected one row for each token, [N, dim], in each")

    @property
    def dims(self) -> dict[str, int]:
        """The number of values of each array for one token."""
        return {name: values.shape[1] for name, values in self.arrays.items() if values.ndim == 2}

    @property
    def contents(self) -> list[str]:
        """The digests of the arrays."""
        return [hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() for values in self.arrays.values()]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, indices_B: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows with the given numbers, by name."""
        return {name: values[indices_B] for name, values in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Selected:
    """A part of the rows of other activations, with the arrays that training reads.

    Attributes:
      source: The activations.
      names: The names of the arrays.
      rows: The numbers of the rows.
    """

    source: ActivationSource
    names: tuple[str, ...]
    rows: range

    @property
    def dims(self) -> dict[str, int]:
        """The number of values of each site."""
        return {name: self.source.dims[name] for name in self.names}

    @property
    def contents(self) -> list[str]:
        """The digests of all activations."""
        return self.source.contents

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices_B: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows with the given numbers, and ``tokens``, whose number is the training
        speed that is logged."""
        found = self.source[np.asarray(indices_B) + self.rows.start]
        any_name = self.names[0]
        return {name: found[name] for name in self.names} | {
            "tokens": found.get("tokens", np.zeros(len(found[any_name]), np.int32))}


def check_source(config: SparseAutoencoderConfig | CrossLayerTranscoderConfig, dims: Mapping[str, int]) -> None:
    """Checks that activations fit a model.

    Args:
      config: The settings of the model.
      dims: The number of values of each site of the activations.

    Raises:
      ValueError: If a site is missing, or has another number of values.
    """
    wanted_dims = [("site", *item) for item in config.inputs.items()]
    for field, name, wanted in [*wanted_dims, *(("target", *item) for item in config.outputs.items())]:
        if name not in dims:
            raise ValueError(f"model.{field}={name!r} is not one of the activations given, "
                             f"{', '.join(dims)}{nearest(name, dims)}")
        if dims[name] != wanted:
            raise ValueError(f"the activations at {name!r} have {dims[name]} values, but the model has {wanted}; use "
                             "tj.features.fit_config to make its config")


def fit_config(activations: ActivationSource | ActivationBatches, site: str, target: str | None = None, *,
               num_features: int | None = None, **settings: Any) -> SparseAutoencoderConfig:
    """Makes the config of an autoencoder or transcoder for given activations.

    It sets the dimensions, and the scales that make the mean length of an activation about the root
    of its number of values, so that learning rates and penalties depend little on the model.

    Args:
      activations: What the model will be trained on.
      site: The name of the activation to read.
      target: The name of the activation to compute, for a transcoder.
      num_features: The number of features; by default 8 for each value of the input.
      **settings: Further fields of the config, such as ``activation``.

    Returns:
      The config.

    Raises:
      ValueError: If the activations have no such site, or a setting is not valid.
    """
    dims = activations.dims
    for name in (site, target or site):
        if name not in dims:
            raise ValueError(f"{name!r} is not one of the activations given, {', '.join(dims)}{nearest(name, dims)}")
    sample = _sample(activations)
    is_transcoder = target not in (None, site)
    return SparseAutoencoderConfig(**{
        "site": site, "target": target, "input_dim": dims[site], "output_dim": dims[target or site],
        "num_features": 8 * dims[site] if num_features is None else num_features, "scale": _scale(sample[site]),
        "target_scale": _scale(sample[target]) if target is not None and is_transcoder else None,
        "subtract_bias": not is_transcoder} | settings)


def fit_cross_layer_config(activations: ActivationSource | ActivationBatches, *, site: str = "mlp_input",
                           target: str = "mlp_output", num_features: int | None = None,
                           **settings: Any) -> CrossLayerTranscoderConfig:
    """Makes the config of a cross-layer transcoder for given activations, as ``fit_config`` does.

    Args:
      activations: What the model will be trained on: both sites in every layer, as
        ``tj.inspection.collect(..., ["mlp_input", "mlp_output"], ...)`` makes them.
      site: The site to read in every layer.
      target: The site to compute in every layer.
      num_features: The number of features of each layer; by default 8 for each value of the input.
      **settings: Further fields of the config, such as ``activation``.

    Returns:
      The config.

    Raises:
      ValueError: If the activations do not have the sites in the same layers from 0 on, or a
        setting is not valid.
    """
    dims = activations.dims
    num_layers = sum(name.startswith("layers.") and name.endswith(f".{site}") for name in dims)
    names = [[f"layers.{layer}.{each}" for layer in range(num_layers)] for each in (site, target)]
    missing = [name for name in names[0] + names[1] if name not in dims]
    if missing or not num_layers:
        raise ValueError(f"a cross-layer transcoder reads {site!r} and computes {target!r} in every layer, but "
                         f"{missing[0] if missing else f'layers.0.{site}'} is not one of the activations given, "
                         f"{', '.join(dims)}")
    sample, input_dim = _sample(activations), dims[names[0][0]]
    return CrossLayerTranscoderConfig(**{
        "num_layers": num_layers, "site": site, "target": target, "input_dim": input_dim,
        "output_dim": dims[names[1][0]], "num_features": 8 * input_dim if num_features is None else num_features,
        "scales": tuple(_scale(sample[name]) for name in names[0]),
        "target_scales": tuple(_scale(sample[name]) for name in names[1])} | settings)


def _sample(activations: ActivationSource | ActivationBatches) -> Mapping[str, np.ndarray]:
    """Returns some rows from everywhere."""
    if isinstance(activations, ActivationBatches):
        state = activations.get_state()
        sample = next(activations)
        activations.set_state(state)
        return sample
    count = min(len(activations), _MEASURED_ROWS)
    return activations[np.linspace(0, len(activations) - 1, count).astype(np.int64)]


def _scale(values: np.ndarray) -> float:
    """Returns the power of two that brings the mean length of rows nearest to the root of their
    number of values."""
    length = float(np.linalg.norm(values.astype(np.float32), axis=1).mean())
    return 2.0 ** round(math.log2(math.sqrt(values.shape[1]) / length)) if length > 0 else 1.0
