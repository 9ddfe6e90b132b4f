"""Text in a form that a request asks for: JSON, a regular expression, a choice or a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformer_jax.decoding.batch import decodable, never_drawn
from transformer_jax.decoding.constraints import GrammarVocabulary, RowConstraint, grammar_vocabulary
from transformer_jax.decoding.grammar import Grammar
from transformer_jax.serving.fields import ApiError, Fields
from transformer_jax.serving.served_model import ServedModel
from transformer_jax.serving.tool_calls import CalculatorConstraint
from transformer_jax.settings import shown

_MOST_CHARACTERS = 100_000
_KINDS = {"json": Grammar.json_schema, "regex": Grammar.regex, "choice": Grammar.choice, "grammar": Grammar.lark}


def grammar_of(fields: Fields) -> Grammar | None:
    """Returns the grammar that a request asks for, or ``None``.

    ``response_format`` is the field of OpenAI's API: ``{"type": "json_schema", "json_schema":
    {"schema": ...}}``, ``{"type": "json_object"}`` or ``{"type": "text"}``. ``structured_outputs``
    is that of vLLM: an object with ``json``, ``regex``, ``choice`` or ``grammar``.

    Args:
      fields: the fields of the request.

    Returns:
      The grammar.

    Raises:
      ApiError: if a field has another form, the grammar is not valid, or llguidance is not
        installed.
    """
    response_format, structured = fields.get("response_format"), fields.get("structured_outputs")
    if response_format is not None and structured is not None:
        raise ApiError("response_format and structured_outputs exclude each other", param="structured_outputs")
    if structured is not None:
        if not isinstance(structured, Mapping) or len(structured) != 1 or not _KINDS.keys() & structured.keys():
            raise ApiError(f"structured_outputs={shown(structured)} must be an object with one of "
                           f"{', '.join(_KINDS)}", param="structured_outputs")
        [(kind, definition)] = structured.items()
        return _made(kind, definition, "structured_outputs")
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _made("json", {"type": "object"}, "response_format")
    described = response_format.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, Mapping) or "schema" not in described:
        raise ApiError(f'response_format={shown(response_format)} must be {{"type": "text"}}, {{"type": '
                       '"json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}',
                       param="response_format")
    return _made("json", described["schema"], "response_format")


def _made(kind: str, definition: Any, param: str) -> Grammar:
    """Makes a grammar."""
    try:
        if len(str(definition)) > _MOST_CHARACTERS:  # the time to read a grammar grows with it
            raise ValueError(f"the grammar has more than {_MOST_CHARACTERS} characters; simplify it")
        return _KINDS[kind](definition)
    except RecursionError:
        raise ApiError("the grammar is nested too deep to be read; simplify it", param=param) from None
    except ValueError as error:
        raise ApiError(str(error), param=param) from error
    except ImportError as error:
        raise ApiError(str(error), status=501, code="unsupported_parameter", param=param) from error


def constraint_of(grammar: Grammar | None, served: ServedModel, prompt: Sequence[int],
                  end_ids: Sequence[int]) -> RowConstraint | None:
    """Starts a grammar for one text.

    Args:
      grammar: the grammar; ``None`` for no constraint.
      served: the model.
      prompt: the token ids of the prompt.
      end_ids: the token ids that end the text.

    Returns:
      The state of the grammar, or ``None``.

    Raises:
      ApiError: if the model's tokenizer cannot be used with a grammar.
    """
    if grammar is None:
        return None
    tokenizer = served.tokenizer
    try:
        vocabulary = _vocabulary(served, end_ids)
        return RowConstraint(grammar, vocabulary, starts_text=not tokenizer.decode(decodable(prompt, tokenizer)))
    except ValueError as error:
        raise ApiError(str(error), code="unsupported_parameter") from error


def calculator_constraint(served: ServedModel, end_ids: Sequence[int], *,
                          begins_with_call: bool) -> CalculatorConstraint:
    """Starts to follow a text that may call the calculator.

    Args:
      served: the model.
      end_ids: the token ids that end the text.
      begins_with_call: whether the text must begin with a call.

    Returns:
      The constraint.

    Raises:
      ApiError: if the model's tokenizer cannot be used with a grammar, or llguidance is not
        installed.
    """
    try:
        return CalculatorConstraint(_vocabulary(served, end_ids), begins_with_call=begins_with_call)
    except ValueError as error:
        raise ApiError(str(error), code="unsupported_parameter", param="tools") from error
    except ImportError as error:
        raise ApiError(str(error), status=501, code="unsupported_parameter", param="tools") from error


def _vocabulary(served: ServedModel, end_ids: Sequence[int]) -> GrammarVocabulary:
    """Returns the tokens of a model for its grammars."""
    config = served.model.config
    ends = [token for token in end_ids if token < (config.vocab_size or 0)]
    return grammar_vocabulary(served.tokenizer, never_drawn(config, served.tokenizer, ends), ends)
