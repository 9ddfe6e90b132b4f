"""Reads prompts, and answers that people have ranked."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_jax.data.conversations import Conversation, Message, as_prompt
from transformer_jax.data.files import name_without_compression, read_lines
from transformer_jax.data.forms import prompt_of, ranked_of, read_examples
from transformer_jax.data.records import first_object
from transformer_jax.json_files import located


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several answers to a prompt, with the best one first.

    Attributes:
      prompt: The prompt. A text becomes one message of the user.
      responses: At least two answers.
      ranks: The rank of each answer, in ascending order. Equal ranks are a tie. None means that
        there are no ties.

    Raises:
      ValueError: If there are fewer than two answers, if one is blank, if two are equal, or if the
        ranks do not match the answers.
    """

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "prompt", as_prompt(self.prompt))
        if isinstance(self.responses, str | bytes) or not isinstance(self.responses, Sequence):
            raise ValueError(f"responses must be a list of texts, not a {type(self.responses).__name__}")
        object.__setattr__(self, "responses", tuple(self.responses))
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(self.ranks))
        if len(self.responses) < 2:
            raise ValueError(f"a comparison needs at least 2 responses, got {len(self.responses)}")
        for number, response in enumerate(self.responses, start=1):
            with located(f"response {number}"):
                Message("assistant", response)
            if (first := self.responses.index(response) + 1) < number:
                raise ValueError(f"responses {first} and {number} are equal: {response!r}; responses must differ")
        if self.ranks is not None:
            if len(self.ranks) != len(self.responses):
                raise ValueError(f"{len(self.ranks)} ranks for {len(self.responses)} responses")
            if list(self.ranks) != sorted(self.ranks):
                raise ValueError(f"ranks {list(self.ranks)} must not decrease, because the best response comes first")


def read_comparisons(path: str | Path) -> list[Comparison]:
    """Reads ranked answers.

    Each object has one of these forms:

    * ``chosen`` and ``rejected``: two answers. Each one is a text or, as in TRL, a list of messages
      of which the last is the answer. Such a list may begin with the prompt; then the object needs
      no other prompt. The same holds for texts in which each turn begins with a blank line and
      "Human:" or "Assistant:".
    * ``responses``: at least two answers, with the best one first. With ``ranks`` they may come in
      any order; the best rank is 1, and equal ranks are a tie.

    The prompt has any form that ``read_demonstrations`` accepts: ``prompt``, ``messages``,
    ``instruction`` ...

    Args:
      path: A file with one JSON object on each line, or with a list of objects, possibly compressed
        with gzip.

    Returns:
      One comparison for each object.

    Raises:
      ValueError: If an object is not valid: bad JSON, a different form, an unknown role, fewer than
        two answers, an empty answer, equal answers, or ranks that are not one integer for each
        answer. The message gives the file and the number of the line or object.
    """
    return read_examples(path, comparison_of)


def comparison_of(record: Mapping[str, Any]) -> Comparison:
    """Converts a record in one of the forms of ``read_comparisons`` to a comparison. Raises
    ValueError if the record is not valid."""
    return Comparison(*ranked_of(record))


def read_prompts(path: str | Path) -> list[tuple[Message, ...]]:
    """Reads prompts. If a record also has answers, they are ignored.

    Args:
      path: A file that ``read_demonstrations`` or ``read_comparisons`` accepts, or a UTF-8 file
        named ``.txt`` with one prompt of the user on each line, in which blank lines are skipped.
        If the first lines of a ``.txt`` file are JSON objects, it is read as a JSON file.

    Returns:
      The messages of each prompt.

    Raises:
      ValueError: If a record is not valid, as in ``read_demonstrations``, or if a text file has no
        prompt.
    """
    path = Path(path)
    if not name_without_compression(path).endswith(".txt") or first_object(path) is not None:
        return read_examples(path, prompt_of)
    prompts = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            with located(f"{path}, line {number}"):
                prompts.append(as_prompt(line.rstrip("\r\n")))
    if not prompts:
        raise ValueError(f"{path} has nothing but blank lines; expected one prompt on each line")
    return prompts
