"""``inspect_text``: run any model on texts once and keep the trace for analysis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import encode_prompts, encode_sources, ending_ids, first_tokens, pad_right
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.inspection.inspection import Inspection
from transformer_jax.inspection.parts import LanguageModel, checked_model, vocab_size
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.functional import trace
from transformer_jax.models.texts import as_list, is_text, read_target

Text = str | Sequence[int] | np.ndarray
Texts = Text | Sequence[Text]
SegmentIds = Sequence[int] | Sequence[Sequence[int]] | np.ndarray


def inspect_text(bundle_or_model: Any, text: Texts, tokenizer: TextTokenizer | None = None, *,
                 target: Texts | None = None, segment_ids: SegmentIds | None = None,
                 target_segment_ids: SegmentIds | None = None, start_id: int | None = None) -> Inspection:
    """Runs a model on one text or several, and keeps the tokens and the trace of the forward pass.

    Args:
      bundle_or_model: the result of ``transformer_jax.load``, or a model.
      text: a string, or token ids, which are used unchanged. A decoder reads a string as a prompt,
        an encoder reads ``<s>`` text ``</s>`` in which ``<mask>`` is a token, and an
        encoder-decoder reads text ``</s>``. A list of texts, or an array of ids ``[B, T]``, becomes
        one padded batch.
      tokenizer: the tokenizer of the model; by default that of the bundle.
      target: the continuation of the text for a decoder, or the target for an encoder-decoder: a
        string or token ids, such as ``generate(...).tokens[0]``; for a list of texts, a list. The
        decoder of an encoder-decoder reads ``<s>`` and the target without its end token. By
        default, the target is the model's own greedy output.
      segment_ids: the document (or sentence pair) of each token of ``text`` in a packed row, 0 for
        padding: ``[T]``, or ``[B, T]`` for a batch.
      target_segment_ids: the same for the tokens of ``target``, which are then used unchanged.
      start_id: the id of the token that starts a target; by default that of the model or the
        tokenizer.

    Returns:
      One ``Inspection``. For a list of texts it holds all of them, and its ``texts`` holds one
      ``Inspection`` for each.

    Raises:
      ValueError: for strings without a tokenizer, an empty list, an unknown token id, a text longer
        than the model's context, an encoder with a target, segment ids of a wrong length, or lists
        of different lengths.
    """
    model = checked_model(getattr(bundle_or_model, "model", bundle_or_model))
    if tokenizer is None:
        tokenizer = getattr(bundle_or_model, "tokenizer", None)
    pair = model.reads_sources
    if not pair and (start_id is not None or target_segment_ids is not None):
        raise ValueError("start_id and target_segment_ids are only for an encoder-decoder: leave them out")
    if not model.predicts_next and target is not None:
        raise ValueError("an encoder reads one text: it has no target")
    if not pair and segment_ids is not None and target is not None:
        raise ValueError("a packed row has no separate target: pass all its tokens as the text")
    if pair and target_segment_ids is None and segment_ids is not None:
        raise ValueError("segment_ids for an encoder-decoder also need target=... and target_segment_ids=...")

    if isinstance(text, Iterator):
        text = cast(Any, list(text))
    is_list = _is_list(text)
    given: list[Any] = list(text) if is_list else [text]
    ids = [np.asarray(_encoded(each, model, tokenizer, is_source=pair), np.int32) for each in given]
    targets = _each("target", target, is_list, len(ids))
    segments = [_segments("segment_ids", each, own)
                for each, own in zip(_each("segment_ids", segment_ids, is_list, len(ids)), ids, strict=True)]
    if not pair:
        if target is not None:
            ids = [np.append(own, np.asarray(_continuation(each, model, tokenizer), np.int32))
                   for own, each in zip(ids, targets, strict=True)]
        ids_T, segments_T = _joined(ids, segments, is_list, model.config.max_len)
        options = {} if segments_T is None else {"segment_ids_BT": np.atleast_2d(segments_T)}
        return Inspection(model, tokenizer, ids_T, trace(model, np.atleast_2d(ids_T), **options), segments_T)

    if target_segment_ids is None:
        target_ids = _read_targets(cast(EncoderDecoder, model), ids, targets, tokenizer, start_id)
    else:
        target_ids = [_continuation(each, model, tokenizer) for each in targets]
    target_ids = [np.asarray(each, np.int32) for each in target_ids]
    target_segments = [_segments("target_segment_ids", each, own) for each, own in zip(
        _each("target_segment_ids", target_segment_ids, is_list, len(ids)), target_ids, strict=True)]
    ids_S, segments_S = _joined(ids, segments, is_list, model.config.max_len)
    ids_T, segments_T = _joined(target_ids, target_segments, is_list, model.config.max_len)
    options = {} if segments_S is None or segments_T is None else {
        "source_segment_ids_BS": np.atleast_2d(segments_S), "target_segment_ids_BT": np.atleast_2d(segments_T)}
    return Inspection(model, tokenizer, ids_T, trace(model, np.atleast_2d(ids_S), np.atleast_2d(ids_T), **options),
                      segments_T, ids_S, segments_S)


def _is_list(text: Texts) -> bool:
    """Returns True for several texts, and False for one."""
    items = as_list("inspect_text", text)
    return not isinstance(text, str) and len(items) > 0 and is_text(items[0])


def _each(name: str, given: Any, is_list: bool, count: int) -> list[Any]:
    """Returns a list with one entry for each text; ``None`` entries if nothing was given."""
    if given is None:
        return [None] * count
    if not is_list:
        return [given]
    if isinstance(given, str) or len(given) != count:
        got = "a string" if isinstance(given, str) else f"{len(given)} of them"
        raise ValueError(f"{name} for {count} texts must be a list of {count}; got {got}")
    return list(given)


def _encoded(text: Text, model: LanguageModel, tokenizer: TextTokenizer | None, *, is_source: bool) -> list[int]:
    """Returns the ids of the tokens that the model reads for a text."""
    if not model.predicts_next and isinstance(text, str) and tokenizer is not None:
        text = tokenizer.encode_masked(text)
    encode = encode_sources if is_source else encode_prompts
    return encode(_as_list(text), tokenizer, vocab_size(model))[0]


def _continuation(text: Text | None, model: LanguageModel, tokenizer: TextTokenizer | None,
                  start: Sequence[int] = ()) -> list[int]:
    """Returns the token ids of a target, without the tokens that start it."""
    if text is None:
        raise ValueError("target_segment_ids need target=..., the tokens of these segments")
    if isinstance(text, str) and tokenizer is not None:
        text = read_target(model, text, tokenizer, start)
    return encode_prompts(_as_list(text), tokenizer, vocab_size(model))[0] if len(text) else []


def _as_list(text: Text) -> list[str] | list[list[int]]:
    """Returns a list with one text, as the encoding functions expect it."""
    return [text] if isinstance(text, str) else [np.asarray(text).tolist()]


def _read_targets(model: EncoderDecoder, sources: list[np.ndarray], targets: list[Any],
                  tokenizer: TextTokenizer | None, start_id: int | None) -> list[list[int]]:
    """Returns the token ids that the decoder of an encoder-decoder reads: the tokens that start a
    target, and the target without its end token."""
    start = first_tokens(start_id, model.config, tokenizer)
    if targets[0] is None:  # then all of them are None
        targets = generate(model, [ids.tolist() for ids in sources], tokenizer=tokenizer,
                           sampling=Sampling(temperature=0), max_new_tokens=model.config.max_len - len(start),
                           start_id=start_id).tokens
    found = [_continuation(target, model, tokenizer, start) for target in targets]
    return [[*start, *(ids[:-1] if ids and ids[-1] in ending_ids(None, tokenizer) else ids)] for ids in found]


def _segments(name: str, segment_ids: Any, ids: np.ndarray) -> np.ndarray | None:
    """Returns segment ids as an array, after a check of their shape."""
    if segment_ids is None:
        return None
    segment_ids = np.asarray(segment_ids, np.int32)
    if segment_ids.shape != ids.shape:
        raise ValueError(f"{name} has shape {segment_ids.shape}; expected {ids.shape}, one number for each token")
    return segment_ids


def _joined(rows: list[np.ndarray], segments: list[np.ndarray | None], is_list: bool,
            max_len: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns one text unchanged ``[T]``, or a list of texts padded on the right ``[B, T]`` with
    segment ids in which padding is 0."""
    if not is_list:
        return rows[0], segments[0]
    ids_BT, segments_BT = pad_right([row.tolist() for row in rows], max_len)
    if segments[0] is not None:  # then none of them is None
        segments_BT, _ = pad_right([each.tolist() for each in segments if each is not None], max_len)
    return ids_BT, segments_BT
