"""Completions and chat completions: from the fields of a request to the texts to generate."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from transformer_jax.decoding.keys import seeded_key_data
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.mask_guesses import Constraint
from transformer_jax.decoding.setting_ranges import checked_setting
from transformer_jax.serving.fields import ApiError, Fields
from transformer_jax.serving.replies import Reply, TextRequest
from transformer_jax.serving.served_model import ServedModel
from transformer_jax.serving.slots import MOST_ALTERNATIVES
from transformer_jax.serving.structured import calculator_constraint, constraint_of, grammar_of
from transformer_jax.serving.tool_calls import must_call, offers_calculator, without_calls
from transformer_jax.serving.tracing import Wanted, text_edits, wanted
from transformer_jax.tools.passages import Passage

_MOST_CHOICES = 128
_MOST_STOPS = 16
_LARGEST_SEED = 2**63
_NOT_HERE = "this server generates text only"
_NOT_IN_CHAT = "it is for /v1/chat/completions"
_MOST_RESERVED = 256  # tokens for the answer, beside passages of documents


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a request for a completion asks for, checked.

    Attributes:
      served: the model.
      is_chat: whether it is a chat completion.
      identity: the id of the response.
      created: when it was made, in seconds since 1970.
      prompts: the token ids of each prompt.
      num_choices: the number of texts for each prompt.
      requests: one request for each text; those of a prompt are next to each other.
      num_alternatives: how many alternatives of each token to return; ``None`` for no
        log-probabilities.
      echo: whether the text begins with the prompt.
      streams: whether the response is streamed.
      includes_usage: whether a stream ends with the numbers of tokens.
      shows_ids: whether the response has the token ids of the prompt and of the text.
      offers_calculator: whether the text may end with a call of the calculator.
      passages: the passages of documents in the prompt.
      wanted: what to return of the computation of each text, or ``None``.
    """

    served: ServedModel
    is_chat: bool
    identity: str
    created: int
    prompts: list[list[int]]
    num_choices: int
    requests: list[TextRequest]
    num_alternatives: int | None
    echo: bool
    streams: bool
    includes_usage: bool
    shows_ids: bool
    offers_calculator: bool = False
    passages: Sequence[Passage] = ()
    wanted: Wanted | None = None

    @property
    def object_name(self) -> str:
        """The value of ``object`` in the response."""
        return "chat.completion" if self.is_chat else "text_completion"

    def envelope(self, choices: list[dict[str, Any]], *, is_chunk: bool = False) -> dict[str, Any]:
        """Returns a response, or a part of a streamed one, with these choices."""
        name = "chat.completion.chunk" if self.is_chat and is_chunk else self.object_name
        passages = {"passages": self.described_passages()} if self.passages and not is_chunk else {}
        return {"id": self.identity, "object": name, "created": self.created, "model": self.served.name, **passages,
                "choices": choices}

    def described_passages(self) -> list[dict[str, Any]]:
        """Returns the passages of documents in the prompt, as the response shows them."""
        return [{"source": one.source, "number": one.number, "score": round(one.score, 4), "text": one.text}
                for one in self.passages]

    @functools.cached_property
    def _event_begin(self) -> str:
        """What all events of a stream have before their choice."""
        return event(self.envelope([], is_chunk=True)).rpartition("]")[0]

    def event(self, part: dict[str, Any]) -> str:
        """Formats a server-sent event with one choice."""
        return f"{self._event_begin}{json.dumps(part, ensure_ascii=False)}]}}\n\n"

    def usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Returns the numbers of tokens."""
        prompt, new = sum(map(len, self.prompts)), sum(len(reply.new.tokens) for reply in replies)
        reused = sum(reply.num_reused for reply in replies[::self.num_choices])
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": reused}}


def parse(served: ServedModel, fields: Fields, *, is_chat: bool) -> Completion:
    """Checks the fields of a request.

    Args:
      served: the model that the request names.
      fields: the fields.
      is_chat: whether it is a chat completion.

    Returns:
      What the request asks for.

    Raises:
      ApiError: if a field is not valid.
    """
    fields.refuse(functions=_NOT_HERE, audio=_NOT_HERE, suffix=_NOT_HERE,
                  **({} if is_chat else {"tools": _NOT_IN_CHAT, "documents": _NOT_IN_CHAT}))
    engine, passages = served.generator(), []
    has_calculator = is_chat and offers_calculator(fields)
    if is_chat:
        prompt, passages = _chat_prompt(served, fields, engine.max_context)
        prompts = [prompt]
    else:
        prompts = served.prompts(fields.get("prompt", ""))
    kept = fields.whole("truncate_prompt_tokens", None, 1)  # the last tokens, as other servers understand it
    prompts = prompts if kept is None or is_chat else [prompt[-kept:] for prompt in prompts]
    n = fields.whole("n", 1, 1, _MOST_CHOICES)
    if fields.whole("best_of", n) != n:
        raise ApiError("best_of is not supported: all texts are returned, so ask for n", param="best_of")
    if len(prompts) * n > _MOST_CHOICES:
        raise ApiError(f"{len(prompts)} prompts with n={n} are more than {_MOST_CHOICES} texts", param="n")
    num_alternatives = _num_alternatives(fields, is_chat)
    echo = not is_chat and fields.flag("echo")
    room = engine.max_context - max(map(len, prompts))
    limit = fields.whole("max_completion_tokens" if is_chat and fields.get("max_completion_tokens") is not None else
                         "max_tokens", max(room, 1) if is_chat else min(16, max(room, 1)), 0 if echo else 1)
    if fields.flag("clip_max_tokens"):  # our own field, for the chat page
        limit = min(limit, max(room, 1))
    if limit > room:
        raise ApiError(f"the context has {engine.max_context} tokens, but the prompt has {max(map(len, prompts))} and "
                       f"{limit} new ones are requested; shorten the prompt or reduce max_tokens",
                       code="context_length_exceeded", param="messages" if is_chat else "prompt")
    options = fields.get("stream_options", {})
    requests = _requests(served, fields, prompts, n, max_new_tokens=limit, is_chat=is_chat,
                         has_calculator=has_calculator,
                         wants_alternatives=bool(num_alternatives),
                         scores_prompt=echo and num_alternatives is not None)
    return Completion(served, is_chat, ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
                      int(time.time()), prompts, n, requests, num_alternatives, echo, fields.flag("stream"),
                      isinstance(options, dict) and options.get("include_usage") is True,
                      fields.flag("return_token_ids"), has_calculator, passages, wanted(fields, served))


def _chat_prompt(served: ServedModel, fields: Fields, max_context: int) -> tuple[list[int], list[Passage]]:
    """Encodes the messages of a request, with the passages of documents that fit the question.
    Returns the tokens and the passages."""
    messages, begun = without_calls(fields.get("messages"))
    wants_documents = fields.flag("documents", served.documents is not None)
    if wants_documents and served.documents is None:
        raise ApiError("the server has no documents; it can be started with --documents", param="documents")
    asked = fields.whole("max_completion_tokens", fields.whole("max_tokens", _MOST_RESERVED, 1), 1)
    room = max_context - min(asked, max_context // 2)
    return served.chat_prompt(messages, begun, room if wants_documents else None)


def event(value: dict[str, Any]) -> str:
    """Formats a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _num_alternatives(fields: Fields, is_chat: bool) -> int | None:
    """Returns the number of alternatives of each token, or None for no log-probabilities."""
    if not is_chat:
        return fields.whole("logprobs", None, 0, MOST_ALTERNATIVES)
    number = fields.whole("top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if number and not fields.flag("logprobs"):
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    return number if fields.flag("logprobs") else None


def _requests(served: ServedModel, fields: Fields, prompts: list[list[int]], n: int, *, is_chat: bool,
              has_calculator: bool, **shared: Any) -> list[TextRequest]:
    """Makes one request for each text. The keys are those of ``tj.generate`` with ``num_samples=n``
    and the key of the seed."""
    sampling = _sampling(served, fields)
    seed = fields.whole("seed", secrets.randbits(32), -_LARGEST_SEED, _LARGEST_SEED - 1)
    keys_B = seeded_key_data(seed, len(prompts) * n) if sampling.temperature else [None] * (len(prompts) * n)
    stop = fields.texts("stop", _MOST_STOPS)
    if "" in stop:
        raise ApiError("stop has an empty string, which would end every text before its first token", param="stop")
    end_ids = served.chat_end_ids() if is_chat else served.tokenizer.end_ids
    end_ids = () if fields.flag("ignore_eos") else end_ids
    grammar, edits = grammar_of(fields), text_edits(fields, served)
    if has_calculator and grammar is not None:
        raise ApiError("tools and a form of the text exclude each other", param="tools")

    def constraint(prompt: list[int]) -> Constraint | None:
        if has_calculator:
            return calculator_constraint(served, end_ids, begins_with_call=must_call(fields))
        return constraint_of(grammar, served, prompt, end_ids)

    return [TextRequest(prompt, sampling=sampling, key=keys_B[index * n + choice], stop=stop, end_ids=end_ids,
                        constraint=constraint(prompt), edits=edits, **shared)
            for index, prompt in enumerate(prompts) for choice in range(n)]


def _sampling(served: ServedModel, fields: Fields) -> Sampling:
    """Makes the sampling settings."""
    settings: dict[str, Any] = {}
    for name, default, own in (("temperature", 1.0, "temperature"), ("top_p", 1.0, "top_p"), ("top_k", 0, "top_k"),
                               ("min_p", 0.0, "min_p"), ("typical_p", 1.0, "typical_p"),
                               ("presence_penalty", 0.0, "presence_penalty"),
                               ("frequency_penalty", 0.0, "frequency_penalty"),
                               ("repetition_penalty", 1.0, "repetition_penalty"), ("min_tokens", 0, "min_new_tokens")):
        value = fields.get(name, default)
        value = 0 if own == "top_k" and value == -1 else value  # other servers switch top-k off by -1
        value = 1e-6 if own == "top_p" and value == 0 else value  # allowed by the API: the most probable token
        try:
            settings[own] = checked_setting(own, value)
        except ValueError as error:
            raise ApiError(str(error).replace(own, name), param=name) from error
    bias = fields.get("logit_bias", {})
    vocab_size = served.model.config.vocab_size or 0
    if not isinstance(bias, dict) or not all(
            str(token).isdecimal() and int(token) < vocab_size and not isinstance(value, bool)
            and isinstance(value, int | float) and -100 <= value <= 100 for token, value in bias.items()):
        raise ApiError(f"logit_bias must be an object from token ids below {vocab_size} to numbers from -100 to 100",
                       param="logit_bias")
    return Sampling(**settings, bias={int(token): float(value) for token, value in bias.items()})
