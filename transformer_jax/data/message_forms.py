"""The published forms of the messages of a conversation."""

import reprlib
from collections.abc import Mapping
from typing import Any

from transformer_jax.data.conversations import Message

# The names of speakers in ShareGPT and in chat templates.
_SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
             "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "developer": "system"}
_UNREAD = ("tool_calls", "function_call", "tools", "functions", "reasoning_content", "history")


def messages_of(record: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """Returns the list of messages under a key, whose entries have ``role`` and ``content``, or
    ``from`` and ``value``. Raises ValueError if there is no such list."""
    messages = record[key]
    check_unread(record)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} must be a list of messages that is not empty")
    found = tuple(_message(message, key) for message in messages if not _is_empty_system(message))
    if not found:
        raise ValueError(f"{key!r} has nothing but an empty message of the system")
    return found


def _message(message: Any, key: str) -> Message:
    """Converts an object with ``role`` and ``content``, or with ``from`` and ``value``, to a
    message."""
    if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
        key, speaker, content = "from", message["from"], message["value"]
    elif isinstance(message, Mapping) and {"role", "content"} <= message.keys():
        key, speaker, content = "role", message["role"], message["content"]
    else:
        raise ValueError(f"{reprlib.repr(message)} among the {key!r} is not an object with 'role' and 'content'")
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"unknown role {reprlib.repr(speaker)} under {key!r}; expected one of {', '.join(_SPEAKERS)}")
    check_unread(message)
    return Message(role, _joined(content), is_learned=_is_learned(message, role))


def _joined(content: Any) -> Any:
    """Joins a list of text parts, ``{"type": "text", "text": ...}``, to one text. Other content is
    returned unchanged, and ``Message`` refuses it if it is not a text."""
    if not isinstance(content, list) or not content:
        return content
    is_text = all(isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
                  for part in content)
    return "".join(part["text"] for part in content) if is_text else content


def _is_learned(message: Mapping[str, Any], role: str) -> bool:
    """Returns whether a message is learned, according to its ``weight``."""
    weight = message.get("weight")
    if weight is None and isinstance(message.get("train"), bool):
        weight = int(message["train"]) if role == "assistant" else None  # as in Axolotl
    if weight is None:
        return True
    if isinstance(weight, str | bool) or weight not in (0, 1):
        raise ValueError(f"a message has the weight {reprlib.repr(weight)}; expected 0 (not learned) or 1 (learned)")
    if weight == 1 and role != "assistant":
        raise ValueError(f"a message of the {role} has weight 1, but only messages of the assistant are learned: "
                         "remove the weight")
    return weight == 1 or role != "assistant"


def _is_empty_system(message: Any) -> bool:
    """Tells whether a message is the blank text of the system, which many files have in place of
    none."""
    if not isinstance(message, Mapping):
        return False
    content = message.get("content", message.get("value"))
    return message.get("role", message.get("from")) == "system" and isinstance(content, str) and not content.strip()


def check_unread(record: Mapping[str, Any]) -> None:
    """Raises ValueError if the record has content, such as tool calls, that would be ignored."""
    for key in _UNREAD:
        if record.get(key):
            raise ValueError(f"{key!r} is not supported, and its content would be lost: remove it")
