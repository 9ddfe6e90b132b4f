"""Compare several models: let them answer the same prompts, and let a judge score the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np

from transformer_jax.alignment.judging import distinct_n, elo_ratings, win_rate
from transformer_jax.alignment.rollouts import Reward, collect
from transformer_jax.data import Conversation, encode_prompt
from transformer_jax.data.conversations import AnyTokenizer
from transformer_jax.decoding.batch import bucket
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.bundle import Bundle

_PROMPTS_PER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Answers:
    """One model's answers, one to each prompt.

    Attributes:
      texts: the answers.
      scores: the judge's score of each answer, float32 ``[number of prompts]``.
      kl: mean KL divergence from the first model, in nats per answer, estimated on this model's own
        answers.
      length: mean number of tokens per answer.
    """

    texts: list[str]
    scores: np.ndarray
    kl: float
    length: float


def answer(bundles: Mapping[str, Bundle], prompts: Sequence[Conversation], judge: Reward, *, max_new_tokens: int,
           seed: int = 0) -> dict[str, Answers]:
    """Lets every model answer every prompt, at temperature 1 and with the same random numbers.

    Args:
      bundles: the models by name. The KL divergence is measured from the first one.
      prompts: the prompts to answer.
      judge: a reward model, or a function that maps a list of texts to one number per text.
      max_new_tokens: the largest number of tokens in an answer.
      seed: seed of the random numbers that sample the answers.

    Returns:
      The answers of each model, by the name of the model.

    Raises:
      ValueError: if there is no model or no prompt, a model is not a decoder, the models have
        different tokenizers, or a prompt leaves no room for an answer.
    """
    if not bundles or not prompts:
        raise ValueError(f"got {len(bundles)} models and {len(prompts)} prompts; expected at least one of each")
    first, *others = bundles.values()
    tokenizer, models = first.tokenizer, {}
    for name, bundle in bundles.items():
        if tokenizer is None or bundle.tokenizer is None or bundle.tokenizer.digest != tokenizer.digest:
            raise ValueError(f"{name} has another tokenizer than {next(iter(bundles))}; compare only models that have "
                             "the same tokenizer")
        if not isinstance(bundle.model, Decoder):
            raise ValueError(f"{name} is a model of the family {bundle.config.family}; expected a decoder, because "
                             "only decoders can answer prompts")
        models[name] = bundle.model
    encoded = [encode_prompt(prompt, cast(AnyTokenizer, tokenizer)) for prompt in prompts]
    longest = max(map(len, encoded))
    room = min(bundle.config.max_len for bundle in (first, *others)) - max_new_tokens
    if longest > room:
        raise ValueError(f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} tokens do not fit into "
                         f"a context of {room + max_new_tokens} tokens; shorten the prompt, or reduce max_new_tokens")
    width = min(bucket(longest), room)
    reference = next(iter(models.values()))
    return {name: _answers(model, reference, encoded, judge, cast(AnyTokenizer, tokenizer), width, max_new_tokens, seed)
            for name, model in models.items()}


def _answers(model: Decoder, reference: Decoder, prompts: list[list[int]], judge: Reward, tokenizer: AnyTokenizer,
             width: int, max_new_tokens: int, seed: int) -> Answers:
    """Lets one model answer all prompts, in batches, and scores the answers."""
    texts, scores, kls, lengths = [], [], [], []
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        rollout, new_texts = collect(model, prompts[start:start + _PROMPTS_PER_BATCH], reference=reference,
                                     reward=judge, tokenizer=tokenizer,
                                     key=jax.random.fold_in(jax.random.key(seed), start), prompt_len=width,
                                     max_new_tokens=max_new_tokens)
        kls_BR = np.where(rollout.mask_BR, rollout.logprobs_BR - rollout.reference_logprobs_BR, 0.0)
        texts += new_texts
        scores.append(np.asarray(rollout.scores_B))
        kls.append(kls_BR.sum(1))
        lengths.append(rollout.mask_BR.sum(1))
    return Answers(texts, np.concatenate(scores), float(np.concatenate(kls).mean()),
                   float(np.concatenate(lengths).mean()))


def table(answers: Mapping[str, Answers], against: str) -> str:
    """Formats the comparison as a Markdown table.

    Args:
      answers: the answers of each model, as ``answer`` returns them.
      against: the name of the model that the win rates are measured against.

    Returns:
      A table with one row per model: the judge's mean score, win rate, Elo rating, KL divergence,
      diversity (distinct-2) and mean length.
    """
    ratings = elo_ratings({name: own.scores for name, own in answers.items()})
    lines = [f"| model | judge's score | beats {against} (95 % interval) | Elo | KL to {next(iter(answers))} (nats) | "
             "distinct-2 | tokens |", "|---|---|---|---|---|---|---|"]
    for name, own in answers.items():
        rate, low, high = win_rate(own.scores, answers[against].scores)
        beats = "" if name == against else f"{rate:.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {name} | {own.scores.mean():.3f} | {beats} | {ratings[name]:.0f} | {own.kl:.1f} | "
                     f"{distinct_n(own.texts, 2):.3f} | {own.length:.1f} |")
    return "\n".join(lines)
