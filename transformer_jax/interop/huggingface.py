"""Load models from directories in the Hugging Face format, and write them: ``config.json``,
safetensors and ``tokenizer.json``."""

from __future__ import annotations

import functools
import math
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from transformer_jax.config import ModelConfig
from transformer_jax.data.chat_templates import with_chat_template
from transformer_jax.data.files import decode_utf8
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.files import naming
from transformer_jax.interop import tensors
from transformer_jax.interop.checking import check_sizes, check_tensors, stored_dtype, with_stored_ties
from transformer_jax.interop.classifiers import variant
from transformer_jax.interop.families import family_for, form_for, get_family
from transformer_jax.interop.family import Family
from transformer_jax.interop.mapping import Weight, describe, map_parameters, parameters
from transformer_jax.interop.model_files import (
    CONFIG,
    earlier_model_type,
    read_kept,
    read_settings,
    write_config,
    write_generation,
    write_templates,
)
from transformer_jax.interop.setting import Settings
from transformer_jax.interop.tensors import TensorFiles
from transformer_jax.interop.tokenizer import read_tokenizer, write_tokenizer
from transformer_jax.interop.weight_files import weight_files
from transformer_jax.models.functional import Model, make_model
from transformer_jax.settings import check_type, checked_path
from transformer_jax.sharding import shardings
from transformer_jax.training.bundle import Bundle


def from_huggingface(source: str | pathlib.Path, *, dtype: str | None = None, mesh: Mesh | None = None,
                     revision: str | None = None) -> Bundle:
    """Loads a model, its config and its tokenizer from files in the Hugging Face format.

    The function copies tensors from disk to the devices one after another, each slice to the device
    that holds it. So host memory never holds more than the largest tensor of the files, or the
    experts of one layer, in the dtype of the loaded parameters. On a CPU the function copies each
    value once, from the mapped file into the parameter.

    Args:
      source: a directory that ``save_pretrained`` of transformers wrote, or the id of a model on
        the Hugging Face hub, such as ``"openai-community/gpt2"``. In the second case the function
        downloads the JSON, safetensors and tokenizer files.
      dtype: the dtype of the parameters and of the computation, such as ``"bfloat16"``; ``None``
        for the dtype of the stored tensors.
      mesh: the mesh over which the parameters are sharded by their logical axes; ``None`` to put
        the model on the first device.
      revision: the branch, tag or commit on the hub, such as ``"step1000"`` for a checkpoint of a
        Pythia model; ``None`` for the main branch. A local directory has no revisions.

    Returns:
      A bundle with the model, its tokenizer (or ``None``), its config, and the texts of files that
      ``to_huggingface`` writes again.

    Raises:
      ValueError: if the architecture is not supported, if tensors are missing, unexpected or of a
        wrong shape (the message lists all of them), if the weights exist only as pickle files, or
        if our config cannot express the settings.
    """
    directory = _directory(source, revision)
    settings = read_settings(directory)
    try:
        family = variant(get_family(settings.get("model_type")), settings)
    except ValueError as error:
        raise ValueError(f"{directory} cannot be loaded: {error}") from None
    try:
        config = family.read_config(settings)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {family.in_their_words(str(error))}") from error
    files = family.convert(TensorFiles.open(weight_files(directory, settings), family.renamed))
    check_sizes(family, config, files, directory)
    config = with_stored_ties(family, config, files, directory, settings)
    stored = stored_dtype(files, directory)
    config = config.replace(dtype=dtype or stored, param_dtype=dtype or stored)
    tokenizer, template = read_tokenizer(directory, settings), directory / "chat_template.jinja"
    if isinstance(tokenizer, HuggingFaceTokenizer) and template.is_file():
        tokenizer = with_chat_template(tokenizer, decode_utf8(template, template.read_bytes(), 0))
    model = read_model(family, config, files, directory, mesh, settings)
    return Bundle(model=model, tokenizer=tokenizer, config=config, files=read_kept(directory))


def to_huggingface(bundle: Bundle, directory: str | pathlib.Path, *, model_type: str | None = None) -> None:
    """Writes a model in the Hugging Face format, which ``from_pretrained`` of transformers and
    ``from_huggingface`` can load.

    Args:
      bundle: the model, its config and its tokenizer.
      directory: the directory to write. The function creates it if it does not exist, and replaces
        the files of an earlier model.
      model_type: the family to write; ``None`` for the family that the bundle was loaded from, or
        else the first family that can express the config.

    Raises:
      ValueError: if the family, or every family, cannot express the config. The message names each
        field that prevents it.
    """
    check_type("bundle", bundle, Bundle, "a tj.Bundle, as tj.load and tj.train return it")
    if not isinstance(bundle.config, ModelConfig):
        raise ValueError(f"a model of family {bundle.config.family!r} cannot be written in the Hugging Face format, "
                         "which is for Transformers only; use tj.save")
    if bundle.config.family == "electra":
        raise ValueError("this bundle holds two models, the generator and the discriminator of ELECTRA; write one of "
                         "them: tj.Bundle(model.discriminator, tokenizer, model.discriminator.config)")
    directory = checked_path("directory", directory)
    if model_type is None:
        family, settings = family_for(bundle.config, first=earlier_model_type(bundle.files))
    else:
        family, settings = form_for(get_family(model_type), bundle.config)
    directory.mkdir(parents=True, exist_ok=True)
    with naming(directory):
        tensors.write(directory, _their_tensors(family, bundle.model))
        ids = write_tokenizer(directory, bundle.tokenizer)
        settings |= {"model_type": family.model_type, "architectures": [family.architecture],
                     "dtype": bundle.config.param_dtype}
        settings = write_config(directory, family, settings, ids, bundle.files)
        ends = () if bundle.tokenizer is None else tuple(bundle.tokenizer.end_ids)
        write_generation(directory, bundle.config, settings, ends, bundle.files)
        write_templates(directory, bundle.files)


def _directory(source: str | pathlib.Path, revision: str | None) -> pathlib.Path:
    """Returns a local directory, after a download if ``source`` is the id of a model."""
    path = checked_path("source", source)
    if revision is not None:
        check_type("revision", revision, str, "the name of a branch, a tag or a commit")
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a model on the Hugging Face hub, but {path} is a directory "
                             "on this machine; leave revision out, or give the id of a model")
        return path
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no directory {source}")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"there is no directory {source}; to fetch a model of this name from the Hugging Face hub, "
                         'pip install "transformer_jax[hf]"') from None
    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.spm", "*.txt"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        wanted = "" if revision is None else f" with revision={revision!r}"
        raise ValueError(f"there is no directory {source}, and no model of this name{wanted} could be fetched from the "
                         f"Hugging Face hub: {' '.join(str(error).split())}") from error


def read_model(family: Family, config: ModelConfig, files: TensorFiles, directory: pathlib.Path,
                mesh: Mesh | None, settings: Settings) -> Model:
    """Reads all parameters of a model from files onto its devices.

    Args:
      family: the family of the model.
      config: the config of the model.
      files: the tensors of the model.
      directory: the directory or the file that has the tensors, for error messages.
      mesh: the mesh over which the parameters are sharded; ``None`` for the first device.
      settings: the settings in ``config.json``.

    Returns:
      The model.

    Raises:
      ValueError: if tensors are missing, unexpected or of a wrong shape.
    """
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    rows = family.rows(shapes)
    absent = check_tensors(family, rows, parameters(shapes), files, directory, settings)
    where = None if mesh is None else parameters(shardings(shapes, mesh))
    largest = max(math.prod(shape) for shape in files.shapes.values())
    new = _new_head(config, {path for path in absent if rows[path].default is None}, directory)

    def read(path: str, node: nnx.Variable) -> nnx.Variable:
        sharding = SingleDeviceSharding(jax.devices()[0]) if where is None else where[path].get_raw_value()
        if path in absent:
            default = rows[path].default
            value = new[path] if default is None else jnp.full(node.shape, default, node.dtype)
            return node.replace(jax.device_put(value, sharding))
        if _in_host_memory(sharding) or not rows[path].stacked or math.prod(node.shape) <= largest:
            return node.replace(_from_files(files, rows[path], node, sharding, slice(0, node.shape[0])))
        whole = jnp.zeros(node.shape, node.dtype, device=sharding)
        for layer in range(node.shape[0]):
            one = _from_files(files, rows[path], node, sharding, slice(layer, layer + 1))
            whole = jax.block_until_ready(_put_layer(whole, one, layer))
        return node.replace(whole)

    return map_parameters(read, shapes)


def _in_host_memory(sharding: Sharding) -> bool:
    """Returns True if the memory of the devices is that of the host, so that an array of NumPy can
    become one of JAX without a copy."""
    return all(device.platform == "cpu" for device in sharding.device_set)


def _new_head(config: ModelConfig, paths: set[str], directory: pathlib.Path) -> dict[str, jax.Array]:
    """Makes random values for the head of a model that was saved without it, and warns about it."""
    if not paths:
        return {}
    warnings.warn(f"{directory} holds a model without its head, so the head is new and untrained: {describe(paths)}. "
                  "The hidden states are correct, but the logits mean nothing until you train the head", stacklevel=4)

    @jax.jit  # XLA removes the computation of all other parameters
    def make(key: jax.Array) -> dict[str, jax.Array]:
        values = parameters(make_model(config, key=key))
        return {path: values[path][...] for path in paths}

    return make(jax.random.key(0))


def _from_files(files: TensorFiles, weight: Weight, node: nnx.Variable, sharding: Sharding, rows: slice) -> jax.Array:
    """Reads rows of one of our parameters along its first axis, which is the layer axis if the
    parameter is stacked."""
    slices: dict[str, np.ndarray] = {}  # devices that hold the same slice read it once

    def read_slice(index: tuple[slice, ...] | None) -> np.ndarray:
        if index is None:
            raise TypeError("JAX gave no index for a slice; expected a tuple of slices")
        if str(index) not in slices:
            start, stop, _ = index[0].indices(rows.stop - rows.start)
            inside = (slice(rows.start + start, rows.start + stop), *index[1:])
            slices[str(index)] = files.read(weight, node.shape, np.dtype(node.dtype), inside)
        return slices[str(index)]

    return jax.make_array_from_callback((rows.stop - rows.start, *node.shape[1:]), sharding, read_slice)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(whole: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """Writes one layer into a stacked parameter, and reuses its memory."""
    return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)


def _their_tensors(family: Family, model: Model):
    """Yields for every tensor to write its name, shape, dtype, and a function that makes its
    values."""
    nodes, rows = parameters(model), family.rows(model)
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for path, weight in rows.items():
        for index, name in weight.their_names(nodes[path].shape).items():
            parts.setdefault(name, []).append((path, index))

    def values(name: str) -> np.ndarray:
        arrays = []
        for path, index in sorted(parts[name], key=lambda place: rows[place[0]].part):
            array = np.asarray(nodes[path][...][index])
            array = array.T if rows[path].transposed else array
            arrays.append(array[None] if rows[path].is_row else array)
        return rows[path].joined(arrays)

    for name, places in parts.items():
        path, _ = places[0]
        shape = rows[path].their_shape(tuple(nodes[path].shape))
        yield name, shape, np.dtype(nodes[path].dtype), lambda name=name: values(name)
