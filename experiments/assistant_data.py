"""Training data for the stages of an assistant. Film reviews are divided so that no two stages see
the same text."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import random
from collections.abc import Sequence

from transformer_jax.alignment.bag_of_words import BagOfWords
from transformer_jax.data import Comparison, Conversation, Message
from transformer_jax.data.records import read_records, text_of
from transformer_jax.json_files import located

# Words that occur in positive and in negative sentences. A prompt asks for a sentence about them.
TOPICS = frozenset("""
    acting action actor actors adventure animation audience camera cast character characters children comedy
    crime death dialogue direction director documentary drama effects ending energy entertainment feature film
    filmmakers horror humor ideas kids life love material message moments movie movies music mystery narrative
    original people performance picture pictures plot reality romance romantic satire scene scenes screen
    screenplay sequel stories story storytelling style subject suspense tale thriller violence visual war work
    world writing
    """.split())  # noqa: SIM905
_HELD_OUT_PROMPTS = 200
_LONGEST = 32  # the largest number of words in a sentence; longer ones would fill batches with padding
_HELD_OUT_REVIEWS = 20
_PAIRINGS = 4  # the number of negative sentences that each positive sentence is compared with


@dataclasses.dataclass(frozen=True)
class AssistantData:
    """The data of each stage.

    Attributes:
      documents: The documents for pretraining: half of the reviews, and novels.
      held_out_documents: A few reviews to evaluate the pretraining on.
      judge: A classifier that is trained on the other half of the reviews, and on sentences that
        have no topic or are too long. No stage sees these texts.
      demonstrations: Prompts of one or two topics with a positive or negative sentence about them.
      held_out_demonstrations: The same, with sentences that no stage is trained on.
      comparisons: Comparisons in which a positive sentence is preferred to a negative one.
      held_out_comparisons: The same, with sentences that no stage is trained on.
      prompts: The prompts for reinforcement learning, which are pairs of topics.
      held_out_prompts: Pairs of topics that no stage is trained on.
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
    """Reads ``movie_reviews``, ``sentence_polarity`` and ``english_novels`` from a folder, and
    divides them in the same way every time.

    Args:
      folder: The folder that contains the three data sets.

    Returns:
      The data of each stage.

    Raises:
      ValueError: If a file is missing.
    """
    paths = [folder / "movie_reviews" / "reviews.jsonl.gz", *(
        folder / "sentence_polarity" / f"rt-polarity.{kind}.txt" for kind in ("pos", "neg"))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; set --data to the folder with movie_reviews, sentence_polarity "
                             "and english_novels")
    reviews = []
    for where, record in read_records(paths[0]):
        with located(where):
            reviews.append({key: text_of(record, key) for key in ("text", "label")})
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


_Sentence = tuple[str, list[str]]  # a sentence and its topics


def _about(path: pathlib.Path, draw: random.Random) -> tuple[list[_Sentence], list[str]]:
    """Returns the sentences of a file that have a topic and are not too long, shuffled, and the
    other sentences."""
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
    """Divides each kind of sentences: two fifths for fine-tuning, half for comparisons, and one
    tenth is held out."""
    cuts = [(int(0.4 * len(kind)), int(0.9 * len(kind))) for kind in kinds]
    return [[kind[:a] for kind, (a, _) in zip(kinds, cuts, strict=True)],
            [kind[a:b] for kind, (a, b) in zip(kinds, cuts, strict=True)],
            [kind[b:] for kind, (_, b) in zip(kinds, cuts, strict=True)]]


def _prompt(topics: tuple[str, ...] | list[str]) -> Conversation:
    """Returns the prompt that asks for a sentence about the topics."""
    return (Message("user", ", ".join(topics)),)


def _demonstrations(kinds: list[list[_Sentence]], draw: random.Random) -> list[Conversation]:
    """Returns each sentence as the answer to the prompt of its topics, shuffled."""
    found = [(*_prompt(topics), Message("assistant", sentence)) for sentence, topics in itertools.chain(*kinds)]
    draw.shuffle(found)
    return found


def _comparisons(kinds: list[list[_Sentence]], pairings: int, draw: random.Random) -> list[Comparison]:
    """Compares each positive sentence with negative ones. The prompt has one topic of each
    sentence, in random order, so that it does not reveal which sentence is better."""
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
