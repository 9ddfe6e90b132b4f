"""Weights of the models in ``fixtures/models``, made anew from a seed and their names.

Both sides call this: the script that asked transformers for the right values, and the tests. NumPy
promises that ``RandomState`` draws the same numbers in every version.
"""

import json
import pathlib
import re
import shutil
import zlib

import numpy as np

MODELS = pathlib.Path(__file__).parent / "fixtures" / "models"
_IS_SCALE = re.compile(r"(norm|ln_\w+|LayerNorm)\.(weight|gamma)$|layer_norm\w*\.weight$|layernorm\w*\.weight$")


def values(name, shape, seed, norm_mean=1.0):
    """Random float32 values of a tensor: around ``norm_mean`` for the scale of a norm, else around
    0. It is 0 for Gemma, whose norms multiply by 1 plus their scale."""
    drawn = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if _IS_SCALE.search(name):
        return (norm_mean + 0.3 * drawn).astype(np.float32)
    # Values that are the same for all tokens are small, and positions are large, so that greedy
    # texts do not repeat one token.
    size = 0.05 if name.endswith("bias") else 2.0 if "embed_positions" in name else 0.35
    return (size * drawn).astype(np.float32)


def buffer(name, shape, dtype):
    """Buffers that older versions of transformers stored with the weights: masks, positions,
    versions."""
    if name.endswith("position_ids"):
        return np.arange(shape[-1], dtype=dtype).reshape(shape)
    if name.endswith("inv_freq"):
        return (10_000.0 ** (-np.arange(shape[0]) / shape[0])).astype(dtype)
    if name.endswith("attn.bias"):
        return np.tril(np.ones(shape)).astype(dtype)
    if name.endswith("embed_positions.weight"):
        angles = np.arange(shape[0])[:, None] / 10_000.0 ** (2 * np.arange(shape[1] // 2) / shape[1])
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(dtype)
    return np.full(shape, -1e4 if name.endswith("masked_bias") else 3.0, dtype)


def write_weights(directory, table):
    """Writes the safetensors files of a table ``{"seed", "tensors": {name: {...}}}``."""
    from safetensors.numpy import save_file

    files = {}
    for name, entry in table["tensors"].items():
        shape, dtype = entry["shape"], entry.get("dtype", "float32")
        if "buffer" in entry:
            array = buffer(name, shape, dtype)
        else:
            array = values(entry.get("copy_of", name), shape, table["seed"], table.get("norm_mean", 1.0))
        files.setdefault(entry.get("file", "model.safetensors"), {})[name] = array
    for file, tensors in files.items():
        save_file(tensors, pathlib.Path(directory) / file, metadata={"format": "pt"})


def model_directory(case, directory):
    """A directory as transformers has it, of one of the models in ``fixtures/models``."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for path in (MODELS / case).glob("*.json"):
        if path.name != "tensors.json":
            shutil.copy(path, directory)
    write_weights(directory, json.loads((MODELS / case / "tensors.json").read_text()))
    return directory


def cases():
    """The names of all models, such as ``bart-published``."""
    return sorted(path.name for path in MODELS.iterdir())
