"""Reads and writes cross-layer transcoders in the files of circuit-tracer.

The directory holds for each layer i ``W_enc_i.safetensors`` with ``W_enc_i`` ``[F, D]``, ``b_enc_i``
``[F]``, ``b_dec_i`` ``[D]`` and, for ``jumprelu``, ``threshold_i`` ``[F]``; ``W_dec_i.safetensors``
with ``W_dec_i`` ``[F, L - i, D]``; and ``config.yaml`` with the names of the hooks.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.config.cross_layer_transcoder import CrossLayerTranscoderConfig
from transformer_jax.features.cross_layer import CrossLayerTranscoder, in_own_units
from transformer_jax.features.saelens import DTYPES, HOOKS
from transformer_jax.inspection.activations import need_safetensors
from transformer_jax.settings import checked_path, require
from transformer_jax.training.bundle import Bundle

CONFIG = "config.yaml"
_KIND = "cross_layer_transcoder"


def from_circuit_tracer(directory: str | pathlib.Path, *, site: str | None = None,
                        target: str | None = None) -> Bundle:
    """Reads a cross-layer transcoder in the files of circuit-tracer.

    Args:
      directory: The directory with ``W_enc_0.safetensors``, ``W_dec_0.safetensors`` and so on, and
        mostly ``config.yaml``.
      site: The site to read in every layer. By default that of the hook in ``config.yaml``.
      target: The site to compute in every layer. By default that of the hook.

    Returns:
      A bundle without a tokenizer. Its ``files`` keep ``config.yaml``, so that
      ``to_circuit_tracer`` writes it again.

    Raises:
      ValueError: If a file is missing or damaged, or the model has a part that ours does not have.
      ImportError: If safetensors is not installed.
    """
    need_safetensors("from_circuit_tracer reads safetensors files")
    directory = checked_path("directory", directory)
    num_layers = len(list(directory.glob("W_enc_*.safetensors")))
    require(num_layers > 0, f"{directory} has no W_enc_0.safetensors; expected a directory of circuit-tracer")
    text = (directory / CONFIG).read_text("utf-8") if (directory / CONFIG).is_file() else ""
    settings = _settings(text)
    require(settings.get("model_kind", _KIND) == _KIND, f"{directory / CONFIG}: model_kind="
            f"{settings.get('model_kind')!r} is not {_KIND!r}")
    tensors: dict[str, np.ndarray] = {}
    for layer in range(num_layers):
        for name in ("W_enc", "W_dec"):
            tensors |= _read(directory / f"{name}_{layer}.safetensors")
    has_threshold = "threshold_0" in tensors
    encoder, decoder = tensors.get("W_enc_0"), tensors.get("W_dec_0")
    require(encoder is not None and decoder is not None and (encoder.ndim, decoder.ndim) == (2, 3),
            f"{directory} has no W_enc_0 [features, values] and W_dec_0 [features, layers, values]")
    F, D = cast(np.ndarray, encoder).shape
    E = cast(np.ndarray, decoder).shape[-1]
    shapes = _shapes(num_layers, F, D, E, has_threshold)
    found = {name: value.shape for name, value in tensors.items()}
    for name in shapes.keys() | found.keys():
        require(found.get(name) == shapes.get(name), f"{directory} has {name} as {found.get(name)}; expected "
                f"{shapes.get(name)} in a cross-layer transcoder of {num_layers} layers and {F} features")
    layers = range(num_layers)
    stack = lambda name: jnp.stack([jnp.asarray(tensors[f"{name}_{layer}"], jnp.float32) for layer in layers])
    require(not has_threshold or float(stack("threshold").min()) >= 0, f"{directory} has thresholds below 0, with "
            "which features could be negative; ours are not")
    model = CrossLayerTranscoder(CrossLayerTranscoderConfig(
        num_layers=num_layers, input_dim=D, output_dim=E, num_features=F, k=min(32, F),
        activation="jumprelu" if has_threshold else "relu",
        site=_our_site(settings.get("feature_input_hook", "ln2.hook_normalized")) if site is None else site,
        target=_our_site(settings.get("feature_output_hook", "hook_mlp_out")) if target is None else target),
        key=jax.random.key(0))
    for ours, theirs in (("encoder", "W_enc"), ("encoder_bias", "b_enc"), ("decoder_bias", "b_dec"),
                         *([("threshold", "threshold")] if has_threshold else [])):
        getattr(model, ours).set_value(stack(theirs))
    for layer, written in enumerate(model.decoder):
        written.set_value(jnp.asarray(tensors[f"W_dec_{layer}"], jnp.float32))
    return Bundle(model=cast(Any, model), tokenizer=None, config=cast(Any, model.config),
                  files={CONFIG: text} if text else {})


def to_circuit_tracer(directory: str | pathlib.Path, bundle_or_model: Any, *, dtype: str = "float32",
                      model_name: str | None = None) -> None:
    """Writes a cross-layer transcoder in the files of circuit-tracer.

    The scales of the config become a part of the weights; they are powers of two, so nothing is
    rounded. ``batch_topk`` is written as ``jumprelu`` with one threshold.

    Args:
      directory: The directory to write, which is created if it does not exist.
      bundle_or_model: A bundle, as ``tj.train``, ``tj.load`` and ``from_circuit_tracer`` return it,
        or a model.
      dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``. The latter two round the weights, unless
        they were read from such files.
      model_name: The name of the language model, for ``config.yaml``.

    Raises:
      ValueError: If circuit-tracer has no such model.
      ImportError: If safetensors is not installed.
    """
    need_safetensors("to_circuit_tracer writes safetensors files")
    from safetensors.numpy import save_file

    directory = checked_path("directory", directory)
    model: CrossLayerTranscoder = getattr(bundle_or_model, "model", bundle_or_model)
    config = model.config
    require(isinstance(model, CrossLayerTranscoder) and config.activation != "topk",
            f"circuit-tracer has no cross-layer transcoder with activation={config.activation!r} of family "
            f"{config.family!r}; expected a cross-layer transcoder with relu, jumprelu or batch_topk")
    require(dtype in DTYPES, f"dtype={dtype!r} is not one of float32, bfloat16, float16")
    kept = getattr(bundle_or_model, "files", {}).get(CONFIG, "")
    settings = _settings(kept) | {"model_kind": _KIND, "feature_input_hook": _their_hook(config.site),
                                  "feature_output_hook": _their_hook(config.target)}
    settings |= {} if model_name is None else {"model_name": model_name}
    model = in_own_units(model)
    directory.mkdir(parents=True, exist_ok=True)
    for layer in range(config.num_layers):
        tensors = {"W_enc": model.encoder[...][layer], "b_enc": model.encoder_bias[...][layer],
                   "b_dec": model.decoder_bias[...][layer]}
        if model.threshold is not None:
            tensors["threshold"] = jnp.broadcast_to(model.threshold[...], model.encoder_bias.shape)[layer]
        for name, part in (("W_enc", tensors), ("W_dec", {"W_dec": model.decoder[layer][...]})):
            save_file({f"{each}_{layer}": np.ascontiguousarray(np.asarray(value).astype(DTYPES[dtype]))
                       for each, value in part.items()}, directory / f"{name}_{layer}.safetensors")
    text = kept if settings == _settings(kept) else "".join(
        f"{name}: {json.dumps(value)}\n" for name, value in settings.items())  # JSON strings are YAML too
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a file.

    Raises:
      ValueError: If it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    require(path.is_file(), f"{path.parent} has no {path.name}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error


def _shapes(num_layers: int, F: int, D: int, E: int, has_threshold: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        shapes |= {f"W_enc_{layer}": (F, D), f"b_enc_{layer}": (F,), f"b_dec_{layer}": (E,),
                   f"W_dec_{layer}": (F, num_layers - layer, E)}
        shapes |= {f"threshold_{layer}": (F,)} if has_threshold else {}
    return shapes


def _settings(text: str) -> dict[str, str]:
    """Reads the lines ``name: value`` of a simple YAML file; lines of lists are left out."""
    found = re.findall(r"^(\w+):[ \t]+(?:\"([^\"]*)\"|'([^']*)'|([^#\n]*?))[ \t]*(?:#.*)?$", text, re.MULTILINE)
    return {name: "".join(values) for name, *values in found}


def _our_site(hook: str) -> str:
    """Returns our site for a hook of TransformerLens; an unknown hook keeps its name."""
    return {theirs: ours for ours, theirs in HOOKS.items()}.get(hook, hook)


def _their_hook(site: str) -> str:
    """Returns the hook of TransformerLens for one of our sites."""
    return HOOKS.get(site, site)
