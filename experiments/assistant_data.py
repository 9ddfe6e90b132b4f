"""Film reviews cut into what each stage of an assistant learns from, so that no two stages see the
same text."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import pathlib
import random
from collections.abc import Sequence

from transformer_jax.alignment.bag_of_words import BagOfWords
from transformer_jax.data import Comparison, Conversation, Message

# Words that praise and blame have in common: what a prompt asks to write about.
TOPICS = frozenset("""
    acting action actor actors adventure animation audience camera cast character characters children comedy
    crime death dialogue direction director documentary drama effects ending energy entertainment feature film
    filmmakers horror humor ideas kids life love material message moments movie movies music mystery narrative
    original people performance picture pictures plot reality romance romantic satire scene scenes screen
    screenplay sequel stories story storytelling style subject suspense tale thriller violence visual war work
    world writing
    """.split())  # noqa: SIM905
_HELD_OUT_PROMPTS = 200
_LONGEST = 32  # words of a sentence: with longer ones most of a batch would be padding
_HELD_OUT_REVIEWS = 20
_PAIRINGS = 4  # of each positive sentence with negative ones


@dataclasses.dataclass(frozen=True)
class AssistantData:
    """What each stage reads.

    Attributes:
      documents: to pretrain on: half of the reviews, and novels.
      held_out_documents: a few reviews to validate that on.
      judge: knows the other half of the reviews, and the sentences that are about no topic or too
        long, which no stage sees.
      demonstrations: prompts of one or two topics, and sentences about them, good and bad alike.
      held_out_demonstrations: of sentences that no stage learns from.
      comparisons: a sentence of praise is preferred to one of blame.
      held_out_comparisons: of sentences that no stage learns from.
      prompts: pairs of topics to answer in reinforcement learning.
      held_out_prompts: pairs that no stage meets.
    """

    documents: list[str]
    held_out_documents: list[str]
    judge: BagOfWords
    demonstrations: list[Conversation]
    held_out_demonstrations: list[Conversation]
    comparisons: list[Comparison]
    held_out_comparisons: list[Comparison]
    prompts: list[Conversation]
    held_out_prompts: list[Conversation]


def read(folder: pathlib.Path) -> AssistantData:
    """Reads ``movie_reviews``, ``sentence_polarity`` and ``english_novels`` in a folder; the same
    cut every time.

    Raises:
      ValueError: for a folder without them.
    """
    paths = [folder / "movie_reviews" / "reviews.jsonl.gz", *(
        folder / "sentence_polarity" / f"rt-polarity.{kind}.txt" for kind in ("pos", "neg"))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; --data is a folder with movie_reviews, sentence_polarity and "
                             "english_novels")
    with gzip.open(paths[0], "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line) for line in lines]
    novels = [path.read_text(encoding="utf-8").lower() for path in sorted((folder / "english_novels").glob("*.txt"))]
    read, judged = [review["text"] for review in reviews[0::2]], reviews[1::2]
    draw = random.Random(0)
    about, others = zip(*(_about(path, draw) for path in paths[1:]), strict=True)
    judge = BagOfWords(*([review["text"] for review in judged if review["label"] == label] + rest
                         for label, rest in zip(("pos", "neg"), others, strict=True)))
    tuning, ranking, held_out = _split(about)
    pairs = [(a, b) for a, b in itertools.permutations(sorted(TOPICS), 2)]
    draw.shuffle(pairs)
    met = {tuple(topics) for _, topics in itertools.chain(*tuning, *ranking)}
    unmet = [pair for pair in pairs if pair not in met and pair[::-1] not in met]
    held_out_pairs = {frozenset(pair) for pair in unmet[:_HELD_OUT_PROMPTS]}
    return AssistantData(
        documents=read[_HELD_OUT_REVIEWS:] + novels, held_out_documents=read[:_HELD_OUT_REVIEWS], judge=judge,
        demonstrations=_demonstrations(tuning, draw), held_out_demonstrations=_demonstrations(held_out, draw),
        comparisons=_comparisons(ranking, _PAIRINGS, draw), held_out_comparisons=_comparisons(held_out, 1, draw),
        prompts=[_prompt(pair) for pair in pairs if frozenset(pair) not in held_out_pairs],
        held_out_prompts=[_prompt(pair) for pair in unmet[:_HELD_OUT_PROMPTS]])


_Sentence = tuple[str, list[str]]  # with its topics


def _about(path: pathlib.Path, draw: random.Random) -> tuple[list[_Sentence], list[str]]:
    """The sentences of a file that are about a topic and not too long, shuffled; and the others."""
    sentences = dict.fromkeys(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found, others = [], []
    for sentence in sentences:
        words = sentence.split()
        topics = [word for word in dict.fromkeys(words) if word in TOPICS][:2]
        if topics and len(words) <= _LONGEST:
            found.append((sentence, topics))
        else:
            others.append(sentence)
    draw.shuffle(found)
    return found, others


def _split(kinds: Sequence[list[_Sentence]]) -> list[list[list[_Sentence]]]:
    """Two fifths of each kind to tune on, half to rank, a tenth held out."""
    cuts = [(int(0.4 * len(kind)), int(0.9 * len(kind))) for kind in kinds]
    return [[kind[:a] for kind, (a, _) in zip(kinds, cuts, strict=True)],
            [kind[a:b] for kind, (a, b) in zip(kinds, cuts, strict=True)],
            [kind[b:] for kind, (_, b) in zip(kinds, cuts, strict=True)]]


def _prompt(topics: tuple[str, ...] | list[str]) -> Conversation:
    return (Message("user", ", ".join(topics)),)


def _demonstrations(kinds: list[list[_Sentence]], draw: random.Random) -> list[Conversation]:
    found = [(*_prompt(topics), Message("assistant", sentence)) for sentence, topics in itertools.chain(*kinds)]
    draw.shuffle(found)
    return found


def _comparisons(kinds: list[list[_Sentence]], pairings: int, draw: random.Random) -> list[Comparison]:
    """Each positive sentence with negative ones, asked for by a topic of each in any order, so that
    no prompt tells."""
    positive, negative = kinds
    found = []
    for _ in range(pairings):
        drawn = draw.choices(negative, k=len(positive))
        for (good, good_topics), (bad, bad_topics) in zip(positive, drawn, strict=True):
            topics = [good_topics[0], bad_topics[0]]
            draw.shuffle(topics)
            if good != bad:
                found.append(Comparison(_prompt(dict.fromkeys(topics)), (good, bad)))
    draw.shuffle(found)
    return found
