"""The grammars that constrain generated text: JSON schemas, regular expressions, choices, and
grammars in Lark's notation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from transformer_jax.settings import check_text, shown

# JSON is written as json.dumps writes it, so that a model cannot write white space without end.
_JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def load_llguidance() -> Any:
    """Imports the library that follows grammars.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        import llguidance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('constraining text by a grammar needs: pip install "transformer_jax[grammar]"') from error
    return llguidance


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The set of texts that ``generate`` and ``stream`` may write.

    Make one with ``json_schema``, ``regex``, ``choice`` or ``lark``. The library llguidance follows
    the grammar.

    Attributes:
      definition: the grammar in the form that llguidance reads.

    Raises:
      ValueError: if llguidance cannot follow the definition.
      ImportError: if llguidance is not installed.
    """

    definition: str

    def __post_init__(self):
        problem = load_llguidance().LLMatcher.validate_grammar(self.definition, None)
        if problem and not problem.startswith("WARNING"):
            raise ValueError(f"llguidance cannot follow the grammar: {_one_line(problem)}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Self:
        """Allows the JSON values that a JSON schema describes, written as ``json.dumps`` writes
        them.

        Args:
          schema: the schema, as a dict or as JSON. Its key ``"x-guidance"`` may change the form of
            the text: ``{"whitespace_flexible": True}`` allows any white space.

        Returns:
          The grammar.

        Raises:
          ValueError: if the schema is not valid, or uses a keyword that llguidance does not know.
        """
        if not isinstance(schema, (Mapping, str)):
            raise ValueError(f"schema={shown(schema)} is not a JSON schema; pass a dict, or a string of JSON")
        try:
            value = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise ValueError(f"schema={shown(schema)} is not JSON: {error}") from None
        except RecursionError:
            raise ValueError("the schema is nested too deep to be read; simplify it") from None
        if not isinstance(value, dict):
            raise ValueError(f"schema={shown(schema)} is not a JSON schema; pass a JSON object, such as "
                             '{"type": "integer"}')
        try:
            definition = load_llguidance().LLMatcher.grammar_from_json_schema(value, defaults=_JSON_OPTIONS)
        except ValueError as error:
            raise ValueError(f"llguidance cannot read the schema: {_one_line(str(error))}") from None
        return cls(definition)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Allows the texts that a regular expression matches as a whole, as ``re.fullmatch`` does.

        Args:
          pattern: an expression in the syntax of Rust's ``regex``, which is that of Python without
            look-around and references to groups.

        Returns:
          The grammar.

        Raises:
          ValueError: if the expression is not valid, or needs look-around or references.
        """
        if not isinstance(pattern, str):
            raise ValueError(f"pattern={shown(pattern)} is not a regular expression; pass a string")
        check_text(pattern)
        return cls(load_llguidance().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """Allows exactly the given texts.

        Args:
          texts: the texts, at least one, none of them empty.

        Returns:
          The grammar.

        Raises:
          ValueError: if ``texts`` is not a list of strings, or a text is empty.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts or not all(
                isinstance(text, str) and text for text in texts):
            raise ValueError(f'choice={shown(texts)} must be a list of strings that are not empty, such as ["yes", '
                             '"no"]')
        return cls.lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))

    @classmethod
    def lark(cls, rules: str) -> Self:
        """Allows the texts of a context-free grammar.

        Args:
          rules: the rules in llguidance's variant of Lark's notation; the first rule is ``start``.

        Returns:
          The grammar.

        Raises:
          ValueError: if the rules are not valid.
        """
        if not isinstance(rules, str):
            raise ValueError(f"rules={shown(rules)} is not a grammar; pass a string")
        check_text(rules)
        return cls(load_llguidance().LLMatcher.grammar_from_lark(rules))


def _one_line(problem: str) -> str:
    """Returns a message of llguidance on one line, and not longer than 300 characters."""
    text = " ".join(problem.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


Grammars = Grammar | Sequence[Grammar | None] | None  # one for all rows, or one for each prompt


def check_grammars(grammar: Grammars, num_prompts: int) -> list[Grammar | None]:
    """Returns one grammar, or ``None``, for each prompt.

    Raises:
      ValueError: if it is not a grammar, or not one for each prompt.
    """
    if grammar is None or isinstance(grammar, Grammar):
        return [grammar] * num_prompts
    if isinstance(grammar, (str, Mapping)) or not isinstance(grammar, Sequence):
        raise ValueError(f"grammar={shown(grammar)} is not a tj.Grammar; write tj.Grammar.json_schema(...), "
                         "tj.Grammar.regex(...) or tj.Grammar.choice(...)")
    if len(grammar) != num_prompts or not all(one is None or isinstance(one, Grammar) for one in grammar):
        raise ValueError(f"grammar is a list of {len(grammar)}; expected one tj.Grammar or None for each of "
                         f"{num_prompts} prompts")
    return list(grammar)
