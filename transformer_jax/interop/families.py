"""The known families of Hugging Face's models; :func:`register_family` adds one."""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.bart import BART, MARIAN, MBART, PEGASUS
from transformer_jax.interop.bert import BERT, ROBERTA
from transformer_jax.interop.family import Family
from transformer_jax.interop.gpt2 import GPT2
from transformer_jax.interop.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from transformer_jax.interop.t5 import T5

FAMILIES: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Makes a family known to ``from_huggingface`` and ``to_huggingface``.

    Args:
      family: its tables.
      replace: whether it takes the place of a known family of the same ``model_type``.

    Returns:
      The family.

    Raises:
      ValueError: when a family of this ``model_type`` is known and shall not be replaced.
    """
    if family.model_type in FAMILIES and not replace:
        raise ValueError(f"a family {family.model_type!r} is known already; to take its place: "
                         "register_family(family, replace=True)")
    FAMILIES[family.model_type] = family
    return family


def get_family(model_type: Any) -> Family:
    """The family that ``config.json`` calls so.

    Raises:
      ValueError: for one that is not known.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"no family of models has the type {model_type!r}; known are {', '.join(FAMILIES)}. "
                         "transformer_jax.interop.register_family adds one")
    return FAMILIES[model_type]


def family_for(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can express a config, and its settings.

    Raises:
      ValueError: when there is none; for each family it says what stands in the way.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            return family, family.write_config(config)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        "no known family of Hugging Face can express this model. What a trained model does not need any more, such as "
        "dropout, can be set to what is expected; transformer_jax.interop.register_family adds a family. For each "
        "family, what it cannot express:\n  " + "\n  ".join(reasons))


for _family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, BERT, ROBERTA, BART, MBART, MARIAN, PEGASUS, T5):
    register_family(_family)
