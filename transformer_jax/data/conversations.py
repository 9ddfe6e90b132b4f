"""Conversations: the chat template, and demonstrations from files.

A document begins with `<|endoftext|>`, as in pretraining. Each message is the token of its role and
its content, encoded on its own as plain text; what the assistant says ends with `</s>`, at which
generation stops:

    <|endoftext|><|system|>Be brief.<|user|>2 + 2?<|assistant|>4</s><|user|>3 + 3?<|assistant|>6</s>
                                                               ~~~~~                           ~~~~~

The tokens marked ~ are those to be learned. A prompt is the same up to and with the last
`<|assistant|>`. Since no token straddles two messages, a prompt's tokens are exactly those at the
start of the whole conversation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_jax.data.records import located, read_records, text_of, texts_of
from transformer_jax.data.sentencepiece_training import ROLES
from transformer_jax.data.text import check_characters
from transformer_jax.data.tokenizer import Tokenizer

_FORMATS = (
    "`messages`; `prompt` and `response`; `instruction`, perhaps `input`, and `output`; or `question`, perhaps "
    "`context`, and `answers`"
)


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side says in one turn.

    Attributes:
        role: "system", "user" or "assistant".
        content: Plain text, in which names of special tokens are text like any other.

    Raises:
        ValueError: an unknown role, or content that is no text, blank, or with a NUL or half a
          surrogate pair.
    """

    role: str
    content: str

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise ValueError(f"what the {self.role} says is a {type(self.content).__name__}; expected a text")
        if not self.content.strip():
            raise ValueError(f"what the {self.role} says is empty")
        check_characters(self.content, f"what the {self.role} says")


Conversation = Sequence[Message]


def encode_conversation(messages: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Encodes a conversation by the template of this module.

    Args:
        messages: In order; a demonstration ends with the assistant.
        tokenizer: One with role tokens.

    Returns:
        The token ids, and which of them are to be learned: in every turn of the assistant the
        content and the `</s>`.

    Raises:
        ValueError: no message, or a tokenizer without role tokens.
    """
    if not messages:
        raise ValueError("there is no message to encode")
    ids, is_learned = [tokenizer.start_id], [False]
    for message in messages:
        role, content = tokenizer.encode_role(message.role), tokenizer.encode(message.content, allow_special=False)
        is_answer = message.role == "assistant"
        if is_answer:
            content.append(tokenizer.eos_id)
        ids += [*role, *content]
        is_learned += [False] * len(role) + [is_answer] * len(content)
    return ids, is_learned


def encode_prompt(prompt: Conversation | str, tokenizer: Tokenizer) -> list[int]:
    """Encodes what the assistant is to answer: what `generate` gets.

    Args:
        prompt: A conversation that waits for the assistant, or what a user says.
        tokenizer: One with role tokens.

    Returns:
        The token ids, of which the last say that the assistant speaks.

    Raises:
        ValueError: no or a blank prompt, one that the assistant ends, or a tokenizer without role
          tokens.
    """
    messages = as_prompt(prompt)
    return [*encode_conversation(messages, tokenizer)[0], *tokenizer.encode_role("assistant")]


def as_prompt(prompt: Conversation | str) -> tuple[Message, ...]:
    """Returns the messages of a prompt; a text is one message of the user.

    Raises:
        ValueError: no or a blank prompt, or one that the assistant ends.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if not messages or messages[-1].role == "assistant":
        raise ValueError("a prompt ends with the user or the system, for the assistant to answer")
    return messages


def read_demonstrations(path: str | Path) -> list[tuple[Message, ...]]:
    """Reads conversations to learn from, in any of four forms.

    * `messages`: a list of objects with `role` and `content`, of which the last is the assistant's.
    * `prompt` and `response`, where the prompt may be a list of messages.
    * `instruction`, `input` and `output`: the user says the instruction and, where the input is not
      empty, a blank line and the input.
    * `question`, `context` and `answers` (FaQuAD, SQuAD): the user says the context, a blank line
      and the question; the assistant gives the first of the answers.

    Args:
        path: A JSONL file (an object a line) or a JSON file (a list of objects), maybe compressed
          (`.gz`).

    Raises:
        ValueError: with the file and the number of the line or object: bad JSON, another form, an
            unknown role, an empty response or other message, a conversation that does not end with
            the assistant.
    """
    demonstrations = []
    for where, record in read_records(path):
        with located(where):
            demonstrations.append(_demonstration(record))
    return demonstrations


def prompt_of(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the prompt of a record in one of the forms of `read_demonstrations`, its answer left
    out.

    Raises:
        ValueError: another form, an unknown role, a blank message, or nothing but an answer.
    """
    if "messages" in record:
        messages = _messages(record, "messages")
        return as_prompt(messages[:-1] if messages[-1].role == "assistant" else messages)
    if isinstance(record.get("prompt"), list):
        return as_prompt(_messages(record, "prompt"))
    if "prompt" in record:
        parts = [text_of(record, "prompt")]
    elif "instruction" in record:
        parts = [text_of(record, "instruction"), text_of({"input": "", **record}, "input")]
    elif "question" in record:
        parts = [text_of({"context": "", **record}, "context"), text_of(record, "question")]
    else:
        raise ValueError(f"found the keys {sorted(record)}; expected {_FORMATS}")
    return as_prompt("\n\n".join(part for part in parts if part.strip()))


def _demonstration(record: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in record:
        messages = _messages(record, "messages")
        if messages[-1].role != "assistant":
            raise ValueError(f"the last message is the {messages[-1].role}'s; a demonstration ends with the assistant")
        return messages
    prompt = prompt_of(record)
    if "prompt" in record:
        answer = text_of(record, "response")
    elif "instruction" in record:
        answer = text_of(record, "output")
    else:
        answer = texts_of(record, "answers")[0]
    return (*prompt, Message("assistant", answer))


def _messages(record: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is no list of messages, or an empty one")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{message!r} among the {key!r} is no object with 'role' and 'content'")
    return tuple(Message(message["role"], message["content"]) for message in messages)
