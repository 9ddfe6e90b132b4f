"""A model with its name and its tokenizer, as the API sees it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.data.conversations import Message, answer_end_ids, encode_prompt
from transformer_jax.data.message_forms import messages_of
from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import decodable, token_ids
from transformer_jax.models.functional import Model
from transformer_jax.serving.engine import Engine
from transformer_jax.serving.fields import ApiError
from transformer_jax.settings import shown
from transformer_jax.tools.passages import Passage, Passages, with_passages

_MOST_PROMPTS = 128


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that the server offers.

    Attributes:
      name: its id in the API.
      model: the model.
      tokenizer: its tokenizer.
      engine: generates texts, if the model is a decoder.
      allows_inspection: whether requests may read and change what the model computes.
      steering_vectors: stored steering vectors by name, each ``[D]``.
      documents: the passages that are searched for an answer, or ``None``.
      num_passages: the largest number of passages in a prompt.
      created: when it was loaded, in seconds since 1970.
    """

    name: str
    model: Model
    tokenizer: TextTokenizer
    engine: Engine | None
    allows_inspection: bool = False
    steering_vectors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    documents: Passages | None = None
    num_passages: int = 3
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def role(self) -> str:
        """The built-in family whose place the model takes, such as ``"decoder"``."""
        return self.model.config.role

    @property
    def can_chat(self) -> bool:
        """True if the tokenizer has a chat template, or tokens for the roles."""
        try:
            encode_prompt("a", self._any_tokenizer)
        except (ValueError, AttributeError, ImportError):
            return False
        return self.engine is not None

    @property
    def _any_tokenizer(self) -> Any:
        return self.tokenizer

    def description(self) -> dict[str, Any]:
        """Returns the entry of ``/v1/models``, with fields of our own for the chat page."""
        config = self.model.config
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "transformer_jax",
                "family": config.family, "role": self.role, "can_chat": self.can_chat,
                "max_model_len": config.max_len if self.engine is None else self.engine.max_context,
                "has_documents": self.documents is not None, "allows_inspection": self.allows_inspection,
                "steering_vectors": list(self.steering_vectors),
                "num_layers": getattr(config, "num_layers", None), "num_heads": getattr(config, "num_heads", None)}

    def generator(self) -> Engine:
        """Returns the engine.

        Raises:
          ApiError: if the model does not continue texts.
        """
        if self.engine is None:
            route = {"encoder": "/v1/fill-mask", "encoder_decoder": "/v1/translate"}.get(self.role)
            raise ApiError(f"the model {self.name!r} is of family {self.model.config.family} and does not continue "
                           f"texts{'' if route is None else f'; use {route}'}", code="model_not_supported",
                           param="model")
        return self.engine

    def chat_prompt(self, messages: Any, begun: str = "", room: int | None = None) -> tuple[list[int], list[Passage]]:
        """Encodes the messages of a conversation. Names of special tokens in them are ordinary
        text.

        Args:
          messages: the messages, as the API has them.
          begun: the beginning of the answer, which the model is to continue.
          room: the largest number of tokens of the prompt with passages of the documents; ``None``
            to search for none.

        Returns:
          The token ids, and the passages among them.

        Raises:
          ApiError: if the messages are not valid, or the model has no format for conversations.
        """
        if not isinstance(messages, list) or not messages:
            raise ApiError("messages must be a list of messages that is not empty", param="messages")
        if not self.can_chat:
            raise ApiError(f"the model {self.name!r} was not trained on conversations: its tokenizer has no chat "
                           "template and no tokens for the roles; use /v1/completions", code="model_not_supported",
                           param="model")
        try:
            conversation: Sequence[Message] = messages_of({"messages": messages}, "messages")
            answer, used = self.tokenizer.encode(begun, allow_special=False) if begun else [], []
            if room is not None and self.documents is not None and conversation[-1].role == "user":
                found = self.documents.find(conversation[-1].content, self.num_passages)
                conversation, used = with_passages(conversation, found, self._any_tokenizer, room - len(answer))
            return encode_prompt(conversation, self._any_tokenizer) + answer, used
        except ValueError as error:
            raise ApiError(str(error), param="messages") from error

    def chat_end_ids(self) -> tuple[int, ...]:
        """Returns the tokens that end an answer."""
        return answer_end_ids(self._any_tokenizer)

    def prompts(self, value: Any, name: str = "prompt") -> list[list[int]]:
        """Encodes the prompts of a request: a string, token ids, or a list of these.

        Raises:
          ApiError: if the value has another form, or a token id is outside the vocabulary.
        """
        is_ids = isinstance(value, list) and bool(value) and isinstance(value[0], int)
        prompts = [value] if isinstance(value, str) or is_ids else value
        if not isinstance(prompts, list) or not prompts:
            raise ApiError(f"{name} must be a string, a list of strings, a list of token ids, or a list of lists of "
                           "token ids, and not empty", param=name)
        if len(prompts) > _MOST_PROMPTS:
            raise ApiError(f"{name} has {len(prompts)} entries; at most {_MOST_PROMPTS} are allowed", param=name)
        return [self._encode(prompt, name) for prompt in prompts]

    def _encode(self, prompt: Any, name: str) -> list[int]:
        try:
            if isinstance(prompt, str):
                return self.tokenizer.encode_prompt(prompt)
            if not isinstance(prompt, list) or not prompt:
                raise ApiError(f"{name} has an entry that is neither a string nor a list of token ids", param=name)
            return token_ids(name, prompt, self.model.config.vocab_size)
        except ValueError as error:
            raise ApiError(str(error), param=name) from error

    def token_text(self, token: int) -> str:
        """Returns the text to show for a token."""
        return self.tokenizer.pieces([token])[0] if decodable([token], self.tokenizer) else f"<{token}>"

    def token_bytes(self, token: int) -> list[int]:
        """Returns the UTF-8 bytes of a token; none for a special token."""
        if not decodable([token], self.tokenizer):
            return []
        decode_bytes = getattr(self.tokenizer, "decode_bytes", None)
        return list(self.tokenizer.decode([token]).encode() if decode_bytes is None else decode_bytes([token]))


def find(models: Mapping[str, ServedModel], name: Any) -> ServedModel:
    """Returns the model that a request names; the first one if it names none.

    Raises:
      ApiError: if there is no such model.
    """
    if name is None:
        return next(iter(models.values()))
    if not isinstance(name, str) or name not in models:
        raise ApiError(f"there is no model {shown(name)}; the models are: {', '.join(models)}", status=404,
                       code="model_not_found", param="model")
    return models[name]
