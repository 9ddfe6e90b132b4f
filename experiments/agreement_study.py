"""The measurements of ``experiments.agreement``: how often a model chooses the right word, where it
reads the noun that decides, and which heads it needs for that."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import transformer_jax as tj
from transformer_jax.data import AgreementSentence
from transformer_jax.inspection.causal import Head
from transformer_jax.inspection.interventions import Edits
from transformer_jax.training.bundle import Bundle

ROWS = 50  # rows of a batch
ENOUGH_RIGHT = 0.75  # with fewer right answers, the heads that are removed are those that matter
OTHER_GENDER = {"o": "a", "a": "o", "os": "as", "as": "os"}  # endings of adjectives, and articles


@dataclasses.dataclass(frozen=True)
class Questions:
    """Sentences of one length in tokens, without their answers, as a model reads them.

    Attributes:
      sentences: The B sentences.
      tokens_BT: What the model reads: for an encoder the sentence with a mask in place of the
        answer, for a decoder the words before the answer.
      position: The position whose logits predict the answer.
      choices_BC: The token of the answer first, then those of its alternatives. If a sentence has
        fewer alternatives than others, its first one is repeated.
    """

    sentences: list[AgreementSentence]
    tokens_BT: np.ndarray
    position: int
    choices_BC: np.ndarray

    def __len__(self) -> int:
        return len(self.sentences)


def ask(bundle: Bundle, sentences: Sequence[AgreementSentence]) -> tuple[list[Questions], int]:
    """Tokenizes sentences and groups them by length.

    Args:
      bundle: An encoder or a decoder, with its tokenizer.
      sentences: The sentences. A decoder needs those whose answer is the last word.

    Returns:
      The groups, and the number of sentences that are left out because the answer or an alternative
      is more than one token.
    """
    groups = collections.defaultdict(list)
    for sentence in sentences:
        ids, position = _read(bundle, sentence)
        choices = [_token(bundle, sentence, word, ids, position) for word in (sentence.answer, *sentence.alternatives)]
        if None not in choices:
            groups[len(ids), position].append((sentence, ids, [*choices, *[choices[1]] * (4 - len(choices))]))
    made = [Questions([row[0] for row in rows], np.array([row[1] for row in rows], np.int32), position,
                      np.array([row[2] for row in rows], np.int32)) for (_, position), rows in sorted(groups.items())]
    return made, len(sentences) - sum(map(len, made))


def _read(bundle: Bundle, sentence: AgreementSentence) -> tuple[list[int], int]:
    """Returns the tokens that the model reads, and the position that predicts the answer."""
    if bundle.config.family == "encoder":
        ids = bundle.tokenizer.encode_masked(sentence.masked(bundle.tokenizer.mask_token))
        return ids, ids.index(bundle.tokenizer.mask_id)
    ids = bundle.tokenizer.encode_prompt(sentence.prefix)
    return ids, len(ids) - 1


def _token(bundle: Bundle, sentence: AgreementSentence, word: str, ids: list[int], position: int) -> int | None:
    """Returns the token of a word in place of the answer; ``None`` if it is more than one token."""
    if bundle.config.family == "encoder":
        found = bundle.tokenizer.encode_masked(sentence.masked(word))
        wanted = [*ids[:position], *found[position:position + 1], *ids[position + 1:]]
    else:
        found = bundle.tokenizer.encode_prompt(f"{sentence.prefix} {word}")
        wanted, position = [*ids, *found[-1:]], len(ids)
    return found[position] if found == wanted else None


def chosen(bundle: Bundle, questions: Questions, intervene: Edits | None = None) -> np.ndarray:
    """Asks the model.

    Args:
      bundle: The model.
      questions: The sentences.
      intervene: A change of the model's activations.

    Returns:
      Booleans ``[B, 2]``: whether the answer is the most probable token of all, and whether it is
      more probable than its alternatives.
    """
    found = []
    for start in range(0, len(questions), ROWS):
        rows = np.arange(start, start + ROWS) % len(questions)  # the last batch is filled up
        logits_BV = tj.forward(bundle.model, questions.tokens_BT[rows], intervene=intervene)[:, questions.position]
        choices_BC = questions.choices_BC[rows]
        logits_BC = np.take_along_axis(np.asarray(logits_BV), choices_BC, axis=1)
        found.append(np.stack([np.asarray(logits_BV.argmax(-1)) == choices_BC[:, 0],
                               logits_BC[:, 0] > logits_BC[:, 1:].max(1)], axis=1))
    return np.concatenate(found)[:len(questions)]


def accuracy(bundle: Bundle, groups: Sequence[Questions], intervene: Edits | None = None) -> np.ndarray:
    """Computes the means of ``chosen`` over all groups, ``[2]``; NaN if there is no question."""
    if not groups:
        return np.full(2, np.nan)
    return np.concatenate([chosen(bundle, questions, intervene) for questions in groups]).mean(0)


def difference(questions: Questions) -> Callable[[jax.Array], jax.Array]:
    """Returns a metric of logits: how much larger the logit of the answer is than that of its first
    alternative, as a mean over the sentences."""
    position, choices_BC = questions.position, jnp.asarray(questions.choices_BC[:, :2])

    def metric(logits_BTV: jax.Array) -> jax.Array:
        logits_BC = jnp.take_along_axis(logits_BTV[:, position], choices_BC, axis=-1)
        return (logits_BC[:, 0] - logits_BC[:, 1]).mean()

    return metric


def head_effects(bundle: Bundle, questions: Questions) -> np.ndarray:
    """Measures how much the metric ``difference`` falls without each head.

    Args:
      bundle: The model.
      questions: The sentences. The output of the head is replaced by its mean over all of them.

    Returns:
      float32 ``[L, N]``: negative for heads that the answers need.
    """
    tokens_BT = questions.tokens_BT
    return np.asarray(tj.inspection.head_ablation_table(
        bundle.model, tokens_BT, difference(questions), how="mean", reference=tj.trace(bundle.model, tokens_BT)))


def needed_heads(bundle: Bundle, questions: Questions, most: int) -> list[Head]:
    """Finds heads whose joint removal makes most answers wrong, one after the other.

    Heads can replace each other, so each next head is the one that matters most once the heads
    before it are gone. How many heads can do so differs between trained models, and the search ends
    when fewer than ``ENOUGH_RIGHT`` of the answers are right against their alternatives.

    Args:
      bundle: The model.
      questions: The sentences.
      most: The largest number of heads.

    Returns:
      The heads as ``(layer, head)``.
    """
    metric, found, right = difference(questions), [], 1.0
    heads = list(np.ndindex(bundle.config.num_layers, bundle.config.num_heads))
    while len(found) < most and right >= ENOUGH_RIGHT:
        effects = []
        for head in (one for one in heads if one not in found):
            logits_BTV = tj.forward(bundle.model, questions.tokens_BT,
                                    intervene=without(bundle, questions, [*found, head]))
            logits_BC = np.take_along_axis(np.asarray(logits_BTV[:, questions.position]), questions.choices_BC, axis=1)
            effects.append((float(np.mean(logits_BC[:, 0] > logits_BC[:, 1:].max(1))), float(metric(logits_BTV)), head))
        right, _, head = min(effects)
        found.append(head)
    return found


def without(bundle: Bundle, questions: Questions, heads: Sequence[Head]) -> Edits:
    """Returns the intervention that replaces the outputs of heads by their means over sentences."""
    reference = tj.trace(bundle.model, questions.tokens_BT)
    return tj.inspection.together(*(tj.inspection.ablate_head(*head, "mean", reference=reference) for head in heads))


def patching(bundle: Bundle, clean: Questions, corrupted: Questions) -> np.ndarray:
    """Measures where the model holds what tells two sentences apart.

    Args:
      bundle: The model.
      clean: Sentences.
      corrupted: The same number of sentences of the same length with other answers, such as those
        of ``agreement_contrasts``.

    Returns:
      float32 ``[L, T]``: the part of the difference of the answers' logits that comes back in the
      corrupted run if one vector of the residual stream comes from the clean run. 1 means all.
    """
    choices_BC = np.stack([clean.choices_BC[:, 0], corrupted.choices_BC[:, 0]], axis=1)
    metric = difference(dataclasses.replace(clean, choices_BC=choices_BC))
    whole = [float(metric(tj.forward(bundle.model, one.tokens_BT))) for one in (clean, corrupted)]
    effects_LT = tj.inspection.patching_grid(bundle.model, clean.tokens_BT, corrupted.tokens_BT, metric)
    return np.asarray(effects_LT) / (whole[0] - whole[1])


def noun_phrase(bundle: Bundle, questions: Questions, *, of_referent: bool = True) -> slice | None:
    """Returns the positions of a noun and of the word before it, which are the same in all
    sentences of a family.

    Args:
      bundle: The model.
      questions: Sentences of one family and form.
      of_referent: Whether the noun is the one that decides the answer, or the other one.

    Returns:
      The two positions; ``None`` if the words before the answer are not one token each.
    """
    sentence = questions.sentences[0]
    before = questions.position - sentence.answer_at  # tokens that are no word, such as <s>
    before += bundle.config.family != "encoder"  # a decoder answers at the last word
    if before > 1:
        return None
    noun = before + (sentence.referent_at if of_referent else sentence.other_at)
    return slice(noun - 1, noun + 1)


def is_feminine(questions: Questions) -> np.ndarray:
    """Returns whether the answer of each sentence has a feminine ending, ``[B]``."""
    return np.array([re.sub("s$", "", sentence.answer)[-1] == "a" for sentence in questions.sentences])


def gender_direction(bundle: Bundle, questions: Questions) -> np.ndarray:
    """Computes how the embeddings of feminine nouns, and of the words before them, differ from
    those of masculine ones.

    Args:
      bundle: The model.
      questions: Sentences of the family "part" with the adjective as the answer.

    Returns:
      The differences of the means, float32 ``[2, D]``: of the words before the nouns, and of the
      nouns.
    """
    places = noun_phrase(bundle, questions)
    embedded_B2D = np.asarray(tj.trace(bundle.model, questions.tokens_BT)["residual"][0])[:, places]
    feminine_B = is_feminine(questions)
    return np.stack([tj.inspection.mean_difference(embedded_B2D[feminine_B, place], embedded_B2D[~feminine_B, place])
                     for place in range(2)])


def turned(bundle: Bundle, questions: Questions, places: slice, direction_2D: np.ndarray) -> float:
    """Measures how often the answer changes its gender, and keeps its number, when a direction is
    added to embeddings of sentences with a masculine answer and subtracted from the others.

    Args:
      bundle: The model.
      questions: Sentences of the family "part" with the adjective as the answer.
      places: Two positions.
      direction_2D: What is added to the embeddings there.

    Returns:
      The share of the sentences.
    """
    changes_BTD = np.zeros((*questions.tokens_BT.shape, direction_2D.shape[-1]), np.float32)
    changes_BTD[:, places] = np.where(is_feminine(questions), -1.0, 1.0)[:, None, None] * direction_2D
    logits_BV = np.asarray(tj.forward(bundle.model, questions.tokens_BT, intervene=tj.inspection.steer(
        0, changes_BTD))[:, questions.position])
    best_B = np.take_along_axis(logits_BV, questions.choices_BC, axis=1).argmax(1)
    right = []
    for sentence, best in zip(questions.sentences, best_B, strict=True):
        words = (sentence.answer, *sentence.alternatives)
        ending = re.search("[oa]s?$", sentence.answer)[0]
        right.append(words[best] == sentence.answer.removesuffix(ending) + OTHER_GENDER[ending])
    return float(np.mean(right))
