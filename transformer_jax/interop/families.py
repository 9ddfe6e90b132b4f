"""The registered families of Hugging Face models; ``register_family`` adds one."""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.config.classifier import CLASSIFIERS
from transformer_jax.interop.bart import BART, M2M100, MARIAN, MBART, PEGASUS
from transformer_jax.interop.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA
from transformer_jax.interop.classifiers import decoder_classifiers
from transformer_jax.interop.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from transformer_jax.interop.family import Family
from transformer_jax.interop.gemma import GEMMA, GEMMA2, GEMMA3
from transformer_jax.interop.gpt2 import GPT2
from transformer_jax.interop.gpt_oss import GPT_OSS
from transformer_jax.interop.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from transformer_jax.interop.mixture import MIXTRAL, OLMOE, QWEN3_MOE
from transformer_jax.interop.modernbert import MODERNBERT
from transformer_jax.interop.neox import GPT_NEOX, GPTJ, PHI
from transformer_jax.interop.olmo import OLMO, OLMO2, OLMO3, STABLELM
from transformer_jax.interop.opt import OPT
from transformer_jax.interop.phi3 import PHI3, SMOLLM3
from transformer_jax.interop.setting import shown
from transformer_jax.interop.small_encoders import ALBERT, DISTILBERT, ELECTRA
from transformer_jax.interop.t5 import MT5, T5

FAMILIES: dict[str, Family] = {}
_NEAREST = 6  # families that an error message shows


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Registers a family of models, so that ``from_huggingface`` and ``to_huggingface`` support it.

    Args:
      family: the family, with its tables of weights and settings.
      replace: whether to replace a registered family with the same ``model_type``.

    Returns:
      The same family.

    Raises:
      ValueError: if a family with this ``model_type`` is registered and ``replace`` is False.
    """
    if family.model_type in FAMILIES and not replace:
        raise ValueError(f"the family {family.model_type!r} is already registered; to replace it, call "
                         "register_family(family, replace=True)")
    FAMILIES[family.model_type] = family
    return family


def get_family(model_type: Any) -> Family:
    """Returns the registered family of a model type.

    Args:
      model_type: the ``model_type`` in ``config.json``.

    Returns:
      The family.

    Raises:
      ValueError: if no family with this model type is registered.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={shown(model_type)} is not supported; expected one of {', '.join(FAMILIES)}. To "
                         "support another one, call transformer_jax.interop.register_family")
    return FAMILIES[model_type]


def family_for(config: ModelConfig, first: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that can express a config, and the settings for its ``config.json``.

    Args:
      config: the config of a model.
      first: the ``model_type`` of the family to try first; ``None`` for no preference.

    Raises:
      ValueError: if no family can express the config. The message lists what the nearest families
        cannot express.
    """
    reasons = []
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != first):
        for head in heads_for(family, config):
            try:
                return head, head.write_config(config)
            except ValueError as error:
                is_other_kind = head.fixed.get("family", config.family) != config.family
                is_other_structure = error.__cause__ is not None  # else the message lists the fields
                num_fields = str(error).count("(expected")
                reasons.append((family.model_type != first, is_other_kind, is_other_structure, num_fields, str(error)))
    nearest = [reason for *_, reason in sorted(reasons, key=lambda reason: reason[:4])[:_NEAREST]]
    raise ValueError(
        "no known family of Hugging Face can express this model. You can set fields that a trained model no longer "
        "needs, such as dropout, to the expected values; transformer_jax.interop.register_family adds a family. These "
        f"are the fields that the {len(nearest)} nearest of {len(reasons)} families cannot express:\n  "
        + "\n  ".join(nearest))


def heads_for(family: Family, config: ModelConfig) -> tuple[Family, ...]:
    """Returns the forms of a family that may express a config: those of its classifiers for which
    the config's family is right, or the family itself."""
    if config.family not in CLASSIFIERS:
        return (family,)
    return tuple(head for head in family.classifiers if head.fixed["family"] == config.family)


def form_for(family: Family, config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Returns the first form of a family that can express a config, and the settings for its
    ``config.json``.

    Args:
      family: the family.
      config: the config of a model.

    Raises:
      ValueError: if no form can express the config; the message is that of the first form.
    """
    errors = []
    for form in heads_for(family, config) or (family,):
        try:
            return form, form.write_config(config)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


for _family in (decoder_classifiers(GPT2, "classifier"), *map(decoder_classifiers, (LLAMA, MISTRAL, QWEN2, QWEN3)),
                MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS, GPT_NEOX, GPTJ, PHI, OPT, STABLELM, OLMO,
                OLMO2, OLMO3, GEMMA, GEMMA2, GEMMA3, PHI3, SMOLLM3, BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT,
                ELECTRA, ALBERT, MODERNBERT, BART, MBART, MARIAN, PEGASUS, T5, MT5, M2M100):
    register_family(_family)
