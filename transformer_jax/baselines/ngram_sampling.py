"""Text in the manner of an n-gram model: each token is drawn from the tokens that followed the last
n - 1 ones (Shannon, 1948)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.baselines.ngrams import NgramModel
from transformer_jax.data.tokens import text_after
from transformer_jax.decoding.batch import bucket, encode_prompts, ending_ids, whole_number
from transformer_jax.decoding.keys import row_keys
from transformer_jax.decoding.logits import Sampling, Settings, sample
from transformer_jax.decoding.rules import History
from transformer_jax.decoding.sample import Generation

_draw = jax.jit(sample)


def generate_ngrams(model: NgramModel, prompts: str | Sequence[str] | Sequence[Sequence[int]], *,
                    key: jax.Array | None = None, max_new_tokens: int = 100, sampling: Sampling = Sampling(),
                    end_ids: Sequence[int] | None = None) -> Generation:
    """Continues every prompt with an n-gram model. The settings of sampling are those of
    ``tj.generate``.

    Args:
      model: The model.
      prompts: Strings (if the model has a tokenizer) or lists of token ids. An empty string starts
        from ``<|endoftext|>``.
      key: A PRNG key, from which row i gets ``fold_in(key, i)``; not needed for greedy decoding.
      max_new_tokens: The largest number of tokens to add to each prompt.
      sampling: How tokens are drawn.
      end_ids: Token ids that end a text; the default is those of the tokenizer.

    Returns:
      The texts, tokens and log-probabilities, one entry for each prompt.

    Raises:
      ValueError: If a prompt has no tokens, or sampling has no key.
    """
    if key is None and sampling.temperature > 0:
        raise ValueError("sampling needs key=jax.random.key(seed); for greedy decoding, pass "
                         "sampling=tj.Sampling(temperature=0)")
    whole_number("max_new_tokens", max_new_tokens)
    vocab_size = model.counts.vocab_size
    starts = encode_prompts(prompts, model.tokenizer, vocab_size)
    ends = ending_ids(end_ids, model.tokenizer)
    settings = Settings.of(sampling, vocab_size, ends)
    texts, tokens, logprobs, reasons = [], [], [], []
    for start, row_key in zip(starts, row_keys(key, len(starts)), strict=True):
        row, row_logprobs = _continue(model, start, row_key[None], max_new_tokens, settings, set(ends))
        tokens.append(row)
        logprobs.append(row_logprobs)
        reasons.append("eos" if row and row[-1] in ends else "length")
        if model.tokenizer is not None:
            texts.append(text_after(model.tokenizer, start, row))
    return Generation(texts=texts if model.tokenizer is not None else None, tokens=tokens, logprobs=logprobs,
                      lengths=list(map(len, tokens)), finish_reasons=reasons)


def _continue(model: NgramModel, start: list[int], key_1: jax.Array, max_new_tokens: int, settings: Settings,
              ends: set[int]) -> tuple[list[int], list[float]]:
    """Draws the tokens that follow one prompt, and returns them with their log-probabilities."""
    history = np.zeros((1, bucket(len(start) + max_new_tokens)), np.int32)
    history[0, :len(start)] = start
    places = np.arange(history.shape[1])[None]
    tokens, logprobs = [], []
    # Without smoothing, the logit of a token that never followed is minus infinity.
    for number in range(max_new_tokens):
        length = len(start) + number
        with np.errstate(divide="ignore"):
            logits = np.log(model.next_token_probabilities(history[0, :length])).astype(np.float32)
        state = History(history.copy(), places < length, jnp.int32(number), settings.ends_V)
        token = int(_draw(logits[None], state, key_1, settings)[0][0])
        history[0, length] = token
        tokens.append(token)
        logprobs.append(float(logits[token]))
        if token in ends:
            break
    return tokens, logprobs
