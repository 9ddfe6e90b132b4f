"""Check that the tensors in files match a model: none is missing or unexpected, and all shapes
agree."""

from __future__ import annotations

import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family
from transformer_jax.interop.mapping import Weight, describe
from transformer_jax.interop.setting import Settings, typed
from transformer_jax.interop.tensors import DTYPES, TensorFiles

_LAYERS = ("num_layers", "num_encoder_layers", "num_decoder_layers")
_SIZES = ("vocab_size", "model_dim", "mlp_dim", "embedding_dim", "num_heads", "num_kv_heads", "head_dim",
          "num_token_types", "relative_buckets", "position_offset")


def check_sizes(family: Family, config: ModelConfig, files: TensorFiles, directory: pathlib.Path) -> None:
    """Raises ValueError if the config has more layers than the files have tensors, or a size larger
    than the number of all values in the files.

    The loader calls this before it makes shapes and names from the config, so that an enormous
    number in a config.json cannot use up memory or time.
    """
    numbers = sum(math.prod(shape) for shape in files.shapes.values())
    sizes = (*_SIZES, "max_len") if config.positions == "learned" else _SIZES
    for fields, limit, unit in ((_LAYERS, len(files.shapes), "tensors"), (sizes, numbers, "numbers")):
        for field in fields:
            size = getattr(config, field) or 0
            if size > limit:
                raise _too_large(f"{family.in_their_words(field)}={size}", limit, unit, directory)
    separate = any("{expert}" in weight.theirs for weight in family.weights)
    most, things = (len(files.shapes), "tensors") if separate else (numbers, "numbers")
    for field, limit, unit in (("num_experts", most, things), ("mlp_dim", numbers, "numbers")):
        size = getattr(config.moe, field, None) or 0
        if size > limit:
            raise _too_large(f"{field} of the experts is {size}", limit, unit, directory)


def _too_large(size: str, limit: int, unit: str, directory: pathlib.Path) -> ValueError:
    """Makes the error for a size that the files cannot have."""
    return ValueError(f"{directory / 'config.json'}: {size}, yet the files beside it have {limit} {unit} in all")


def stored_dtype(files: TensorFiles, directory: pathlib.Path) -> str:
    """Returns the dtype of the tensors; if they have several dtypes, float32, which holds them
    all."""
    stored = set(files.dtypes.values()) & set(DTYPES)
    if not stored:
        raise ValueError(f"{directory} has no tensors of {', '.join(DTYPES)}; its types are "
                         f"{describe(set(files.dtypes.values()))}")
    if "F64" in stored:
        warnings.warn(f"{directory} has tensors of float64, which are rounded to float32", stacklevel=3)
    return DTYPES[stored.pop()] if len(stored) == 1 else "float32"


def is_tied(family: Family, files: TensorFiles) -> bool:
    """Returns True if the files have no unembedding, or one that equals the token embeddings."""
    names = {weight.ours: weight.theirs for weight in family.weights}
    output, table = names.get("embeddings.output"), names.get("embeddings.token", "")
    if output is None or output not in files.shapes or len(files.shapes.get(table, ())) != 2:
        return True  # a table of another shape is refused when all shapes are checked
    return files.shapes[output] == files.shapes[table] and files.equal(output, table)


def with_stored_ties(family: Family, config: ModelConfig, files: TensorFiles, directory: pathlib.Path,
                     settings: Settings) -> ModelConfig:
    """Changes ``tie_embeddings`` in a config where the stored tensors contradict it.

    As in transformers 5, an unembedding that is stored with other values than the token embeddings
    is not tied, whatever ``config.json`` says.

    Returns:
      The config.
    """
    if family.tied_as_stored(settings):
        return config.replace(tie_embeddings=is_tied(family, files))
    if not config.tie_embeddings or is_tied(family, files):
        return config
    warnings.warn(f"{directory / 'config.json'} says that the unembedding is tied to the token embeddings "
                  "(tie_word_embeddings), but the files have different values for the two; they are read as two "
                  "tables, as in transformers", stacklevel=4)
    return config.replace(tie_embeddings=False)


def check_tensors(family: Family, rows: Mapping[str, Weight], nodes: Mapping[str, nnx.Variable], files: TensorFiles,
                  directory: pathlib.Path, settings: Settings) -> set[str]:
    """Compares the tensors in the files with those that a model needs.

    Args:
      family: the family of the model.
      rows: the rows of the family's table that apply, by the path of our parameter.
      nodes: our parameters, or their shapes, by path.
      files: the tensors. If a file stores a tensor under one of its other names, the function makes
        it available under the name in the table.
      directory: the directory of the files, for error messages.
      settings: the content of ``config.json``, which shows whether a model was saved without its
        head.

    Returns:
      The paths of the parameters that the files lack and are allowed to lack.

    Raises:
      ValueError: if tensors are missing, unexpected, of a wrong shape or dtype, or different
        although they are tied. The message lists all of them.
    """
    names = {name for name in files.shapes if not family.is_ignored(name)
             and not _is_skipped(family, name, settings)}
    if (other := family.other_head(settings)) is not None and (head := set(filter(family.is_of_other_head, names))):
        names -= head
        warnings.warn(f"{directory} holds a {other}; its head for that task is left out: {describe(head)}",
                      stacklevel=5)
    copies = {name: weight.theirs for weight in rows.values() for name in weight.also}
    fallbacks = {weight.fallback: weight.theirs for weight in rows.values() if weight.fallback is not None}
    # A file may store only one of several equal tensors, under any of their names.
    for name, original in (copies | fallbacks).items():
        if name in names and original not in names:
            files.give_name(name, original)
            names.add(original)
    absent = _absent(family, rows, names, settings)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, weight in rows.items():
        if path not in absent:
            shape = tuple(nodes[path].shape)
            wanted |= dict.fromkeys(weight.their_names(shape).values(), weight.their_shape(shape))
    wrong_shape = {name for name, shape in wanted.items() if name in names and files.shapes[name] != shape}
    problems = {
        "missing": wanted.keys() - names,
        "left over": names - wanted.keys() - copies.keys() - fallbacks.keys(),
        "of another shape": {f"{name} is {list(files.shapes[name])}, expected {list(wanted[name])}"
                             for name in wrong_shape},
        "of a type that is not supported": {f"{name} is {files.dtypes[name]}" for name in wanted.keys() & names
                                            if files.dtypes[name] not in DTYPES},
        "different from the values that this library computes": {
            name for pattern, make in family.constants.items() for name in files.shapes
            if re.fullmatch(pattern, name) and not _is_constant(files, name, make)},
        "tied, yet different": {
            f"{name} and {original}" for name, original in copies.items()
            if name in names and original in wanted and original not in wrong_shape
            and (files.shapes[name] != files.shapes[original] or not files.equal(name, original))}}
    if any(problems.values()):
        listed = "".join(f"\n  {kind}: {describe(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the tensors in {directory} are not those of a {family.model_type} model of its "
                         f"config.json:{listed}")
    return absent


def _is_skipped(family: Family, name: str, settings: Settings) -> bool:
    """Returns True for a tensor of a layer that the loader leaves out, see
    ``Family.skipped_layers``."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None or family.skipped_layers is None:
        return False
    first = settings["num_hidden_layers"]
    return first <= int(layer[1]) < first + typed(settings, family.skipped_layers, int, 0)


def _is_constant(files: TensorFiles, name: str, make: Callable[[int, int], np.ndarray]) -> bool:
    """Returns True if a tensor equals the values that ``make`` computes, up to bfloat16
    rounding."""
    shape = files.shapes[name]
    if len(shape) != 2 or files.dtypes[name] not in DTYPES:
        return False
    return np.allclose(files.whole(name).astype(np.float32), make(*shape), atol=5e-3)


def _absent(family: Family, rows: Mapping[str, Weight], names: set[str], settings: Settings) -> set[str]:
    """Returns the parameters that the files lack and are allowed to lack: those with a default
    value, and the whole head of a model that was saved without its head."""
    lacking = {path for path, weight in rows.items() if weight.theirs not in names and not weight.stacked}
    absent = {path for path in lacking if rows[path].default is not None}
    head = {path for path in rows if is_of_head(path)}
    architectures = settings.get("architectures")
    is_body = not isinstance(architectures, list) or family.body in architectures
    # A head for another task may have a part of ours, such as the hidden layer of ModernBERT's heads.
    if family.other_head(settings) is not None or (is_body and head <= lacking):
        absent |= head & lacking
    return absent


def is_of_head(path: str) -> bool:
    """Returns True if a parameter belongs to the head: an untied unembedding, or the prediction
    head of an encoder."""
    return path == "embeddings.output" or path.startswith("head.")
