"""How a family of Hugging Face's models maps to ours: a table of names and layouts, and two functions of configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.functional import Model

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our parameters, and where its values stand in their files.

    Attributes:
      ours: path of the parameter, such as ``"stack.blocks.mlp.up.kernel"``.
      theirs: name of their tensor; with ``{layer}`` where ours has a leading layer axis and they have a tensor a layer.
      transposed: whether theirs is ``[out, in]`` where ours is ``[in, out]``.
      part: ``(index, count)``: ours is this one of ``count`` equal parts of theirs, along our last axis.
      also: names under which a file may hold the same values once more, as that of a tied table.
      is_row: whether theirs has an axis of size 1 before those of ours.
      beside: path of a parameter that a model must have too for the row to apply; of several rows for a parameter, the
        first that applies counts.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    also: tuple[str, ...] = ()
    is_row: bool = False
    beside: str | None = None

    def their_name(self, layer: int) -> str:
        """The name of a layer's tensor."""
        return self.theirs.format(layer=layer)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each of their tensors, given that of our parameter."""
        *first, last = shape[1:] if self.stacked else shape
        theirs = (*first, last * self.part[1])
        theirs = theirs[::-1] if self.transposed else theirs
        return (1, *theirs) if self.is_row else theirs

    @property
    def stacked(self) -> bool:
        """Whether they have a tensor a layer."""
        return "{layer}" in self.theirs


def linear(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """A linear map of torch, whose weight is ``[out, in]``, and its bias."""
    return (Weight(f"{ours}.kernel", f"{theirs}.weight", transposed=True), Weight(f"{ours}.bias", f"{theirs}.bias"))


def norm(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """A norm's scale, and its bias where it has one."""
    return Weight(f"{ours}.scale", f"{theirs}.weight"), Weight(f"{ours}.bias", f"{theirs}.bias")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of their models.

    Attributes:
      model_type: as ``config.json`` calls it.
      architecture: the class of transformers that our export is for.
      weights: the table; rows whose parameter a config does not make, as the biases of a model without, do not apply.
      read_config: our config of their settings; ValueError for what ours cannot express.
      write_config: their settings of our config; ValueError for what theirs cannot express.
      ignored: patterns of tensors in their files that are no weights.
      renames: pairs of a pattern and its replacement: how older files' names become those of the table.
    """

    model_type: str
    architecture: str
    weights: tuple[Weight, ...]
    read_config: Callable[[Settings], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def renamed(self, name: str) -> str:
        """The table's name of a tensor in a file."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is no weight."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def rows(self, model: Model) -> dict[str, Weight]:
        """The rows of the table that apply to a model, by the path of our parameter.

        Raises:
          ValueError: when the model has parameters that the family does not know.
        """
        paths = set(parameters(model))
        rows = {weight.ours: weight for weight in reversed(self.weights)
                if weight.ours in paths and (weight.beside is None or weight.beside in paths)}.values()
        unknown = paths - {weight.ours for weight in rows}
        if unknown:
            raise ValueError(f"a {self.model_type} model has no place for {', '.join(sorted(unknown))}")
        names = {weight.theirs for weight in rows}
        return {weight.ours: dataclasses.replace(weight, also=tuple(name for name in weight.also if name not in names))
                for weight in rows}


def parameters(model: Model) -> dict[str, nnx.Variable]:
    """The parameters of a model (or of its shapes) by path."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_parameter)
    return {path_name(path): leaf for path, leaf in leaves}


def map_parameters(function: Callable[[str, nnx.Variable], Any], model: Model) -> Model:
    """The model with the function applied to the path and value of every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), model,
                                            is_leaf=_is_parameter)


def path_name(path: tuple) -> str:
    """Such as ``"stack.blocks.mlp.up.kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_parameter(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def require_settings(settings: Settings, expected: Settings) -> None:
    """Raises ValueError that lists all settings (absent ones are as expected) that are not as our models have them."""
    wrong = [f"{name}={settings[name]!r} (expected {value!r})" for name, value in expected.items()
             if settings.get(name, value) != value]
    if wrong:
        raise ValueError(f"this {settings.get('model_type')} model has what is not supported here: {', '.join(wrong)}")


def require_config(model_type: str, config: ModelConfig, expected: Settings) -> None:
    """Raises ValueError that lists all fields of our config that a family of theirs does not have."""
    wrong = [f"{name}={getattr(config, name)!r} (expected {value!r})" for name, value in expected.items()
             if getattr(config, name) != value]
    if wrong:
        raise ValueError(f"{model_type}: {', '.join(wrong)}")


def read_targets(settings: Settings) -> dict[str, Any]:
    """What our config of an encoder-decoder says of decoding, from theirs (and their ``generation_config.json``).

    Raises:
      ValueError: for a forbidden sequence of several tokens.
    """
    starts = (settings.get("decoder_start_token_id"), settings.get("forced_bos_token_id"))
    banned = settings.get("bad_words_ids") or []
    if any(len(ids) != 1 for ids in banned):
        raise ValueError(f"bad_words_ids={banned} forbids sequences of tokens; here single tokens can be forbidden")
    return {"start_ids": tuple(token for token in starts if token is not None),
            "banned_ids": tuple(token for token, in banned)}


def write_targets(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_targets`."""
    if len(config.start_ids) > 2:
        raise ValueError(f"start_ids={config.start_ids} are more than the two that theirs can start with")
    settings = dict(zip(("decoder_start_token_id", "forced_bos_token_id"), config.start_ids, strict=False))
    return settings | ({"bad_words_ids": [[token] for token in config.banned_ids]} if config.banned_ids else {})


def translated(value: str, table: Mapping[str, str], name: str) -> str:
    """The table's entry; ValueError, with those there are, for a value that is not in it."""
    if value not in table:
        raise ValueError(f"{name}={value!r} is not supported; expected {', '.join(table)}")
    return table[value]


def describe(items: Iterable[str], most: int = 40) -> str:
    """A list to show, of so many items at most."""
    items = sorted(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
