"""Reads and writes the files of SAELens: ``cfg.json`` and ``sae_weights.safetensors``."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from transformer_jax.config.sparse_autoencoder import SparseAutoencoderConfig
from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.features.splicing import in_own_units
from transformer_jax.files import naming, save_tensors
from transformer_jax.inspection.activations import need_safetensors
from transformer_jax.json_files import located, read_json
from transformer_jax.settings import checked_path
from transformer_jax.training.bundle import Bundle

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

# Their name of an architecture -> our activation, and whether it is a transcoder.
_ARCHITECTURES = {"standard": ("relu", False), "topk": ("topk", False), "jumprelu": ("jumprelu", False),
                  "gated": ("gated", False), "transcoder": ("relu", True), "jumprelu_transcoder": ("jumprelu", True)}
# Our parameter -> their tensor. Our encoder is [F, D] and theirs [D, F].
_TENSORS = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec",
            "threshold": "threshold", "magnitude_scale": "r_mag", "magnitude_bias": "b_mag"}
# Our site -> the name of the hook in TransformerLens.
HOOKS = {"residual": "hook_resid_pre", "mlp_output": "hook_mlp_out", "attention_output": "hook_attn_out",
          "residual_middle": "hook_resid_mid", "mlp_input": "ln2.hook_normalized", "neurons": "mlp.hook_post",
          "head_output": "attn.hook_z"}
DTYPES = {"float32": np.dtype(np.float32), "torch.float32": np.dtype(np.float32),
           "bfloat16": np.dtype(ml_dtypes.bfloat16), "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
           "float16": np.dtype(np.float16), "torch.float16": np.dtype(np.float16)}


class _Hooks(TypedDict, total=False):
    """The metadata in ``cfg.json`` that is read."""

    hook_name: str | None
    hook_name_out: str | None


class _Theirs(_Hooks, total=False):
    """The part of ``cfg.json`` that is read. Older versions have the metadata beside the rest."""

    architecture: str
    activation_fn: str | None
    activation_fn_str: str | None
    activation_fn_kwargs: dict[str, Any] | None
    apply_b_dec_to_input: bool
    d_in: int | None
    d_out: int | None
    d_sae: int | None
    hook_point: str | None
    k: int | None
    metadata: _Hooks | None


def from_saelens(directory: str | pathlib.Path, *, site: str | None = None, target: str | None = None) -> Bundle:
    """Reads an autoencoder or a transcoder that SAELens saved (version 4 or later).

    Args:
      directory: The directory with ``cfg.json`` and ``sae_weights.safetensors``.
      site: The name of the activation to read, such as ``"layers.3.residual"``. By default that of
        the hook in the file.
      target: The name of the activation to compute, for a transcoder.

    Returns:
      A bundle without a tokenizer. Its ``files`` keep ``cfg.json``, so that ``to_saelens`` writes
      the same files again.

    Raises:
      ValueError: If a file is missing or damaged, or the model has a part that ours does not have.
      ImportError: If safetensors is not installed.
    """
    need_safetensors("from_saelens reads safetensors files")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = checked_path("directory", directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} has no {name}; expected the directory that SAELens's save_model wrote")
    settings = cast(dict[str, Any], read_json(directory / CONFIG, _Theirs))
    try:
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is not a complete safetensors file ({error})") from error
    config = _config(settings, tensors, directory / CONFIG, site, target)
    model = SparseAutoencoder(config, key=jax.random.key(0))
    names = _names(config)
    if set(tensors) != set(names.values()):
        raise ValueError(f"{directory / WEIGHTS} has the tensors {', '.join(sorted(tensors))}; expected "
                         f"{', '.join(sorted(names.values()))}")
    for ours, theirs in names.items():
        value = jnp.asarray(tensors[theirs].astype(np.float32))
        value = value.T if ours == "encoder" else value
        parameter = getattr(model, ours)
        if value.shape != parameter.shape:
            raise ValueError(f"{directory / WEIGHTS} has {theirs} as {list(tensors[theirs].shape)}, which does not fit "
                             "the other tensors")
        parameter.set_value(value)
    return Bundle(model=cast(Any, model), tokenizer=None, config=cast(Any, config),
                  files={CONFIG: (directory / CONFIG).read_text("utf-8")})


def to_saelens(directory: str | pathlib.Path, bundle_or_model: Any) -> None:
    """Writes an autoencoder or a transcoder in the form that SAELens reads.

    The scales of the config become a part of the weights; they are powers of two, so nothing is
    rounded. SAELens has no ``batch_topk`` for use: like SAELens itself, this writes ``jumprelu``
    with one threshold.

    Args:
      directory: The directory to write, which is created if it does not exist.
      bundle_or_model: A bundle, as ``tj.train``, ``tj.load`` and ``from_saelens`` return it, or a
        model.

    Raises:
      ValueError: If SAELens has no such model.
      ImportError: If safetensors is not installed.
    """
    need_safetensors("to_saelens writes safetensors files")
    directory = checked_path("directory", directory)
    model: SparseAutoencoder = getattr(bundle_or_model, "model", bundle_or_model)
    kept = json.loads(getattr(bundle_or_model, "files", {}).get(CONFIG, "{}"))
    settings = kept | _settings(model.config, kept)
    model, dtype = in_own_units(model), DTYPES[settings["dtype"]]
    tensors = {theirs: np.asarray(getattr(model, ours)[...]) for ours, theirs in _names(model.config).items()}
    tensors["W_enc"] = tensors["W_enc"].T
    if "threshold" in tensors:
        tensors["threshold"] = np.broadcast_to(tensors["threshold"], model.config.num_features)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / WEIGHTS, {name: np.ascontiguousarray(value.astype(dtype))
                                       for name, value in tensors.items()})
    with naming(directory / CONFIG):
        (directory / CONFIG).write_text(json.dumps(settings), encoding="utf-8")


def _names(config: SparseAutoencoderConfig) -> dict[str, str]:
    """Returns the name of their tensor for each of our parameters."""
    left_out = set() if config.activation in ("jumprelu", "batch_topk") else {"threshold"}
    left_out |= set() if config.activation == "gated" else {"magnitude_scale", "magnitude_bias"}
    names = {ours: theirs for ours, theirs in _TENSORS.items() if ours not in left_out}
    return names | ({"encoder_bias": "b_gate"} if config.activation == "gated" else {})


def _config(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], path: pathlib.Path, site: str | None,
            target: str | None) -> SparseAutoencoderConfig:
    """Makes our config from theirs.

    Raises:
      ValueError: If theirs has a value that ours cannot express.
    """
    architecture = settings.get("architecture", "standard")
    k = settings.get("k", (settings.get("activation_fn_kwargs") or {}).get("k"))
    if architecture == "standard" and settings.get("activation_fn", settings.get("activation_fn_str")) == "topk":
        architecture = "topk"  # before version 6
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{path}: architecture={architecture!r} is not one of {', '.join(_ARCHITECTURES)}")
    for name, allowed in (("normalize_activations", ("none", None)), ("finetuning_scaling_factor", (False, None)),
                          ("rescale_acts_by_decoder_norm", (False, None)), ("dtype", (*DTYPES, None))):
        if settings.get(name) not in allowed:
            raise ValueError(f"{path}: {name}={settings[name]!r} is not supported; in SAELens, fold it into the "
                             "weights, for example with sae.fold_W_dec_norm(), and save the result")
    activation, is_transcoder = _ARCHITECTURES[architecture]
    if "W_enc" not in tensors or "W_dec" not in tensors or tensors["W_enc"].ndim != 2 or tensors["W_dec"].ndim != 2:
        raise ValueError(f"{path.parent / WEIGHTS} has no matrices W_enc and W_dec")
    metadata = settings.get("metadata") or {}
    hook = metadata.get("hook_name") or settings.get("hook_name") or settings.get("hook_point") or ""
    hook_out = metadata.get("hook_name_out") or settings.get("hook_name_out") or ""
    (input_dim, num_features), output_dim = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    for name, size in (("d_in", input_dim), ("d_sae", num_features), ("d_out", output_dim)):
        if settings.get(name) not in (None, size):
            raise ValueError(f"{path}: {name}={settings[name]}, but the tensors in {WEIGHTS} have {size}")
    site = _our_name(hook) if site is None else site
    if is_transcoder and target is None:
        target = _our_name(hook_out) if hook_out else site.replace("mlp_input", "mlp_output")
        target = f"{site}.target" if target == site else target
    with located(str(path)):
        return SparseAutoencoderConfig(
            site=site, target=target, input_dim=input_dim, output_dim=output_dim, num_features=num_features,
            activation=activation, k=32 if k is None else k,
            subtract_bias=not is_transcoder and settings.get("apply_b_dec_to_input", True))


def _settings(config: SparseAutoencoderConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Makes their config from ours.

    Raises:
      ValueError: If theirs has no such architecture.
    """
    activation = "jumprelu" if config.activation == "batch_topk" else config.activation
    names = {ours: theirs for theirs, ours in _ARCHITECTURES.items()}
    if (activation, config.is_transcoder) not in names:
        raise ValueError(f"SAELens has no transcoder with activation={config.activation!r}; it has relu and jumprelu")
    hooks = {"hook_name": _their_name(config.site)}
    if config.is_transcoder:
        hooks["hook_name_out"] = _their_name(config.targets)
    metadata = {name: hook for name, hook in hooks.items() if hook} | (kept.get("metadata") or {})
    return {
        "architecture": names[activation, config.is_transcoder], "d_in": config.input_dim,
        "d_sae": config.num_features, "dtype": kept.get("dtype") or "float32", "device": kept.get("device", "cpu"),
        "apply_b_dec_to_input": config.subtract_bias, "normalize_activations": "none",
        "reshape_activations": kept.get("reshape_activations", "hook_z" if "head_output" in config.site else "none"),
        "metadata": {"sae_lens_version": "6.0.0"} | metadata,
    } | ({"k": config.k, "rescale_acts_by_decoder_norm": False} if activation == "topk" else {}) | (
        {"d_out": config.out_dim} if config.is_transcoder else {})


def _our_name(hook: str) -> str:
    """Returns our name for a hook of TransformerLens; an unknown hook keeps its name."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if found is None:
        return hook
    if found[2] == "hook_resid_post":
        return f"layers.{int(found[1]) + 1}.residual"
    ours = {theirs: site for site, theirs in HOOKS.items()}
    return f"layers.{found[1]}.{ours[found[2]]}" if found[2] in ours else hook


def _their_name(name: str) -> str:
    """Returns the name of the hook of TransformerLens for one of our activations."""
    *layer, site = name.split(".")
    return f"blocks.{layer[1]}.{HOOKS[site]}" if len(layer) == 2 and site in HOOKS else name
