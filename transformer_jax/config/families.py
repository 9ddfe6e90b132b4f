"""The families of models by name: the class of their config, and the class of the model."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_field_names, nearest


class Family(NamedTuple):
    """A family of models. A class of the library is given as ``"module:class"`` and imported when
    it is used, so that configs need no jax and programs load only the models that they use."""

    config_class: type | str
    model_class: Any
    role: str


_TRANSFORMER = "transformer_jax.config.model:ModelConfig"
_RECURRENT = "transformer_jax.config.recurrent:RecurrentConfig"
_ELECTRA = "transformer_jax.config.electra:ElectraConfig"
_FAMILIES: dict[str, Family] = {
    "decoder": Family(_TRANSFORMER, "transformer_jax.models.decoder:Decoder", "decoder"),
    "encoder": Family(_TRANSFORMER, "transformer_jax.models.encoder:Encoder", "encoder"),
    "encoder_decoder": Family(_TRANSFORMER, "transformer_jax.models.encoder_decoder:EncoderDecoder",
                              "encoder_decoder"),
    "reward": Family(_TRANSFORMER, "transformer_jax.models.heads:RewardModel", "reward"),
    **{f"{trunk}_{role}": Family(_TRANSFORMER, "transformer_jax.models.classifier:Classifier", role)
       for trunk in ("encoder", "decoder") for role in ("classifier", "token_classifier")},
    "electra": Family(_ELECTRA, "transformer_jax.models.electra:Electra", "electra"),
    "recurrent": Family(_RECURRENT, "transformer_jax.baselines.recurrent:RecurrentModel", "decoder"),
    "recurrent_pairs": Family(_RECURRENT, "transformer_jax.baselines.recurrent_pairs:RecurrentPairs",
                              "encoder_decoder"),
    "word_vectors": Family("transformer_jax.config.word_vectors:WordVectorConfig",
                           "transformer_jax.baselines.word_vectors:WordVectors", "word_vectors"),
    "sparse_autoencoder": Family("transformer_jax.config.sparse_autoencoder:SparseAutoencoderConfig",
                                 "transformer_jax.features.autoencoder:SparseAutoencoder", "sparse_autoencoder"),
    "cross_layer_transcoder": Family("transformer_jax.config.cross_layer_transcoder:CrossLayerTranscoderConfig",
                                     "transformer_jax.features.cross_layer:CrossLayerTranscoder",
                                     "sparse_autoencoder"),
    "elmo": Family(_RECURRENT, "transformer_jax.baselines.elmo:Elmo", "elmo"),
}


def register_model_family(name: str, config_class: type | str, model_class: Any, *, role: str | None = None,
                          replace: bool = False) -> None:
    """Registers a family of models, which ``ExperimentConfig.model`` can then describe.

    Training, evaluation, checkpoints, ``tj.load``, ``tj.save`` and the flags of all programs find
    the family by the ``family`` field of the config. docs/extending/model_family.md has an example.

    Args:
      name: The name of the family.
      config_class: A frozen dataclass that extends ``ModelSettings``, or ``"module:class"``.
      model_class: The class of the model, or ``"module:class"``. It is called as
        ``model_class(config, key=key)``.
      role: The built-in family that the model can take the place of. With ``"decoder"``, the task
        ``language_model`` trains it, and ``tj.generate`` and ``tj.score`` accept it. ``None`` means
        the name itself: only tasks of this family train it.
      replace: True to replace a registered family of the same name.

    Raises:
      ValueError: If the name is already used and ``replace`` is False.
    """
    if name in _FAMILIES and not replace:
        raise ValueError(f"a model family with the name {name!r} is already registered; choose another name, or pass "
                         "replace=True")
    _FAMILIES[name] = Family(config_class, model_class, name if role is None else role)


def family_names() -> list[str]:
    """Returns the names of all families.

    Returns:
      The names, in the order in which they were registered.
    """
    return list(_FAMILIES)


def role_of(family: str) -> str:
    """Returns the built-in family whose place a family's models can take.

    Args:
      family: The name of a family.

    Returns:
      The role, see ``register_model_family``; the name itself if no such family is registered.
    """
    return _FAMILIES[family].role if family in _FAMILIES else family


def config_class_of(family: str) -> type:
    """Returns the class of the configs of a family.

    Args:
      family: The name of the family.

    Returns:
      A frozen dataclass.

    Raises:
      ValueError: If no family with this name is registered.
    """
    return _resolved(_found(family).config_class)


def model_class_of(family: str) -> Any:
    """Returns the class of the models of a family.

    Args:
      family: The name of the family.

    Returns:
      The class, which is imported now if it belongs to the library.

    Raises:
      ValueError: If no family with this name is registered.
    """
    return _resolved(_found(family).model_class)


def _found(family: str) -> Family:
    if family not in _FAMILIES:
        raise ValueError(f"family={family!r} is not one of {', '.join(_FAMILIES)}{nearest(str(family), _FAMILIES)}")
    return _FAMILIES[family]


def _resolved(found: Any) -> Any:
    """Imports a class that is given as ``"module:class"``."""
    if not isinstance(found, str):
        return found
    module, _, name = found.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The settings that every model has. The config of a family extends this class.

    Attributes:
      family: The name of the family, see ``register_model_family``.
      vocab_size: Number of token ids. It may be ``None`` only until the tokenizer is known.
      max_len: The longest sequence, in tokens.
      num_layers: Number of layers.
    """

    # Properties of some families that have a fixed value in the others.
    dtype = "float32"
    start_ids = ()
    banned_ids = ()

    family: str = "decoder"
    vocab_size: int | None = None
    max_len: int = 1024
    num_layers: int = 12

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def class_for(cls, values: Mapping[str, Any]) -> type:
        """Returns the class of the config that these values describe.

        Args:
          values: The values of a config's fields, for example from a file.

        Returns:
          The class for the value of ``family``, or this class if it extends that one. Without this
          value, this class itself; the class
          ``ModelSettings`` then stands for ``ModelConfig``.

        Raises:
          ValueError: If the value of ``family`` is not the name of a family.
        """
        family = values.get("family")
        if isinstance(family, str):
            found = config_class_of(family)
            return cls if issubclass(cls, found) else found
        return config_class_of("decoder") if cls is ModelSettings else cls

    @property
    def role(self) -> str:
        """The built-in family whose place the model can take, see ``register_model_family``."""
        return role_of(self.family)

    @property
    def max_source_len(self) -> int:
        """The longest source of a model that reads pairs, in tokens."""
        return self.max_len

    @property
    def cached_per_token(self) -> int:
        """The number of values that a decoding cache stores for each token of a row."""
        return 0

    def derived(self) -> dict[str, Any]:
        """Computes the values of the fields that may be left at ``None``.

        Returns:
          The name and the derived value of each of these fields.
        """
        return {}

    def flops_per_token(self, num_parameters: int, length: int) -> float:
        """Computes the number of floating point operations for training on one token.

        Args:
          num_parameters: The number of parameters of the model.
          length: The number of tokens in a row.

        Returns:
          By default 6 for each parameter, as if each were used in one product.
        """
        del length
        return 6.0 * num_parameters

    def replace(self, **changes: Any) -> Self:
        """Returns a validated copy in which some fields are changed.

        Args:
          **changes: The fields to change and their new values.

        Returns:
          The new config.

        Raises:
          ValueError: If a field does not exist or a value is not valid.
        """
        check_field_names(type(self), changes)
        return dataclasses.replace(self, **changes)
