"""The routes that answer at once: embeddings, scores, translations, masks, tokens, and where a
token attended."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from transformer_jax.decoding.batch import pad_right
from transformer_jax.decoding.beam import beam_search
from transformer_jax.decoding.embed import embed
from transformer_jax.decoding.fill_mask import fill_mask
from transformer_jax.decoding.score import score
from transformer_jax.models.functional import trace
from transformer_jax.serving.fields import ApiError, Fields
from transformer_jax.serving.served_model import ServedModel
from transformer_jax.serving.tool_calls import without_calls


def embeddings(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Answers ``/v1/embeddings``: the mean of the last layer over the tokens of each text."""
    fields.refuse(dimensions="embeddings have the width of the model")
    value, form = fields.get("input"), fields.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise ApiError(f"encoding_format={form!r} is not one of float, base64", param="encoding_format")
    rows = served.prompts(value, "input")
    given = [value] if isinstance(value, str) else value
    is_text = isinstance(given[0], str)
    vectors = np.asarray(embed(served.model, given if is_text else rows, tokenizer=served.tokenizer,
                               pooling=fields.text("pooling", "mean")), np.float32)
    num_tokens = sum(map(len, rows))
    data = [{"object": "embedding", "index": index, "embedding": vector.tolist() if form == "float" else
             base64.b64encode(vector.tobytes()).decode()} for index, vector in enumerate(vectors)]
    return {"object": "list", "model": served.name, "data": data,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}


def scores(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Answers ``/v1/score``: the log-probability of each text and of each of its tokens, in
    nats."""
    result = score(served.model, _inputs(fields), tokenizer=served.tokenizer)
    data = [{"object": "score", "index": index, "total": total, "logprobs": logprobs, "token_ids": tokens,
             "tokens": [served.token_text(token) for token in tokens]} for index, (total, logprobs, tokens) in
            enumerate(zip(result.totals, result.logprobs, result.tokens, strict=True))]
    num_tokens = sum(map(len, result.tokens))
    return {"object": "list", "model": served.name, "data": data,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}


def translations(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Answers ``/v1/translate``: the best targets of each source, by beam search."""
    if served.role != "encoder_decoder":
        raise ApiError(f"the model {served.name!r} is of family {served.model.config.family}; /v1/translate needs an "
                       "encoder-decoder", code="model_not_supported", param="model")
    result = beam_search(served.model, _inputs(fields), tokenizer=served.tokenizer,
                         beam_size=fields.whole("beam_size", 4, 1, 64), n_best=fields.whole("n", 1, 1, 64),
                         length_penalty=fields.number("length_penalty", 0.6, 0, 6),
                         max_new_tokens=fields.whole("max_tokens", None, 1))
    data = [{"index": index, "text": best[0].text, "hypotheses": [
        {"text": one.text, "score": one.score, "logprob": one.logprob, "finish_reason": one.finish_reason}
        for one in best]} for index, best in enumerate(result.n_best)]
    return {"object": "list", "model": served.name, "data": data}


def masks(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Answers ``/v1/fill-mask``: the most probable tokens in place of each mask."""
    if served.role != "encoder":
        raise ApiError(f"the model {served.name!r} is of family {served.model.config.family}; /v1/fill-mask needs an "
                       "encoder", code="model_not_supported", param="model")
    found = fill_mask(served.model, _inputs(fields), tokenizer=served.tokenizer,
                      top_k=fields.whole("top_k", 5, 1, 100))
    data = [{"index": index, "masks": [[
        {"token": each.token, "token_id": each.token_id, "probability": each.probability, "text": each.text}
        for each in candidates] for candidates in of_text]} for index, of_text in enumerate(found)]
    return {"object": "list", "model": served.name, "data": data}


def tokens(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Answers ``/tokenize``: the tokens of a prompt, or of the messages of a conversation."""
    if fields.get("messages") is not None:
        ids, _ = served.chat_prompt(*without_calls(fields.get("messages")))
    else:
        text = fields.text("prompt")
        ids = served.tokenizer.encode_masked(text) if served.role == "encoder" else (
            served.tokenizer.encode_source(text) if served.role == "encoder_decoder" else
            served.tokenizer.encode_prompt(text))
    return {"model": served.name, "tokens": ids, "count": len(ids),
            "token_strs": [served.token_text(token) for token in ids]}


def attention(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Answers ``/v1/attention``: where one token of a text attends, in every layer and head.

    The field ``query`` is the index of the token; the answer has rows ``[layer][head][token]``, and
    only these are computed.
    """
    if served.role != "decoder":
        raise ApiError("/v1/attention needs a decoder", code="model_not_supported", param="model")
    rows = served.prompts(fields.get("tokens"), "tokens")
    if len(rows) != 1:
        raise ApiError("tokens must be one list of token ids", param="tokens")
    ids, query = rows[0], fields.whole("query", -1, -len(rows[0]), len(rows[0]) - 1)
    if len(ids) > served.model.config.max_len:
        raise ApiError(f"{len(ids)} tokens are more than the context of {served.model.config.max_len}", param="tokens")
    tokens_1T, segment_ids_1T = pad_right([ids], served.model.config.max_len)
    query %= len(ids)
    traced: Any = trace(served.model, tokens_1T, segment_ids_BT=segment_ids_1T)
    weights_LBNRS = np.asarray(traced.attention(layers=list(range(served.model.config.num_layers)), queries=[query]))
    weights_LNS = weights_LBNRS[:, 0, :, 0, :query + 1]
    return {"model": served.name, "query": query, "token_strs": [served.token_text(token) for token in ids],
            "weights": np.round(weights_LNS.astype(float), 4).tolist()}


def _inputs(fields: Fields) -> list[str]:
    """Returns the texts of the field ``input``."""
    texts = fields.texts("input", 128)
    if not texts or "" in texts:
        raise ApiError("input must be a string or a list of strings, none of them empty", param="input")
    return texts
