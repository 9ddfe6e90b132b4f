"""From the replies of the engine to the JSON of completions, whole or in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformer_jax.serving.completions import Completion
from transformer_jax.serving.replies import Reply
from transformer_jax.serving.tool_calls import text_before_call, tool_call
from transformer_jax.serving.tracing import inspection


def finish_reason(completion: Completion, reply: Reply) -> str:
    """Returns why a text ended, in the words of the API."""
    if completion.offers_calculator and tool_call(reply.new.text, reply.new.reason) is not None:
        return "tool_calls"
    return "length" if reply.new.reason == "length" else "stop"


def choice(completion: Completion, index: int, reply: Reply) -> dict[str, Any]:
    """Returns the entry of a complete text."""
    prompt = completion.prompts[index // completion.num_choices]
    text = reply.new.text
    if completion.echo:
        text = completion.served.tokenizer.decode(prompt) + text
    result: dict[str, Any] = {"index": index, "finish_reason": finish_reason(completion, reply),
                              "logprobs": _logprobs(completion, reply, 0, len(reply.new.tokens))}
    if completion.is_chat:
        call = tool_call(text, reply.new.reason) if completion.offers_calculator else None
        result["message"] = {"role": "assistant", "content": text if call is None else text_before_call(text),
                             "refusal": None,
                             **({} if call is None else {"tool_calls": [call]})}
    else:
        result["text"] = text
    if completion.shows_ids:
        result |= {"prompt_token_ids": prompt, "token_ids": reply.new.tokens}
    return result | inspected(completion, index, reply)


def inspected(completion: Completion, index: int, reply: Reply) -> dict[str, Any]:
    """Returns what the request wants to see of the computation of a text; this runs the model."""
    if completion.wanted is None:
        return {}
    prompt = completion.prompts[index // completion.num_choices]
    return {"inspection": inspection(completion.served, completion.wanted, prompt, reply.new.tokens,
                                     reply.request.edits)}


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
        call = None
        if completion.offers_calculator:
            call = tool_call(text, self.reply.new.reason) if is_done else None
            text = text if is_done and call is None else text_before_call(text)
        prompt = completion.prompts[self._index // completion.num_choices]
        new_text, first = text[self._num_chars:], not self._is_started
        if first and (num_tokens or is_done):
            self._is_started = True
            extra: dict[str, Any] = {"prompt_token_ids": prompt} if completion.shows_ids else {}
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
            if call is not None:
                yield self._entry({"tool_calls": [{"index": 0} | call]}, None)
            yield self.empty_part() | {
                "finish_reason": finish_reason(completion, self.reply)}

    def empty_part(self) -> dict[str, Any]:
        """Returns an entry without text."""
        return self._entry({} if self._completion.is_chat else "", None)

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
