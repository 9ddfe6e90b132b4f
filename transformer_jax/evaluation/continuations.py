"""The log-probabilities of continuations, for many pairs of contexts and continuations with few
compiled programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer_jax.decoding.batch import bucket, check_family, vocab_size_of, whole_number
from transformer_jax.decoding.failures import not_finite
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import Model, check_tokens

Pair = tuple[Sequence[int], Sequence[int]]


@jax.jit
def _scores(model: Decoder, inputs_BT: Int[Array, "B T"], targets_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"],
            first_B: Int[Array, " B"]) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Returns, over the targets from ``first_B`` to ``lengths_B``, the sum of log-probabilities,
    and True if each is the most probable token."""
    slots_T = jnp.arange(inputs_BT.shape[1])
    is_token_BT = slots_T < lengths_B[:, None]
    is_scored_BT = is_token_BT & (slots_T >= first_B[:, None])
    logits_BTV = model(inputs_BT, segment_ids_BT=is_token_BT.astype(jnp.int32)).logits.astype(jnp.float32)
    targets_BT1 = targets_BT[..., None]
    logprobs_BT = jnp.take_along_axis(logits_BTV, targets_BT1, axis=-1)[..., 0] - jax.nn.logsumexp(logits_BTV, axis=-1)
    is_best_BT = logits_BTV.argmax(-1) == targets_BT
    return jnp.where(is_scored_BT, logprobs_BT, 0).sum(-1), (is_best_BT | ~is_scored_BT).all(-1)


def continuation_scores(model: Model, pairs: Sequence[Pair], *, batch_size: int = 16,
                        progress: Callable[[int], object] | None = None) -> list[tuple[float, bool]]:
    """Computes the log-probability of each continuation after its context.

    Pairs of similar length share a batch: lengths are rounded up to powers of two, and every batch
    has ``batch_size`` rows, so one program is compiled for each power of two that occurs.

    Args:
      model: a decoder.
      pairs: the token ids of each context and of its continuation; neither is empty. Of a pair that
        is longer than the model's context, the beginning is left out.
      batch_size: the number of rows of a batch.
      progress: called after each batch with the number of pairs that are done.

    Returns:
      For each pair, the log-probability of the continuation in nats, and whether greedy decoding
      would write it.

    Raises:
      ValueError: if a context or continuation is empty, a continuation is longer than the model's
        context, a token id is outside the vocabulary, or logits are not finite.
    """
    decoder: Decoder = check_family("continuation_scores", model, "decoder")
    batch_size = whole_number("batch_size", batch_size)
    max_len = decoder.config.max_len
    by_length: dict[int, list[int]] = defaultdict(list)
    rows = []
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {number} has an empty {'continuation' if len(context) else 'context'}; pass at "
                             "least one token each, such as the tokenizer's start_id as the context")
        if len(continuation) > max_len:
            raise ValueError(f"the continuation of pair {number} has {len(continuation)} tokens, which do not fit in "
                             f"the model's context of {max_len}")
        row = [*context, *continuation][-(max_len + 1):]
        check_tokens(np.asarray(row), vocab_size_of(decoder))
        rows.append((row, len(row) - 1 - len(continuation)))
        by_length[min(bucket(len(row) - 1), max_len)].append(number)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    for width, numbers in sorted(by_length.items(), reverse=True):  # the largest first: it needs the most memory
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start:start + batch_size]
            batch = _batch([rows[number] for number in chosen], batch_size, width)
            totals_B, greedy_B = map(np.asarray, _scores(decoder, *batch))
            if np.isnan(totals_B).any():
                raise not_finite(decoder, "the probabilities of the continuations are")
            for number, total, greedy in zip(chosen, totals_B.tolist(), greedy_B.tolist(), strict=False):
                found[number] = total, greedy
            if progress is not None:
                progress(len(chosen))
    return found


def _batch(rows: Sequence[tuple[list[int], int]], batch_size: int, width: int) -> tuple[np.ndarray, ...]:
    """Returns inputs and targets, int32 ``[B, T]``, the number of inputs of each row, and the first
    target that is scored. Rows that are missing are empty."""
    inputs_BT, targets_BT = np.zeros((2, batch_size, width), np.int32)
    lengths_B, first_B = np.zeros((2, batch_size), np.int32)
    for place, (row, first) in enumerate(rows):
        inputs_BT[place, :len(row) - 1], targets_BT[place, :len(row) - 1] = row[:-1], row[1:]
        lengths_B[place], first_B[place] = len(row) - 1, first
    return inputs_BT, targets_BT, lengths_B, first_B
