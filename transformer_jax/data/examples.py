"""Checks of training examples that a program passes as Python objects."""

import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformer_jax.data.conversations import Message, as_prompt
from transformer_jax.data.forms import demonstration_of, prompt_of
from transformer_jax.data.preferences import Comparison, comparison_of
from transformer_jax.json_files import located

Example = TypeVar("Example")


def checked_examples(data: Any, read: Callable[[Any], Example], what: str) -> list[Example]:
    """Checks and converts the examples of a list.

    Args:
      data: The examples, each in a form that ``read`` accepts.
      read: Converts an entry to an example, or raises ValueError.
      what: The name of an example for error messages.

    Returns:
      The converted examples.

    Raises:
      ValueError: If ``data`` is not a list or is empty, or if ``read`` refuses an entry. The
        message gives the number of the entry, counted from 1.
    """
    if isinstance(data, str | bytes | os.PathLike | Mapping) or not isinstance(data, Sequence):
        raise ValueError(f"expected a list of {what}s, not a {type(data).__name__}; config.data.path can "
                         "name a file of them")
    if not data:
        raise ValueError(f"there is no {what}: the list is empty")
    examples = []
    for number, example in enumerate(data, start=1):
        with located(f"{what} {number} of {len(data):,}"):
            examples.append(read(example))
    return examples


def as_demonstration(example: Any) -> tuple[Message, ...]:
    """Converts an example to a conversation to learn from.

    Args:
      example: A list of messages, or a dict in the form of a line of a file.

    Returns:
      The messages.

    Raises:
      ValueError: If the example has a different form, or has no answer to learn.
    """
    if isinstance(example, Mapping):
        return demonstration_of(example)
    if not _is_list_of(example, Message, Mapping):
        raise ValueError(f"{reprlib.repr(example)} is not a conversation: expected a list of messages, or a dict "
                         "like the lines of a file")
    if _is_list_of(example, Message):
        learned = any(message.role == "assistant" and message.is_learned for message in example)
        if not learned or example[-1].role != "assistant":
            raise ValueError("a demonstration must end with the assistant and have an answer to learn")
        return tuple(example)
    return demonstration_of({"messages": list(example)})


def as_comparison(example: Any) -> Comparison:
    """Converts an example to a comparison.

    Args:
      example: A ``Comparison``, or a dict in the form of a line of a file.

    Returns:
      The comparison.

    Raises:
      ValueError: If the example has a different form.
    """
    if isinstance(example, Mapping):
        return comparison_of(example)
    if not isinstance(example, Comparison):
        raise ValueError(f"{reprlib.repr(example)} is not a comparison: expected a tj.data.Comparison, or a dict "
                         "like the lines of a file")
    return example


def as_question(example: Any) -> tuple[Message, ...]:
    """Converts an example to a prompt.

    Args:
      example: A text, a list of messages, or a dict in the form of a line of a file.

    Returns:
      The messages of the prompt.

    Raises:
      ValueError: If the example has a different form.
    """
    if isinstance(example, Mapping):
        return prompt_of(example)
    if isinstance(example, str) or _is_list_of(example, Message):
        return as_prompt(example)
    if not _is_list_of(example, Mapping):
        raise ValueError(f"{reprlib.repr(example)} is not a prompt: expected a text, a list of messages, or a dict "
                         "like the lines of a file")
    return prompt_of({"prompt": list(example)})


def _is_list_of(example: Any, *kinds: type) -> bool:
    """Tells whether the example is a list that is not empty and has entries of these classes
    only."""
    return (isinstance(example, Sequence) and not isinstance(example, str | bytes) and bool(example)
            and all(isinstance(entry, kinds) for entry in example))
