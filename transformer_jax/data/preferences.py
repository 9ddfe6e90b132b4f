"""Prompts to answer, and answers that people have ranked."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer_jax.data.conversations import Conversation, Message, as_prompt, prompt_of
from transformer_jax.data.pairs import read_lines
from transformer_jax.data.records import located, read_records, text_of, texts_of


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several answers to a prompt, the best first.

    Attributes:
        prompt: What was asked; a text given here becomes one message of the user.
        responses: Two answers or more.
        ranks: The place of each answer, never falling; equal ranks are a tie. None: no two are
          tied.

    Raises:
        ValueError: fewer than two answers, a blank one, two equal ones, or ranks that do not fit
          the answers.
    """

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "prompt", as_prompt(self.prompt))
        object.__setattr__(self, "responses", tuple(self.responses))
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(self.ranks))
        if len(self.responses) < 2:
            raise ValueError(f"a comparison needs at least 2 responses, got {len(self.responses)}")
        for number, response in enumerate(self.responses, start=1):
            with located(f"response {number}"):
                Message("assistant", response)
            if (first := self.responses.index(response) + 1) < number:
                raise ValueError(f"responses {first} and {number} are equal: {response!r}; nothing is to be preferred")
        if self.ranks is not None:
            if len(self.ranks) != len(self.responses):
                raise ValueError(f"{len(self.ranks)} ranks for {len(self.responses)} responses")
            if list(self.ranks) != sorted(self.ranks):
                raise ValueError(f"ranks {list(self.ranks)} fall; responses come best first")


def read_comparisons(path: str | Path) -> list[Comparison]:
    """Reads ranked answers, in one of two forms beside the prompt.

    * `chosen` and `rejected`: two answers.
    * `responses`: two answers or more, best first; or in any order with `ranks` beside, from 1 for
      the best, equal for a tie.

    The prompt is that of any form that `read_demonstrations` knows: a `prompt`, `messages`, an
    `instruction` ...

    Args:
        path: A JSONL file (an object a line) or a JSON file (a list of objects), maybe compressed
          (`.gz`).

    Raises:
        ValueError: with the file and the number of the line or object: bad JSON, another form, an
            unknown role, fewer than two answers, an empty one, equal ones, or ranks that are no
            integers, one for each answer.
    """
    comparisons = []
    for where, record in read_records(path):
        with located(where):
            comparisons.append(Comparison(prompt_of(record), *_ranked(record)))
    return comparisons


def read_prompts(path: str | Path) -> list[tuple[Message, ...]]:
    """Reads prompts, without the answers that may stand beside them.

    Args:
        path: A file as `read_demonstrations` reads it, or a `.txt` file of UTF-8, a prompt of the
            user a line, blank lines left out.

    Raises:
        ValueError: as in `read_demonstrations`, or a text without a prompt.
    """
    prompts = []
    if Path(path).suffix == ".txt":
        lines = [line.rstrip("\r\n") for line in read_lines(Path(path))]
        prompts = [as_prompt(line) for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{path} has nothing but blank lines; expected a prompt a line")
        return prompts
    for where, record in read_records(path):
        with located(where):
            prompts.append(prompt_of(record))
    return prompts


def _ranked(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    if "chosen" in record or "rejected" in record:
        return (text_of(record, "chosen"), text_of(record, "rejected")), None
    responses, ranks = texts_of(record, "responses"), record.get("ranks")
    if ranks is None:
        return tuple(responses), None
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks) or len(ranks) != len(responses):
        raise ValueError(f"ranks {ranks!r} are not {len(responses)} integers, one for each response")
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return tuple(responses[place] for place in order), tuple(ranks[place] for place in order)
