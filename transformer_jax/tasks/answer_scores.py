"""Scores of answers and summaries: exact match and F1 as SQuAD measures them, and ROUGE."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from transformer_jax.data import Conversation, encode_prompt
from transformer_jax.data.conversations import answer_end_ids
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.training.bundle import Bundle

_ARTICLES = {"en": "a an the", "pt": "o a os as um uma uns umas"}
_ROUGE = ("rouge1", "rouge2", "rougeL")


def normalized_answer(text: str, language: str = "en") -> str:
    """Returns an answer in the form in which SQuAD compares answers: in lower case, without
    punctuation and articles, and with single spaces.

    Args:
      text: the answer.
      language: ``"en"`` or ``"pt"``, for the articles.

    Returns:
      The normalized answer.

    Raises:
      ValueError: if the language is not known.
    """
    if language not in _ARTICLES:
        raise ValueError(f"language={language!r} is not one of {', '.join(_ARTICLES)}, whose articles are known")
    kept = "".join(char for char in text.lower() if unicodedata.category(char)[0] not in "PS")
    articles = set(_ARTICLES[language].split())
    return " ".join(word for word in kept.split() if word not in articles)


def exact_match(answer: str, references: Sequence[str], language: str = "en") -> float:
    """Returns 1 if the answer is one of the references after normalization, else 0.

    Args:
      answer: the answer of a model.
      references: the right answers.
      language: ``"en"`` or ``"pt"``.

    Returns:
      1 or 0.
    """
    normalized = normalized_answer(answer, language)
    return float(any(normalized == normalized_answer(reference, language) for reference in references))


def f1(answer: str, references: Sequence[str], language: str = "en") -> float:
    """Returns the largest F1 of the words of an answer and of a reference.

    Args:
      answer: the answer of a model.
      references: the right answers.
      language: ``"en"`` or ``"pt"``.

    Returns:
      The harmonic mean of precision and recall, from 0 to 1.
    """
    return max(_f1_of_words(normalized_answer(answer, language).split(), normalized_answer(reference, language).split())
               for reference in references)


def _f1_of_words(words: list[str], right: list[str]) -> float:
    """F1 of two bags of words; two empty ones are equal."""
    if not words or not right:
        return float(words == right)
    shared = sum((collections.Counter(words) & collections.Counter(right)).values())
    return 2 * shared / (len(words) + len(right))


class _Words:
    """Splits a text at everything but letters and digits, of any alphabet. The tokenizer of
    rouge-score removes letters with accents."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def answer_scores(answers: Sequence[str], references: Sequence[Sequence[str]], *,
                  language: str = "en") -> dict[str, float]:
    """Compares answers or summaries with right ones; of several right ones, the nearest counts.

    Args:
      answers: the texts of a model.
      references: for each text the right ones, at least one.
      language: ``"en"`` or ``"pt"``, whose articles do not count for ``exact_match`` and ``f1``.

    Returns:
      ``exact_match`` and ``f1`` as the script of SQuAD 1.1 computes them, and ``rouge1``, ``rouge2``
      and ``rougeL``, the F measures of rouge-score without stemming, each the mean from 0 to 100.

    Raises:
      ImportError: if rouge-score is not installed.
      ValueError: if there are no answers, there are not as many lists of references, or a list is
        empty.

    Source: Rajpurkar et al. 2016, "SQuAD"; Lin 2004, "ROUGE".
    """
    try:
        from rouge_score import rouge_scorer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('scoring answers needs: pip install "transformer_jax[eval]"') from error
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} lists of references; expected equal numbers, "
                         "at least 1, and no empty list")
    scorer = rouge_scorer.RougeScorer(list(_ROUGE), tokenizer=_Words())
    rows = []
    for answer, right in zip(answers, references, strict=True):
        rouge = scorer.score_multi(list(right), answer)
        rows.append([exact_match(answer, right, language), f1(answer, right, language),
                     *(rouge[name].fmeasure for name in _ROUGE)])
    return dict(zip(("exact_match", "f1", *_ROUGE), (100 * np.mean(rows, axis=0)).tolist(), strict=True))


def answer_questions(bundle: Bundle, questions: Sequence[tuple[Conversation, Sequence[str]]], *, batch_size: int,
                     max_new_tokens: int, language: str) -> dict[str, float]:
    """Lets a model answer prompts greedily, and compares its answers with the right ones.

    Args:
      bundle: a decoder with a tokenizer that has tokens for the roles of a conversation.
      questions: prompts with their right answers.
      batch_size: the number of prompts that are answered at the same time.
      max_new_tokens: the largest number of tokens in an answer.
      language: the language of the answers.

    Returns:
      The scores of ``answer_scores``, and ``answered``, the number of prompts that leave room for
      an answer.

    Raises:
      ValueError: if none leaves room, or the language is not known.
    """
    normalized_answer("", language)  # an unknown language raises an error before the model answers
    tokenizer = cast(Any, bundle.tokenizer)
    room = bundle.config.max_len - max_new_tokens
    encoded = [(ids, right) for prompt, right in questions if len(ids := encode_prompt(prompt, tokenizer)) <= room]
    if not encoded:
        raise ValueError(f"no prompt leaves room for an answer of {max_new_tokens} tokens in a context of "
                         f"{bundle.config.max_len} tokens")
    encoded.sort(key=lambda question: len(question[0]))
    texts: list[str] = []
    for start in tqdm(range(0, len(encoded), batch_size), desc="Answering", leave=False):
        rows = [ids for ids, _ in encoded[start:start + batch_size]]
        padded = rows + rows[-1:] * (batch_size - len(rows))  # so that every batch has the same shape
        result = generate(bundle.model, padded, tokenizer=tokenizer, max_new_tokens=max_new_tokens,
                          sampling=Sampling(temperature=0), end_ids=answer_end_ids(tokenizer))
        texts += (result.texts or [])[:len(rows)]
    scores = answer_scores([text.strip() for text in texts], [right for _, right in encoded], language=language)
    return {"answered": len(encoded), **scores}
