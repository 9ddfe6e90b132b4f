"""The calculator as a tool of the OpenAI API.

A model that was trained on annotations such as ``<<48/2=24>>`` writes ``<<`` where it wants
something computed. After it, a grammar allows only an expression and ``=``, and the text ends: it
is the tool call. The client sends the value in a message of the role ``tool``, and the model
continues its answer after ``<<48/2=24>>``.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.decoding.constraints import GrammarVocabulary, RowConstraint
from transformer_jax.decoding.grammar import Grammar
from transformer_jax.serving.fields import ApiError, Fields
from transformer_jax.settings import shown
from transformer_jax.tools.arithmetic import EXPRESSION

NAME = "calculator"
_BEGIN, _EQUALS, _END = "<<", "=", ">>"
_LONGEST_VALUE = 100
_EXPRESSION = re.compile(r"[0-9.+\-*/()]{1,1000}")


def offers_calculator(fields: Fields) -> bool:
    """Tells whether a request offers the calculator to the model.

    Args:
      fields: the fields of the request.

    Returns:
      True if it does, and ``tool_choice`` is not ``"none"``.

    Raises:
      ApiError: for other tools, or another ``tool_choice`` than ``"auto"``, ``"none"``,
        ``"required"`` or the calculator.
    """
    tools, choice = fields.get("tools"), fields.get("tool_choice", "auto")
    if tools is None:
        return False
    names = [tool.get("function", {}).get("name") if isinstance(tool, Mapping) and isinstance(
        tool.get("function", {}), Mapping) else None for tool in tools] if isinstance(tools, list) else []
    if names != [NAME]:
        raise ApiError(f"tools must be a list with one function named {NAME!r}, the one tool of this server, but it "
                       f"has {shown(names)}", code="unsupported_parameter", param="tools")
    if choice not in ("auto", "none", "required", {"type": "function", "function": {"name": NAME}}):
        raise ApiError(f"tool_choice={shown(choice)} must be auto, none, required, or the function {NAME!r}",
                       param="tool_choice")
    return choice != "none"


def must_call(fields: Fields) -> bool:
    """True if the request lets the model do nothing but call the calculator."""
    return fields.get("tool_choice", "auto") not in ("auto", "none")


class CalculatorConstraint:
    """Allows any text, and after ``<<`` only an arithmetic expression and ``=``.

    Attributes:
      definition: the grammar of the expression.
      is_complete: True after ``=``.
    """

    def __init__(self, vocabulary: GrammarVocabulary, *, begins_with_call: bool):
        """Starts before the first token.

        Args:
          vocabulary: the tokens of the model's tokenizer.
          begins_with_call: whether ``<<`` must come first.

        Raises:
          ImportError: if llguidance is not installed.
        """
        begin = json.dumps(_BEGIN) if begins_with_call else ""
        self._grammar = Grammar.lark(f'start: {begin} sum "{_EQUALS}"{EXPRESSION}')
        self.definition = f"{begins_with_call} {self._grammar.definition}"
        self._vocabulary = vocabulary
        self._ends_with_bracket = False
        self.is_complete = False
        self._expression = self._start() if begins_with_call else None

    def _start(self) -> RowConstraint:
        return RowConstraint(self._grammar, self._vocabulary, starts_text=False)

    def allowed(self) -> np.ndarray:
        """Returns the mask of the tokens that may come next, one bit a token, uint32 ``[W]``."""
        if self._expression is not None:
            return self._expression.allowed()
        # The grammar takes over exactly after "<<", so no token may go on after it.
        return self._vocabulary.without_tokens_beyond(_BEGIN.encode(), after_first=self._ends_with_bracket)

    def push(self, token: int) -> None:
        """Takes the token that was drawn."""
        if self._expression is not None:
            self._expression.push(token)
            self.is_complete = self._expression.is_complete
            return
        text = b"<" * self._ends_with_bracket + self._vocabulary.bytes_of(token)
        self._ends_with_bracket = text.endswith(b"<")
        if text.endswith(_BEGIN.encode()):
            self._expression = self._start()


def text_before_call(text: str) -> str:
    """Returns the part of an answer before a call of the calculator, or before what may become one.

    Args:
      text: the answer so far.
    """
    content, found, _ = text.partition(_BEGIN)
    return content if found or not content.endswith("<") else content[:-1]


def tool_call(text: str, reason: str | None) -> dict[str, Any] | None:
    """Returns the tool call with which an answer ended, in the shape of the API.

    Args:
      text: the answer.
      reason: why it ended.

    Returns:
      The call; ``None`` if the answer did not end with a whole expression.
    """
    _, found, expression = text.partition(_BEGIN)
    if not found or reason != "grammar":
        return None
    arguments = json.dumps({"expression": expression.removesuffix(_EQUALS)})
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": NAME, "arguments": arguments}}


def without_calls(messages: Any) -> tuple[Any, str]:
    """Writes calls of the calculator and their values into the answers in which they were made.

    Args:
      messages: the messages of a request.

    Returns:
      The messages without tool calls, and the answer that the model has begun, which is not among
      them; empty if it has not begun one.

    Raises:
      ApiError: if a call or its value has another form.
    """
    if not isinstance(messages, list):
        return messages, ""
    result, begun, waiting = [], "", None
    for message in messages:
        is_object = isinstance(message, Mapping)
        role, calls = (message.get("role"), message.get("tool_calls")) if is_object else (None, None)
        if waiting is not None:
            if role != "tool":
                raise ApiError(f"the call {waiting[0]!r} has no value: a message of the role tool must follow it",
                               param="messages")
            begun += f"{_BEGIN}{waiting[1]}{_EQUALS}{_value(message, waiting[0])}{_END}"
            waiting = None
        elif role == "assistant" and (calls or begun):
            content = message.get("content") or ""
            if not isinstance(content, str):
                raise ApiError("the content of an answer with tool calls must be a text", param="messages")
            begun += content
            if calls:
                waiting = _call(calls)
            else:
                result.append({"role": "assistant", "content": begun})
                begun = ""
        elif role == "tool" or begun:
            raise ApiError(f"a message of the role {shown(role)} follows the value of a tool call or comes without "
                           "one; expected the rest of the answer", param="messages")
        else:
            result.append(message)
    if waiting is not None:
        raise ApiError(f"the call {waiting[0]!r} has no value: add a message of the role tool", param="messages")
    return result, begun


def _call(calls: Any) -> tuple[str, str]:
    """Returns the id and the expression of the one call of a message."""
    try:
        [call] = calls
        expression = json.loads(call["function"]["arguments"])["expression"]
        if call["function"]["name"] != NAME or not _EXPRESSION.fullmatch(expression):
            raise ValueError
        return str(call["id"]), expression
    except (TypeError, KeyError, ValueError):
        raise ApiError(f"tool_calls={shown(calls)} must be one call of the function {NAME!r}, as this server returned "
                       "it", param="messages") from None


def _value(message: Mapping[str, Any], identity: str) -> str:
    """Returns the value of a call from the message of the role ``tool``."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    if message.get("tool_call_id") != identity or not isinstance(content, str) or not content.strip() or len(
            content) > _LONGEST_VALUE or set(content) & set("<>\n"):
        raise ApiError(f"the message of the role tool must have tool_call_id={identity!r} and the value as content, "
                       f"at most {_LONGEST_VALUE} characters without < and >", param="messages")
    return content.strip()
