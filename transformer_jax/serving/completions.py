"""Completions and chat completions: from the fields of a request to replies, and from replies to
JSON."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from transformer_jax.decoding.keys import row_keys
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.setting_ranges import checked_setting
from transformer_jax.serving.fields import ApiError, Fields
from transformer_jax.serving.replies import Reply, TextRequest
from transformer_jax.serving.served_model import ServedModel
from transformer_jax.serving.slots import MOST_ALTERNATIVES
from transformer_jax.serving.structured import constraint_of, grammar_of

_MOST_CHOICES = 128
_MOST_STOPS = 16
_LARGEST_SEED = 2**63
_NOT_HERE = "this server generates text only"


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

    @property
    def object_name(self) -> str:
        """The value of ``object`` in the response."""
        return "chat.completion" if self.is_chat else "text_completion"

    def envelope(self, choices: list[dict[str, Any]], *, is_chunk: bool = False) -> dict[str, Any]:
        """Returns a response, or a part of a streamed one, with these choices."""
        name = "chat.completion.chunk" if self.is_chat and is_chunk else self.object_name
        return {"id": self.identity, "object": name, "created": self.created, "model": self.served.name,
                "choices": choices}

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
    fields.refuse(tools=_NOT_HERE, functions=_NOT_HERE, audio=_NOT_HERE, suffix=_NOT_HERE)
    engine = served.generator()
    prompts = [served.chat_prompt(fields.get("messages"))] if is_chat else served.prompts(fields.get("prompt", ""))
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
                         wants_alternatives=bool(num_alternatives),
                         scores_prompt=echo and num_alternatives is not None)
    return Completion(served, is_chat, ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
                      int(time.time()), prompts, n, requests, num_alternatives, echo, fields.flag("stream"),
                      isinstance(options, dict) and options.get("include_usage") is True,
                      fields.flag("return_token_ids"))


def _num_alternatives(fields: Fields, is_chat: bool) -> int | None:
    """Returns the number of alternatives of each token, or None for no log-probabilities."""
    if not is_chat:
        return fields.whole("logprobs", None, 0, MOST_ALTERNATIVES)
    number = fields.whole("top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if number and not fields.flag("logprobs"):
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    return number if fields.flag("logprobs") else None


def _requests(served: ServedModel, fields: Fields, prompts: list[list[int]], n: int, *, is_chat: bool,
              **shared: Any) -> list[TextRequest]:
    """Makes one request for each text. The keys are those of ``tj.generate`` with ``num_samples=n``
    and the key of the seed."""
    sampling = _sampling(served, fields)
    seed = fields.whole("seed", secrets.randbits(32), -_LARGEST_SEED, _LARGEST_SEED - 1)
    seed = seed if -2**31 <= seed < 2**32 else seed % 2**32  # JAX's keys take 32 bits
    keys_B = row_keys(jax.random.key(seed), len(prompts) * n)
    stop = fields.texts("stop", _MOST_STOPS)
    if "" in stop:
        raise ApiError("stop has an empty string, which would end every text before its first token", param="stop")
    end_ids = served.chat_end_ids() if is_chat else served.tokenizer.end_ids
    end_ids = () if fields.flag("ignore_eos") else end_ids
    grammar = grammar_of(fields)
    return [TextRequest(prompt, sampling=sampling, key=keys_B[index * n + choice], stop=stop, end_ids=end_ids,
                        constraint=constraint_of(grammar, served, prompt, end_ids), **shared)
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


def finish_reason(reply: Reply) -> str:
    """Returns why a text ended, in the words of the API."""
    return "length" if reply.new.reason == "length" else "stop"


def choice(completion: Completion, index: int, reply: Reply) -> dict[str, Any]:
    """Returns the entry of a complete text."""
    prompt = completion.prompts[index // completion.num_choices]
    text = reply.new.text
    if completion.echo:
        text = completion.served.tokenizer.decode(prompt) + text
    result: dict[str, Any] = {"index": index, "finish_reason": finish_reason(reply),
                              "logprobs": _logprobs(completion, reply, 0, len(reply.new.tokens))}
    if completion.is_chat:
        result["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        result["text"] = text
    if completion.shows_ids:
        result |= {"prompt_token_ids": prompt, "token_ids": reply.new.tokens}
    return result


class ChoiceStream:
    """The parts of one streamed text."""

    def __init__(self, completion: Completion, index: int, reply: Reply):
        self._completion, self._index, self.reply = completion, index, reply
        self._num_chars = self._num_tokens = 0
        self._is_started = self.is_finished = False

    def parts(self) -> Iterator[dict[str, Any]]:
        """Yields the entries for the text and the tokens that came after the last call."""
        completion = self._completion
        text, num_tokens, is_done = self.reply.seen()
        prompt = completion.prompts[self._index // completion.num_choices]
        new_text, first = text[self._num_chars:], not self._is_started
        if first and (num_tokens or is_done):
            self._is_started = True
            extra = {"prompt_token_ids": prompt} if completion.shows_ids else {}
            if completion.is_chat:
                yield self._entry({"role": "assistant", "content": ""}, None) | extra
            elif completion.echo:
                yield self._entry(completion.served.tokenizer.decode(prompt), _logprobs(completion, self.reply, 0, 0))
            elif extra:
                yield self._entry("", None) | extra
        if num_tokens > self._num_tokens or new_text:
            logprobs = _logprobs(completion, self.reply, self._num_tokens, num_tokens, with_prompt=False)
            ids = {"token_ids": self.reply.new.tokens[self._num_tokens:num_tokens]} if completion.shows_ids else {}
            self._num_chars, self._num_tokens = len(text), num_tokens
            if new_text or logprobs is not None or ids:
                yield self._entry({"content": new_text} if completion.is_chat else new_text, logprobs) | ids
        if is_done and self.reply.error is None:
            self.is_finished = True
            yield self._entry({} if completion.is_chat else "", None) | {"finish_reason": finish_reason(self.reply)}

    def _entry(self, content: Any, logprobs: Any) -> dict[str, Any]:
        return {"index": self._index, "delta" if self._completion.is_chat else "text": content, "logprobs": logprobs,
                "finish_reason": None}


def _logprobs(completion: Completion, reply: Reply, start: int, stop: int, *,
              with_prompt: bool = True) -> dict[str, Any] | None:
    """Returns the log-probabilities of the new tokens from ``start`` to ``stop`` and, if they were
    requested, of the prompt's tokens before them."""
    if completion.num_alternatives is None:
        return None
    served, new = completion.served, reply.new
    entries: list[tuple[int, float | None, list[tuple[int, float]]]] = []
    if reply.prompt_scores is not None and with_prompt:
        scores = reply.prompt_scores
        entries.append((new.start[0], None, []))
        entries += [(token, logprob, list(zip(ids, tops, strict=True))) for token, logprob, ids, tops in zip(
            new.start[1:], scores.logprobs, scores.top_tokens, scores.top_logprobs, strict=True)]
    entries += [(token, logprob, list(zip(ids, tops, strict=True))) for token, logprob, ids, tops in zip(
        new.tokens[start:stop], new.logprobs[start:stop], reply.top_tokens[start:stop],
        reply.top_logprobs[start:stop], strict=True)]
    number = completion.num_alternatives
    if not completion.is_chat:
        offsets, offset = [], 0
        for token, _, _ in entries:
            offsets.append(offset)
            offset += len(served.token_text(token))
        return {"tokens": [served.token_text(token) for token, _, _ in entries],
                "token_logprobs": [logprob for _, logprob, _ in entries], "text_offset": offsets,
                "top_logprobs": [None if logprob is None else {served.token_text(token): value
                                                               for token, value in tops[:number]}
                                 for _, logprob, tops in entries] if number else None,
                "token_ids": [token for token, _, _ in entries],
                "bytes": [served.token_bytes(token) for token, _, _ in entries]}

    def described(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": served.token_text(token), "logprob": logprob, "bytes": served.token_bytes(token),
                "token_id": token}

    return {"content": [described(token, logprob) | {"top_logprobs": [described(*top) for top in tops[:number]]}
                        for token, logprob, tops in entries], "refusal": None}
