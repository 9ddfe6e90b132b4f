"""Models from and to directories in Hugging Face's form: ``config.json``, safetensors,
``tokenizer.json``."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from transformer_jax.config import ModelConfig
from transformer_jax.interop import tensors
from transformer_jax.interop.families import family_for, get_family
from transformer_jax.interop.family import Family
from transformer_jax.interop.mapping import Weight, describe, map_parameters, parameters
from transformer_jax.interop.tensors import DTYPES, TensorFiles
from transformer_jax.interop.tokenizer import read_tokenizer, write_tokenizer
from transformer_jax.models.functional import Model, make_model
from transformer_jax.sharding import shardings
from transformer_jax.training.bundle import Bundle

_GENERATION_FILE = "generation_config.json"
# What generation does to a model's targets; how it searches is the caller's choice.
_GENERATION = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")


def from_huggingface(source: str | pathlib.Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> Bundle:
    """Loads a model, its config and its tokenizer.

    Tensors go from disk to the devices one by one, each slice to the device that holds it: the host
    never has more than the largest tensor of the files, in the type that it is loaded as.

    Args:
      source: a directory that transformers' ``save_pretrained`` wrote; or the id of a model on the
        Hugging Face hub, such as ``"openai-community/gpt2"``, whose JSON and safetensors files are
        fetched.
      dtype: of parameters and computing, such as ``"bfloat16"``; ``None``: the type of the stored
        tensors.
      mesh: where to put the model, sharded by the logical axes of its parameters; ``None``: on the
        first device.

    Raises:
      ValueError: for an architecture that is not known, missing or left-over tensors or wrong
        shapes (all of them are listed), weights in pickle only, or settings that our models do not
        have.
    """
    directory = _directory(source)
    settings = read_settings(directory)
    try:
        family = get_family(settings.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{directory} cannot be loaded: {error}") from None
    files = TensorFiles.open(directory, family.renamed)
    config = family.read_config(settings)
    stored = _stored_dtype(files, directory)
    config = config.replace(dtype=dtype or stored, param_dtype=dtype or stored)
    tokenizer = read_tokenizer(directory, settings)
    return Bundle(model=_read_model(family, config, files, directory, mesh), tokenizer=tokenizer, config=config)


def to_huggingface(bundle: Bundle, directory: str | pathlib.Path, *, model_type: str | None = None) -> None:
    """Writes a model so that transformers' ``from_pretrained`` and :func:`from_huggingface` find
    it.

    Args:
      bundle: the model and its config.
      directory: made if it is not there; files of an earlier model in it are replaced.
      model_type: the family to write it as; ``None``: the first that can express the config.

    Raises:
      ValueError: when the family cannot express the config, or none of those known can; it names
        each field that stands in the way.
    """
    if model_type is None:
        family, settings = family_for(bundle.config)
    else:
        family = get_family(model_type)
        settings = family.write_config(bundle.config)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors.write(directory, _their_tensors(family, bundle.model))
    settings = write_tokenizer(directory, bundle.tokenizer) | settings | {
        "model_type": family.model_type, "architectures": [family.architecture], "dtype": bundle.config.param_dtype}
    _write_json(directory / "config.json", settings)
    # transformers ignores what config.json says of decoding, but for the token that starts it.
    (directory / _GENERATION_FILE).unlink(missing_ok=True)
    if settings.keys() & set(_GENERATION[1:]):
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(directory / _GENERATION_FILE, {name: settings[name] for name in (*_GENERATION, *ids)
                                                   if settings.get(name) is not None})


def read_settings(directory: pathlib.Path) -> dict[str, Any]:
    """The settings in a directory's ``config.json``, with what its ``generation_config.json`` says
    of decoding."""
    try:
        settings = _read_json(directory / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{directory} has no config.json; expected a directory that transformers' save_pretrained "
                         "wrote") from None
    if (directory / _GENERATION_FILE).is_file():
        generation = _read_json(directory / _GENERATION_FILE)
        settings |= {name: generation[name] for name in _GENERATION if name in generation}
    return settings


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _write_json(path: pathlib.Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _directory(source: str | pathlib.Path) -> pathlib.Path:
    if pathlib.Path(source).is_dir():
        return pathlib.Path(source)
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no directory {source}")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"there is no directory {source}; to fetch a model of this name from the Hugging Face hub, "
                         'pip install "transformer_jax[hf]"') from None
    patterns = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"there is no directory {source}, and no model of this name could be fetched from the Hugging "
                         f"Face hub: {error}") from error


def _stored_dtype(files: TensorFiles, directory: pathlib.Path) -> str:
    """The type of the tensors; of several, the one that holds the values of all."""
    found = set(files.dtypes.values()) & set(DTYPES)
    if not found:
        raise ValueError(f"{directory} has no tensors of {', '.join(DTYPES)}; its types are "
                         f"{describe(set(files.dtypes.values()))}")
    return DTYPES[found.pop()] if len(found) == 1 else "float32"


def _read_model(family: Family, config: ModelConfig, files: TensorFiles, directory: pathlib.Path,
                mesh: Mesh | None) -> Model:
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    rows = family.rows(shapes)
    _check(family, rows, parameters(shapes), files, directory)
    where = None if mesh is None else parameters(shardings(shapes, mesh))
    largest = max(math.prod(shape) for shape in files.shapes.values())

    def read(path: str, node: nnx.Variable) -> nnx.Variable:
        sharding = SingleDeviceSharding(jax.devices()[0]) if where is None else where[path].get_raw_value()
        if not rows[path].stacked or math.prod(node.shape) <= largest:
            return node.replace(_from_files(files, rows[path], node, sharding, slice(0, node.shape[0])))
        whole = jnp.zeros(node.shape, node.dtype, device=sharding)
        for layer in range(node.shape[0]):
            one = _from_files(files, rows[path], node, sharding, slice(layer, layer + 1))
            whole = jax.block_until_ready(_put_layer(whole, one, layer))
        return node.replace(whole)

    return map_parameters(read, shapes)


def _from_files(files: TensorFiles, weight: Weight, node: nnx.Variable, sharding: Sharding, rows: slice) -> jax.Array:
    """Rows of one of our parameters, along its first axis: of a stacked one, layers."""
    slices: dict[str, np.ndarray] = {}  # devices that hold the same slice share one reading

    def read_slice(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in slices:
            start, stop, _ = index[0].indices(rows.stop - rows.start)
            inside = (slice(rows.start + start, rows.start + stop), *index[1:])
            slices[str(index)] = files.read(weight, node.shape, np.dtype(node.dtype), inside)
        return slices[str(index)]

    return jax.make_array_from_callback((rows.stop - rows.start, *node.shape[1:]), sharding, read_slice)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(whole: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)


def _check(family: Family, rows: dict[str, Weight], nodes: dict[str, nnx.Variable], files: TensorFiles,
           directory: pathlib.Path) -> None:
    """Raises ValueError that lists what is missing, left over, of a wrong shape or type, or not
    equal though tied."""
    wanted: dict[str, tuple[int, ...]] = {}
    copies: dict[str, str] = {}
    for path, weight in rows.items():
        shape = tuple(nodes[path].shape)
        for layer in range(shape[0] if weight.stacked else 1):
            wanted[weight.their_name(layer)] = weight.their_shape(shape)
        copies |= {name: weight.theirs for name in weight.also}
    found = {name for name in files.shapes if not family.is_ignored(name)}
    # Of equal tensors a file may hold one, under any of their names.
    for name, original in copies.items():
        if name in found and original not in found:
            for table in (files.places, files.shapes, files.dtypes):
                table[original] = table[name]
            found.add(original)
    problems = {
        "missing": wanted.keys() - found,
        "left over": found - wanted.keys() - copies.keys(),
        "of another shape": {f"{name} is {list(files.shapes[name])}, expected {list(shape)}"
                             for name, shape in wanted.items() if name in found and files.shapes[name] != shape},
        "of a type that is not supported": {f"{name} is {files.dtypes[name]}" for name in wanted.keys() & found
                                            if files.dtypes[name] not in DTYPES}}
    problems["tied, yet different"] = {
        f"{name} and {original}" for name, original in copies.items() if name in found and original in wanted
        and (files.shapes[name] != files.shapes[original] or not files.equal(name, original))}
    if any(problems.values()):
        listed = "".join(f"\n  {kind}: {describe(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the tensors in {directory} are not those of a {family.model_type} model of its "
                         f"config.json:{listed}")


def _their_tensors(family: Family, model: Model):
    """Name, shape, type and a maker of the values of every tensor of a file."""
    nodes, rows = parameters(model), family.rows(model)
    parts: dict[str, list[str]] = {}
    for path, weight in rows.items():
        for layer in range(nodes[path].shape[0] if weight.stacked else 1):
            parts.setdefault(weight.their_name(layer), []).append((path, layer))

    def values(name: str) -> np.ndarray:
        arrays = []
        for path, layer in sorted(parts[name], key=lambda place: rows[place[0]].part):
            value = nodes[path][...]
            array = np.asarray(value[layer] if rows[path].stacked else value)
            array = array.T if rows[path].transposed else array
            arrays.append(array[None] if rows[path].is_row else array)
        axis = 0 if rows[path].transposed else -1
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)

    for name, places in parts.items():
        path, _ = places[0]
        shape = rows[path].their_shape(tuple(nodes[path].shape))
        yield name, shape, np.dtype(nodes[path].dtype), lambda name=name: values(name)
