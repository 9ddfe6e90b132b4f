"""A family of Hugging Face models: the tables of its weights and of its settings.

A family describes which fields of our config its ``config.json`` can express. The exporter reads
back the settings that it writes, and raises an error if a field changed. So the exporter never
silently loses a field that the family does not express.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.interop.canonical import as_files_tell
from transformer_jax.interop.layer_kinds import OF_LAYERS
from transformer_jax.interop.mapping import Weight, parameters, with_groups
from transformer_jax.interop.setting import REQUIRED, Setting, Settings, checked, require_settings, shown, typed
from transformer_jax.models.functional import Model

if TYPE_CHECKING:
    from transformer_jax.interop.tensors import TensorFiles

# Fields for the initialisation and for the implementation on a device. They do not change what a
# trained model computes, so config.json need not express them. The stored tensors give the dtype.
NOT_OF_THE_TRAINED_MODEL = frozenset({"init_std", "dtype", "param_dtype", "attention_implementation",
                                      "matmul_precision", "remat", "unroll"})
# The suffix of the class name of a model with a head, as in GPT2LMHeadModel.
_HEAD_OF_CLASS = re.compile(r"(For[A-Z]\w*|LMHeadModel|MTModel)$")
# The tensors of the heads for other tasks in transformers, such as classification.
_OTHER_HEADS = re.compile(r"(classifier|score|qa_outputs|classification_head|multiple_choice_head)\..*")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of Hugging Face models.

    A field of our config is expressed by ``fixed``, by a row of ``settings``, or by the result of
    ``read``. A config can be exported as this family only if all its other fields have their
    default values.

    Attributes:
      model_type: the ``model_type`` in ``config.json``.
      architecture: the class in transformers that loads the exported model.
      weights: the table of weights. The code skips rows whose parameter the model does not have,
        such as the biases of a model without biases.
      settings: the fields of our config that a single setting in ``config.json`` expresses.
      fixed: the fields that have the same value in all models of the family.
      requires: settings that must have these values if ``config.json`` contains them.
      read: a function from the settings in ``config.json`` to the fields that depend on several
        settings, or on a setting in another form. It raises ValueError for settings that our config
        cannot express.
      write: a function from our config to the settings for these fields, and to further settings
        that transformers needs. It raises ValueError for fields that ``config.json`` cannot
        express. It receives ``attention_dropout`` as a number even if our config has ``None``.
      ignored: regular expressions for tensors in the files that are not weights.
      constants: regular expressions for tensors that transformers reads but our model computes,
        each with a function that computes them from their shape ``[rows, columns]``. The loader
        raises an error if a stored tensor has other values.
      renames: pairs of a regular expression and a replacement, which convert tensor names in older
        files, and in files of models without their head, to the names in the table.
      tied_as_stored: a function from the settings in ``config.json`` to whether the stored tensors
        decide if the unembedding is tied, as in transformers 5 for T5.
      skipped_layers: the setting with the number of further layers that files may hold after those
        of the model, such as those that predict more tokens. The loader leaves them out.
      quantizations: the names of the formats of few bits (``quant_method``) that ``convert`` reads.
      convert: a function that replaces tensors in such formats by those of the table.
      classifiers: the same models with a head that classifies texts or tokens.
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
    constants: Mapping[str, Callable[[int, int], np.ndarray]] = dataclasses.field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    tied_as_stored: Callable[[Settings], bool] = lambda settings: False
    skipped_layers: str | None = None
    quantizations: tuple[str, ...] = ()
    convert: Callable[[TensorFiles], TensorFiles] = lambda files: files
    classifiers: tuple[Family, ...] = ()

    @property
    def body(self) -> str:
        """The class in transformers of the model without its head, such as ``BertModel``."""
        return _HEAD_OF_CLASS.sub("", self.architecture).removesuffix("Model") + "Model"

    def other_head(self, settings: Settings) -> str | None:
        """Finds out whether a model was saved with a head for another task.

        Args:
          settings: the content of ``config.json``.

        Returns:
          The class in transformers, such as ``BertForSequenceClassification``, or ``None``.
        """
        names = settings.get("architectures")
        wanted = rf"{self.body.removesuffix('Model')}(For[A-Z]\w*|DoubleHeadsModel)"
        return next((name for name in names if isinstance(name, str) and name != self.architecture
                     and re.fullmatch(wanted, name)), None) if isinstance(names, list) else None

    def read_config(self, settings: Settings) -> ModelConfig:
        """Converts the settings in ``config.json`` to our config.

        Args:
          settings: the content of ``config.json``.

        Returns:
          Our config.

        Raises:
          ValueError: if a required setting is missing, or if our config cannot express a setting.
        """
        missing = [row.theirs for row in self.settings if row.default is REQUIRED and row.theirs not in settings]
        if missing:
            raise ValueError(f"config.json of this {self.model_type} model lacks {', '.join(missing)}")
        quantization = settings.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        is_read = isinstance(method, str) and method in self.quantizations
        require_settings(settings, ({} if is_read else {"quantization_config": None}) | dict(self.requires))
        fields = {row.ours: row.read(settings) for row in self.settings}
        return as_files_tell(ModelConfig(**(dict(self.fixed) | fields | dict(self.read(settings)))))

    def in_their_words(self, message: str) -> str:
        """Replaces the names of our config's fields in an error message by those in
        ``config.json``.

        Args:
          message: the error message.

        Returns:
          The message with the names in ``config.json``.
        """
        names = {row.ours: row.theirs for row in self.settings} | {
            "start_ids": "decoder_start_token_id, forced_bos_token_id", "banned_ids": "bad_words_ids",
            "rope_base": "rope_theta"}
        return re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), message)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Converts our config to settings that ``read_config`` converts back to the same config.

        Args:
          config: our config.

        Returns:
          The settings for ``config.json``.

        Raises:
          ValueError: if ``config.json`` cannot express some fields; the message lists all of them.
        """
        if config.vocab_size is None:
            raise ValueError(f"{self.model_type}: vocab_size=None (expected a whole number)")
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
        told = as_files_tell(config)
        wrong = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in NOT_OF_THE_TRAINED_MODEL
                 and getattr(told, field.name) != getattr(again, field.name)]
        # What differs although the field itself is right comes from the pattern of the layers.
        wrong = list(dict.fromkeys(
            "layer_pattern" if name in OF_LAYERS and getattr(config, name) == getattr(again, name) else name
            for name in wrong))
        if wrong:
            raise ValueError(f"{self.model_type}: " + ", ".join(
                f"{name}={getattr(config, name)!r} (expected {self._expected(name, again)})" for name in wrong))
        return settings

    def _expected(self, field: str, again: ModelConfig) -> str:
        """Returns the values that a field may have: those of its row, or else the one that was read
        back."""
        choices = next((row.values for row in self.settings if row.ours == field and row.values), None)
        return " or ".join(map(repr, dict.fromkeys(choices.values()))) if choices else repr(getattr(again, field))

    def renamed(self, name: str) -> str:
        """Converts the name of a tensor in a file to its name in the table.

        Args:
          name: the name in the file.

        Returns:
          The name in the table.
        """
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        """Checks whether a tensor is not a weight, so that the loader ignores it.

        Args:
          name: the name of the tensor in the table.

        Returns:
          True if the tensor is not a weight.
        """
        return any(re.fullmatch(pattern, name) for pattern in (*self.ignored, *self.constants))

    def is_of_other_head(self, name: str) -> bool:
        """Checks whether a tensor belongs to the head of a model for another task.

        Args:
          name: the name of the tensor in the table.

        Returns:
          True if the tensor belongs to such a head.
        """
        return _OTHER_HEADS.fullmatch(name) is not None

    def rows(self, model: Model) -> dict[str, Weight]:
        """Selects the rows of the table that apply to a model.

        Args:
          model: the model, or its shapes.

        Returns:
          The rows by the path of our parameter.

        Raises:
          ValueError: if the model has parameters that the family cannot store.
        """
        paths, config = set(parameters(model)), model.config
        rows = {weight.ours: weight for weight in reversed(with_groups(self.weights, model))
                if weight.ours in paths and (weight.requires is None or weight.requires in paths)}.values()
        unknown = paths - {weight.ours for weight in rows}
        if unknown:
            raise ValueError(f"a {self.model_type} model has no tensors for {', '.join(sorted(unknown))}")
        names = {weight.theirs for weight in rows}
        return {weight.ours: dataclasses.replace(
            weight, also=tuple(name for name in weight.also if name not in names),
            groups=weight.groups or config.num_heads,
            widths=weight.widths(config) if callable(weight.widths) else weight.widths) for weight in rows}


def read_targets(settings: Settings) -> dict[str, Any]:
    """Converts the settings for decoding with an encoder-decoder to fields of our config."""
    starts = [typed(settings, name, int | None, None) for name in ("decoder_start_token_id", "forced_bos_token_id")]
    return {"start_ids": tuple(token for token in starts if token is not None)} | read_banned(settings)


def read_banned(settings: Settings) -> dict[str, Any]:
    """Converts ``bad_words_ids`` to the field ``banned_ids``, the tokens that decoding never
    chooses.

    Our decoding cannot ban sequences of several tokens: the function warns and leaves them out.
    """
    sequences = banned_sequences(settings)
    longer = [ids for ids in sequences if len(ids) > 1]
    if longer:
        warnings.warn(f"bad_words_ids bans sequences of several tokens, which are left out: {shown(longer)}; this "
                      "library can ban only single tokens", stacklevel=2)
    return {"banned_ids": tuple(ids[0] for ids in sequences if len(ids) == 1)}


def banned_sequences(settings: Settings) -> list[list[int]]:
    """Returns ``bad_words_ids``; raises ValueError if it is not a list of lists of token ids."""
    sequences = settings.get("bad_words_ids") or []
    if not isinstance(sequences, list) or not all(isinstance(ids, list) and ids for ids in sequences):
        raise ValueError(f"bad_words_ids={shown(sequences)}: expected a list of lists of token ids")
    for ids in sequences:
        for token in ids:
            checked(token, int, "an id in bad_words_ids")
    return sequences


def write_targets(config: ModelConfig) -> dict[str, Any]:
    """Converts the fields for decoding back to settings, the inverse of ``read_targets``.

    Without ``start_ids`` it writes ``null`` for ``decoder_start_token_id``, because transformers
    has a default for it.
    """
    if len(config.start_ids) > 2:
        raise ValueError(f"start_ids={config.start_ids}: expected at most two tokens, because config.json has no place "
                         "for more")
    settings: dict[str, Any] = {"decoder_start_token_id": None}
    settings |= dict(zip(("decoder_start_token_id", "forced_bos_token_id"), config.start_ids, strict=False))
    return settings | write_banned(config)


def write_banned(config: ModelConfig) -> dict[str, Any]:
    """Converts ``banned_ids`` back to ``bad_words_ids``, the inverse of ``read_banned``."""
    return {"bad_words_ids": [[token] for token in config.banned_ids]} if config.banned_ids else {}
