"""A family of Hugging Face's models: the tables of its weights and of its settings.

A family says which fields of our config its ``config.json`` can express. What is written is read
back at once, and a field that does not come back as it was is an error: so a field that a family
does not know, because it is new or because nobody thought of it, is never lost in silence.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.mapping import Weight, parameters
from transformer_jax.models.functional import Model

Settings = Mapping[str, Any]

REQUIRED = object()
# How a model was initialised and how a machine computes it: neither changes what a trained model
# is, and a config.json need not tell. The type of the weights is that of the stored tensors.
NOT_OF_THE_TRAINED_MODEL = frozenset({"init_std", "dtype", "param_dtype", "attention_implementation",
                                      "matmul_precision", "remat", "unroll"})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of our config, and the setting of their ``config.json`` that expresses it.

    Attributes:
      ours: name of the field.
      theirs: name of the setting.
      default: our value where a ``config.json`` does not say; ``REQUIRED``: it must say.
      values: their values and ours, where the two differ; no others are expressed. Of several names
        for one of our values the first is written.
      also: further settings that are written with the same value.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    also: tuple[str, ...] = ()

    def read(self, settings: Settings) -> Any:
        """Our value of their settings.

        Raises:
          ValueError: for a value that ours does not have.
        """
        if self.theirs not in settings:
            return self.default
        value = settings[self.theirs]
        return value if self.values is None else translated(value, self.values, self.theirs)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their settings of our config; none for a value that theirs does not have."""
        value = getattr(config, self.ours)
        if self.values is not None:
            names = [theirs for theirs, ours in self.values.items() if ours == value]
            if not names:
                return {}
            value = names[0]
        return dict.fromkeys((self.theirs, *self.also), value)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of Hugging Face's models.

    A field of our config is expressed by ``fixed``, by a row of ``settings`` or by what ``read``
    returns. A config whose other fields are not at their defaults cannot be exported as this
    family.

    Attributes:
      model_type: as ``config.json`` calls it.
      architecture: the class of transformers that our export is for.
      weights: the table; rows whose parameter a config does not make, as the biases of a model
        without, do not apply.
      settings: the fields of our config that one setting of theirs expresses.
      fixed: the fields that have one value in all models of the family.
      requires: settings of theirs that must have these values where ``config.json`` names them.
      read: the fields that take more than one setting, or a setting in another form; ValueError for
        what ours cannot express.
      write: the settings that express those fields, and what else transformers must be told;
        ValueError for what theirs cannot express. It is given ``attention_dropout`` as a number,
        also where it is that of ``dropout``.
      ignored: patterns of tensors in their files that are no weights.
      renames: pairs of a pattern and its replacement: how older files' names become those of the
        table.
    """

    model_type: str
    architecture: str
    weights: tuple[Weight, ...]
    settings: tuple[Setting, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    requires: Settings = dataclasses.field(default_factory=dict)
    read: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}
    write: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def read_config(self, settings: Settings) -> ModelConfig:
        """Our config of their settings.

        Raises:
          ValueError: for what ours cannot express.
        """
        missing = [row.theirs for row in self.settings if row.default is REQUIRED and row.theirs not in settings]
        if missing:
            raise ValueError(f"config.json of this {self.model_type} model lacks {', '.join(missing)}")
        require_settings(settings, self.requires)
        fields = {row.ours: row.read(settings) for row in self.settings}
        return _as_files_tell(ModelConfig(**(dict(self.fixed) | fields | dict(self.read(settings)))))

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Their settings of our config, from which :meth:`read_config` makes the same config.

        Raises:
          ValueError: with all fields that theirs cannot express.
        """
        attention_dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        explicit = dataclasses.replace(config, attention_dropout=attention_dropout)
        settings: dict[str, Any] = {}
        for row in self.settings:
            settings |= row.write(explicit)
        try:
            settings |= self.write(explicit)
            again = self.read_config(json.loads(json.dumps({"model_type": self.model_type} | settings)))
        except ValueError as error:
            raise ValueError(f"{self.model_type}: {error}") from error
        config = _as_files_tell(config)
        wrong = [f"{field.name}={getattr(config, field.name)!r} (expected {self._expected(field.name, again)})"
                 for field in dataclasses.fields(ModelConfig) if field.name not in NOT_OF_THE_TRAINED_MODEL
                 and getattr(config, field.name) != getattr(again, field.name)]
        if wrong:
            raise ValueError(f"{self.model_type}: {', '.join(wrong)}")
        return settings

    def _expected(self, field: str, again: ModelConfig) -> str:
        """What a field may be: the values of its row, or else what a reader makes of the files."""
        choices = next((row.values for row in self.settings if row.ours == field and row.values), None)
        return " or ".join(map(repr, dict.fromkeys(choices.values()))) if choices else repr(getattr(again, field))

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


def _as_files_tell(config: ModelConfig) -> ModelConfig:
    """The config without what means nothing in its model, of which a file says nothing.

    Those are an ``attention_dropout`` that is the same as ``dropout``, and ``num_layers`` of an
    encoder-decoder, each side of which has its own.
    """
    if config.attention_dropout == config.dropout:
        config = dataclasses.replace(config, attention_dropout=None)
    return dataclasses.replace(config, num_layers=config.num_encoder_layers or config.num_layers)


def require_settings(settings: Settings, expected: Settings) -> None:
    """Raises ValueError that lists all settings that are not as expected; absent ones are."""
    wrong = [f"{name}={settings[name]!r} (expected {value!r})" for name, value in expected.items()
             if settings.get(name, value) != value]
    if wrong:
        raise ValueError(f"this {settings.get('model_type')} model has what is not supported here: {', '.join(wrong)}")


def translated(value: Any, table: Mapping[Any, Any], name: str) -> Any:
    """The table's entry; ValueError, with those there are, for a value that is not in it."""
    if value not in table:
        raise ValueError(f"{name}={value!r} is not supported; expected {', '.join(map(str, table))}")
    return table[value]


def read_targets(settings: Settings) -> dict[str, Any]:
    """What our config of an encoder-decoder says of decoding, from their settings.

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
    """The inverse of :func:`read_targets`.

    Without ``start_ids`` it writes that there is no start, because theirs have one by default.
    """
    if len(config.start_ids) > 2:
        raise ValueError(f"start_ids={config.start_ids} are more than the two that theirs can start with")
    settings: dict[str, Any] = {"decoder_start_token_id": None}
    settings |= dict(zip(("decoder_start_token_id", "forced_bos_token_id"), config.start_ids, strict=False))
    return settings | ({"bad_words_ids": [[token] for token in config.banned_ids]} if config.banned_ids else {})
