"""The base class of tasks that train an assistant: it reads examples from a file, checks the model
to start from, and shows answers."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast

import jax

from transformer_jax.data import Conversation, encode_prompt
from transformer_jax.data.conversations import AnyTokenizer, answer_end_ids
from transformer_jax.data.examples import checked_examples
from transformer_jax.decoding.batch import check_family
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.inputs import split
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle

_NUM_SHOWN_PROMPTS = 4


class AnsweringTask(Task):
    """A task that starts from a trained decoder and teaches it to answer prompts.

    Attributes:
      examples: The plural noun that messages use for the examples, such as ``"comparisons"``.
      read_file: A function that reads a file of examples.
      read_example: A function that converts one item of a list from the caller to an example.
    """

    family = "decoder"
    needs_base = True
    examples: ClassVar[str] = "examples"
    read_file: ClassVar[Callable[[str], Sequence[Any]]]
    read_example: ClassVar[Callable[[Any], Any]]

    def start_from(self, base: Bundle) -> Bundle:
        """Returns the base unchanged.

        Args:
          base: The trained model.

        Returns:
          The same bundle.

        Raises:
          ValueError: If the model cannot answer prompts; see ``answering``.
        """
        answering(base)
        return base

    def read(self, data: Sequence[Any] | None = None,
             held_out: Sequence[Any] | None = None) -> tuple[Sequence[Any], Sequence[Any]]:
        """Reads the training examples and the held-out examples.

        Args:
          data: Examples, or dicts with the fields of a line of the data file. ``None`` means that
            the file ``config.data.path`` is read.
          held_out: Examples to evaluate on, in the same form as ``data``.

        Returns:
          The training examples and the held-out examples.

        Raises:
          ValueError: If an example is invalid (the message gives its number), if there are too few
            examples to split, or if the settings name no data.
        """
        settings, read_file = self.config.data, type(self).read_file
        if data is not None:
            checked = self._checked(data)
            if held_out is None:
                return split(checked, settings.validation_fraction, self.examples)
            return checked, self._checked(held_out)
        if settings.path is None or settings.tfds is not None or settings.generated is not None:
            raise ValueError("no training data is given; set --config.data.path=FILE, where the file holds "
                             f"{self.examples}")
        found = read_file(settings.path)
        if settings.validation_path is not None:
            return found, read_file(settings.validation_path)
        return split(found, settings.validation_fraction, self.examples)

    def _checked(self, data: Sequence[Any]) -> list[Any]:
        return checked_examples(data, type(self).read_example, self.examples.removesuffix("s"))

    def texts(self, examples: Sequence[Any]) -> tuple[()]:
        """Returns no texts, because the model to start from already has a tokenizer."""
        return ()

    def show(self, model: Decoder, step: int, data: TaskData) -> str | None:
        """Generates answers to the first held-out prompts, and also writes them to
        ``answers/STEP.txt`` in the workdir."""
        tokenizer, shown = data.shown
        sample = self.config.sample
        if not sample.every or not shown:
            return None
        texts = generate(model, [ids for _, ids in shown], tokenizer=tokenizer, key=jax.random.key(self.config.seed),
                         max_new_tokens=sample.max_new_tokens, sampling=self._sampling(),
                         end_ids=answer_end_ids(tokenizer)).texts
        answers = "\n".join(f"{prompt[-1].content}\n  -> {text}"
                            for (prompt, _), text in zip(shown, texts or [], strict=True))
        if self.workdir is not None:
            path = self.workdir / "answers" / f"{step}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{answers}\n", encoding="utf-8")
        return answers

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.config.sample.temperature, top_k=self.config.sample.top_k)

    def next_command(self, workdir: str) -> str:
        """Returns the command that asks the trained model a question."""
        return f'transformer-jax generate --workdir={workdir} --chat --prompt="..."'

    @property
    def run_directory(self) -> pathlib.Path:
        """The workdir. Raises ValueError if the task has no workdir."""
        if self.workdir is None:
            raise ValueError(f"the task {self.name!r} needs the workdir of its run, but this run has no workdir; pass "
                             "workdir=... to tj.train")
        return self.workdir

    def shown_prompts(self, prompts: Iterable[Conversation],
                      tokenizer: AnyTokenizer) -> tuple[AnyTokenizer, list[tuple[Conversation, list[int]]]]:
        """Selects the first few prompts that leave room for an answer.

        Args:
          prompts: The held-out prompts.
          tokenizer: The tokenizer of the model.

        Returns:
          The tokenizer, and the selected prompts with their token ids, which ``show`` needs.
        """
        self._sampling()  # invalid sampling settings raise ValueError here, before training starts
        room = self.config.model.max_len - self.config.sample.max_new_tokens
        encoded = ((prompt, encode_prompt(prompt, tokenizer)) for prompt in prompts)
        return tokenizer, list(itertools.islice(((prompt, ids) for prompt, ids in encoded if len(ids) <= room),
                                                _NUM_SHOWN_PROMPTS))


def answering(base: Bundle | None) -> tuple[Decoder, AnyTokenizer]:
    """Returns a model that can answer prompts, and its tokenizer.

    Args:
      base: The trained model.

    Returns:
      The decoder and its tokenizer.

    Raises:
      ValueError: If there is no model, the model is not a decoder, it has no tokenizer, or its
        tokenizer has no tokens for the roles of a conversation.
    """
    if base is None:
        raise ValueError("this task starts from a trained model, but none is given; pass base=tj.load(...)")
    check_family("this task", base.model, "decoder")
    if base.tokenizer is None:
        raise ValueError("the model to start from has no tokenizer; pass the workdir of a training run")
    base.tokenizer.encode_role("user")
    return cast(Decoder, base.model), base.tokenizer
