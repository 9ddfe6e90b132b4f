"""A text read once, by any model, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import encode_prompts, encode_sources, ending_ids, first_tokens
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.inspection.inspection import Inspection
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.functional import trace

Text = str | Sequence[int] | np.ndarray


def inspect_text(bundle_or_model: Any, text: Text, tokenizer: Tokenizer | None = None, *, target: Text | None = None,
                 segment_ids: Sequence[int] | np.ndarray | None = None,
                 target_segment_ids: Sequence[int] | np.ndarray | None = None,
                 start_id: int | None = None) -> Inspection:
    """Reads a text once and keeps what is needed to look inside: tokens, and the trace of the
    forward pass.

    Args:
      bundle_or_model: what :func:`transformer_jax.load` returns, or a model.
      text: a string, or token ids, which are read as they are. A decoder reads a string as a prompt
        is read, an encoder as ``<s>`` text ``</s>``, in which ``<mask>`` is a token, an
        encoder-decoder as text ``</s>``.
      tokenizer: the model's; by default the bundle's.
      target: a decoder's continuation of the text, an encoder-decoder's target: a string, or token
        ids such as ``generate(...).tokens[0]``. An encoder-decoder's is read after ``<s>`` and
        without what ends it; by default it is the model's own greedy translation.
      segment_ids: of a packed row, which document (or sentence pair) each token of ``text`` belongs
        to, 0 for padding.
      target_segment_ids: likewise of ``target``, which is then read as it is.
      start_id: the token before the first of a target, if not the model's or the tokenizer's own.

    Raises:
      ValueError: for strings without a tokenizer, an empty list, an unknown token id, a text longer
        than the model takes, an encoder with a target, or segment ids of another length.
    """
    model = getattr(bundle_or_model, "model", bundle_or_model)
    if tokenizer is None:
        tokenizer = getattr(bundle_or_model, "tokenizer", None)
    vocab_size = model.config.vocab_size
    pair = model.reads_sources
    if not pair and (start_id is not None or target_segment_ids is not None):
        raise ValueError("start_id and target_segment_ids are of an encoder-decoder's target")
    if not model.predicts_next:
        if target is not None:
            raise ValueError("an encoder reads one text: it has no target")
        if isinstance(text, str) and tokenizer is not None:
            text = tokenizer.encode_masked(text)
    encode = encode_sources if pair else encode_prompts
    ids = np.asarray(encode([text], tokenizer, vocab_size)[0], np.int32)
    segment_ids = _segments("segment_ids", segment_ids, ids)
    if not pair:
        if target is not None:
            if segment_ids is not None:
                raise ValueError("a packed row has no target: pass all its tokens as the text")
            ids = np.append(ids, np.asarray(_encoded(target, tokenizer, vocab_size), np.int32))
        options = {} if segment_ids is None else {"segment_ids_BT": segment_ids[None]}
        return Inspection(model, tokenizer, ids, trace(model, ids[None], **options), segment_ids)
    if target_segment_ids is None and segment_ids is not None:
        raise ValueError("segment_ids of the source need target=... and target_segment_ids=...")
    if target_segment_ids is None:
        target = _target(model, ids, target, tokenizer, start_id)
    target_ids = np.asarray(_encoded(target, tokenizer, vocab_size), np.int32)
    target_segment_ids = _segments("target_segment_ids", target_segment_ids, target_ids)
    options = {} if segment_ids is None else {"source_segment_ids_BS": segment_ids[None],
                                              "target_segment_ids_BT": target_segment_ids[None]}
    return Inspection(model, tokenizer, target_ids, trace(model, ids[None], target_ids[None], **options),
                      target_segment_ids, ids, segment_ids)


def _encoded(text: Text, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    return encode_prompts([text], tokenizer, vocab_size)[0] if len(text) else []


def _target(model: EncoderDecoder, source_ids: np.ndarray, target: Text | None, tokenizer: Tokenizer | None,
            start_id: int | None) -> list[int]:
    """What the decoder reads: the tokens that start a target, and the target without the one that
    ends it."""
    start = first_tokens(start_id, model.config, tokenizer)
    if target is None:
        target = generate(model, [source_ids.tolist()], tokenizer=tokenizer, sampling=Sampling(temperature=0),
                          max_new_tokens=model.config.max_len - len(start), start_id=start_id).tokens[0]
    ids = _encoded(target, tokenizer, model.config.vocab_size)
    return [*start, *(ids[:-1] if ids and ids[-1] in ending_ids(None, tokenizer) else ids)]


def _segments(name: str, segment_ids: Any, ids: np.ndarray) -> np.ndarray | None:
    if segment_ids is None:
        return None
    segment_ids = np.asarray(segment_ids, np.int32)
    if segment_ids.shape != ids.shape:
        raise ValueError(f"{name} has shape {segment_ids.shape}; the text has {len(ids)} tokens")
    return segment_ids
