"""Conversations, and how they become token ids.

A document begins with ``<|endoftext|>``, as in pretraining. Each message is the token of its role,
followed by its content, which is encoded separately as plain text. Each message of the assistant
ends with ``</s>``, at which generation stops:

    <|endoftext|><|system|>Be brief.<|user|>2 + 2?<|assistant|>4</s><|user|>3 + 3?<|assistant|>6</s>
                                                               ~~~~~                           ~~~~~

The model learns the tokens marked with ~. A prompt is the same sequence up to and including the
last ``<|assistant|>``. No token spans two messages, so the tokens of a prompt are exactly the first
tokens of the whole conversation.

If a tokenizer from Hugging Face has its own chat template, that template is used instead; see
``transformer_jax.data.chat_templates``.
"""

import dataclasses
import reprlib
from collections.abc import Sequence

from transformer_jax.data.chat_templates import chat_template_of
from transformer_jax.data.files import check_characters
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.sentencepiece_training import ROLES
from transformer_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
      role: The speaker: "system", "user" or "assistant".
      content: Plain text. Names of special tokens in it are ordinary text.
      is_learned: Whether the model learns this message, if the role is "assistant". It is False for
        ``"weight": 0`` in a file. Messages of the other roles are never learned.

    Raises:
      ValueError: If the role is unknown, or if the content is not a string, is blank, or has a NUL
        character or half a surrogate pair.
    """

    role: str
    content: str
    is_learned: bool = True

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"unknown role {reprlib.repr(self.role)}; expected one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise ValueError(f"the message of the {self.role} is a {type(self.content).__name__}; expected a text")
        if not self.content.strip():
            raise ValueError(f"the message of the {self.role} is empty")
        check_characters(self.content, f"the message of the {self.role}")


Conversation = Sequence[Message]
AnyTokenizer = Tokenizer | HuggingFaceTokenizer


def encode_conversation(messages: Conversation, tokenizer: AnyTokenizer) -> tuple[list[int], list[bool]]:
    """Encodes a conversation.

    If the tokenizer's files contain a chat template, that template is used; otherwise the format
    that this module describes.

    Args:
      messages: The messages in order. A demonstration ends with the assistant.
      tokenizer: A tokenizer with role tokens, or a tokenizer from Hugging Face.

    Returns:
      The token ids, and for each token whether the model learns it. In every turn of the assistant
      these are the content and the ``</s>``, or whatever ends the turn.

    Raises:
      ImportError: If there is a chat template and jinja2 is not installed.
      ValueError: If there is no message, if the chat template refuses the messages, or if the
        tokenizer has no role tokens, no token that begins a text or no token that ends a turn.
    """
    if not messages:
        raise ValueError("there is no message to encode")
    messages = _checked(messages)
    template = chat_template_of(tokenizer)
    if template is not None:
        return template.encode(messages)
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has neither a chat template nor a token that ends a text (eos_token in "
                         "tokenizer_config.json), at which the answer of the assistant would end")
    ids, is_learned = [tokenizer.start_id], [False]
    for message in messages:
        role, content = tokenizer.encode_role(message.role), tokenizer.encode(message.content, allow_special=False)
        is_answer = message.role == "assistant"
        if is_answer:
            content.append(tokenizer.eos_id)
        ids += [*role, *content]
        is_learned += [False] * len(role) + [is_answer and message.is_learned] * len(content)
    return ids, is_learned


def encode_prompt(prompt: Conversation | str, tokenizer: AnyTokenizer) -> list[int]:
    """Encodes a prompt that the assistant is to answer, for ``generate``.

    Args:
      prompt: A conversation that does not end with the assistant, or a text, which is one message
        of the user.
      tokenizer: A tokenizer with role tokens, or a tokenizer from Hugging Face.

    Returns:
      The token ids. The last ones tell the model that the assistant speaks next.

    Raises:
      ValueError: If the prompt is empty or blank, if it ends with the assistant, or if the
        tokenizer has no role tokens.
    """
    messages = as_prompt(prompt)
    template = chat_template_of(tokenizer)
    if template is not None:
        return template.encode_prompt(messages)
    return [*encode_conversation(messages, tokenizer)[0], *tokenizer.encode_role("assistant")]


def answer_end_ids(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Returns the tokens at which generation of an answer stops.

    Args:
      tokenizer: The tokenizer.

    Returns:
      The tokens that end a text, and the token that ends a turn in the model's chat template, which
      may be a different one (``<|im_end|>``, ``<|eot_id|>``).
    """
    template = chat_template_of(tokenizer)
    return tuple(dict.fromkeys([*tokenizer.end_ids, *(() if template is None else template.turn_end_ids)]))


def as_prompt(prompt: Conversation | str) -> tuple[Message, ...]:
    """Converts a prompt to messages.

    Args:
      prompt: A list of messages, or a text, which becomes one message of the user.

    Returns:
      The messages.

    Raises:
      ValueError: If the prompt is empty or blank, if it ends with the assistant, or if it is
        neither a text nor a list of messages.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else _checked(prompt)
    if not messages or messages[-1].role == "assistant":
        raise ValueError("a prompt must end with the user or the system, so that the assistant can answer")
    return messages


def _checked(messages: Conversation) -> tuple[Message, ...]:
    """Checks that a conversation is a sequence of ``Message`` objects, and returns it as a
    tuple."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ValueError(f"a conversation must be a list of messages, not a {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Message):
            raise ValueError(f"a conversation must be a list of tj.data.Message(role, content), but has "
                             f"{reprlib.repr(message)}")
    return tuple(messages)
