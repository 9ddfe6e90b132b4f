"""Which of several models answers best: their answers to the same prompts under a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from transformer_jax.alignment.judging import distinct_n, elo_ratings, win_rate
from transformer_jax.alignment.rollout import Reward, collect
from transformer_jax.data import Conversation, Tokenizer, encode_prompt
from transformer_jax.decoding.batch import bucket
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.bundle import Bundle

_PROMPTS_AT_A_TIME = 64


@dataclasses.dataclass(frozen=True)
class Answers:
    """One answer to each prompt.

    Attributes:
      texts: the answers.
      scores: what the judge says of each.
      kl: of the model to the first one, in nats an answer, on the model's own answers.
      length: mean number of tokens.
    """

    texts: list[str]
    scores: np.ndarray
    kl: float
    length: float


def answer(bundles: Mapping[str, Bundle], prompts: Sequence[Conversation], judge: Reward, *, max_new_tokens: int,
           seed: int = 0) -> dict[str, Answers]:
    """Lets every model answer every prompt, at temperature 1 and with the same random numbers.

    Args:
      bundles: models by name; the first is the one that KL is measured to.
      prompts: what to answer.
      judge: a reward model, or a function from texts to numbers.
      max_new_tokens: longest answer.
      seed: of the answers.

    Raises:
      ValueError: for models with different tokenizers, or a prompt that leaves no room.
    """
    first, *others = bundles.values()
    for name, bundle in bundles.items():
        if bundle.tokenizer is None or bundle.tokenizer.digest != first.tokenizer.digest:
            raise ValueError(f"{name} has another tokenizer than {next(iter(bundles))}; models to compare share one")
    encoded = [encode_prompt(prompt, first.tokenizer) for prompt in prompts]
    longest = max(map(len, encoded))
    room = min(bundle.config.max_len for bundle in (first, *others)) - max_new_tokens
    if longest > room:
        raise ValueError(f"a prompt of {longest} tokens and an answer of {max_new_tokens} do not fit a context of "
                         f"{room + max_new_tokens}; shorten the prompt, or take fewer new tokens")
    width = min(bucket(longest), room)
    return {name: _answers(bundle.model, first.model, encoded, judge, first.tokenizer, width, max_new_tokens, seed)
            for name, bundle in bundles.items()}


def _answers(model: Decoder, reference: Decoder, prompts: list[list[int]], judge: Reward, tokenizer: Tokenizer,
             width: int, max_new_tokens: int, seed: int) -> Answers:
    texts, scores, kls, lengths = [], [], [], []
    for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        rollout, found = collect(model, prompts[start:start + _PROMPTS_AT_A_TIME], reference=reference, reward=judge,
                                 tokenizer=tokenizer, key=jax.random.fold_in(jax.random.key(seed), start),
                                 prompt_len=width, max_new_tokens=max_new_tokens)
        apart_BR = np.where(rollout.mask_BR, rollout.logprobs_BR - rollout.reference_logprobs_BR, 0.0)
        texts += found
        scores.append(np.asarray(rollout.scores_B))
        kls.append(apart_BR.sum(1))
        lengths.append(rollout.mask_BR.sum(1))
    return Answers(texts, np.concatenate(scores), float(np.concatenate(kls).mean()),
                   float(np.concatenate(lengths).mean()))


def table(answers: Mapping[str, Answers], against: str) -> str:
    """A Markdown table: win rate against one of the models, Elo rating, KL, diversity."""
    ratings = elo_ratings({name: found.scores for name, found in answers.items()})
    lines = [f"| model | judge's score | beats {against} (95 % interval) | Elo | KL to {next(iter(answers))} (nats) | "
             "distinct-2 | tokens |", "|---|---|---|---|---|---|---|"]
    for name, found in answers.items():
        rate, low, high = win_rate(found.scores, answers[against].scores)
        beats = "" if name == against else f"{rate:.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {name} | {found.scores.mean():.3f} | {beats} | {ratings[name]:.0f} | {found.kl:.1f} | "
                     f"{distinct_n(found.texts, 2):.3f} | {found.length:.1f} |")
    return "\n".join(lines)
