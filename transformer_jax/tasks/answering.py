"""What the tasks of an assistant share: examples from a file, the model to start from, and answers
to show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax

from transformer_jax.data import Conversation, Tokenizer, encode_prompt
from transformer_jax.decoding.batch import check_family
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.base import Task, TaskData, split
from transformer_jax.training.bundle import Bundle

_SHOWN = 4


class AnsweringTask(Task):
    """A task that starts from a trained decoder and teaches it to answer prompts.

    Attributes:
      examples: what its examples are called in messages.
      read_file: reads a file of them.
    """

    family = "decoder"
    needs_base = True
    examples: ClassVar[str] = "examples"
    read_file: ClassVar[Callable[[str], Sequence[Any]]]

    def start_from(self, base: Bundle) -> Bundle:
        """The base itself; ValueError where it cannot answer."""
        check_can_answer(base)
        return base

    def read(self, data: Sequence[Any] | None = None,
             held_out: Sequence[Any] | None = None) -> tuple[Sequence[Any], Sequence[Any]]:
        """The examples of the file that the config names, and those held out."""
        settings, read_file = self.config.data, type(self).read_file
        if held_out is not None:
            return list(data), list(held_out)
        if data is not None:
            return split(list(data), settings.validation_fraction, self.examples)
        if settings.path is None or settings.tfds is not None or settings.generated is not None:
            raise ValueError(f"say what to learn from: --config.data.path=FILE of {self.examples}")
        found = read_file(settings.path)
        if settings.validation_path is not None:
            return found, read_file(settings.validation_path)
        return split(found, settings.validation_fraction, self.examples)

    def texts(self, examples: Sequence[Any]) -> tuple[()]:
        """None: the tokenizer is that of the model to start from."""
        return ()

    def show(self, model: Decoder, step: int, data: TaskData) -> str | None:
        """Answers to the first held-out prompts, which are also kept in ``answers/STEP.txt`` of the
        workdir."""
        tokenizer, shown = data.shown
        sample = self.config.sample
        if not sample.every or not shown:
            return None
        texts = generate(model, [ids for _, ids in shown], tokenizer=tokenizer, key=jax.random.key(self.config.seed),
                         max_new_tokens=sample.max_new_tokens, sampling=self._sampling()).texts
        answers = "\n".join(f"{prompt[-1].content}\n  -> {text}"
                            for (prompt, _), text in zip(shown, texts, strict=True))
        if self.workdir is not None:
            path = self.workdir / "answers" / f"{step}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{answers}\n", encoding="utf-8")
        return answers

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.config.sample.temperature, top_k=self.config.sample.top_k)

    def next_command(self, workdir: str) -> str:
        """Ask the model something."""
        return f'transformer-jax generate --workdir={workdir} --chat --prompt="..."'

    def shown_prompts(self, prompts: Iterable[Conversation],
                      tokenizer: Tokenizer) -> tuple[Tokenizer, list[tuple[Conversation, list[int]]]]:
        """The first few prompts that leave room for an answer, encoded, with the tokenizer: for
        :meth:`show`."""
        self._sampling()  # raises ValueError before anything is trained
        room = self.config.model.max_len - self.config.sample.max_new_tokens
        encoded = ((prompt, encode_prompt(prompt, tokenizer)) for prompt in prompts)
        return tokenizer, list(itertools.islice(((prompt, ids) for prompt, ids in encoded if len(ids) <= room), _SHOWN))


def check_can_answer(base: Bundle) -> None:
    """Raises ValueError for a model that cannot answer: not a decoder, or a tokenizer without role
    tokens."""
    check_family("this task", base.model, "decoder")
    if base.tokenizer is None:
        raise ValueError("the model to start from comes without a tokenizer; expected the workdir of a training run")
    base.tokenizer.encode_role("user")
