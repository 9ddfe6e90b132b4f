"""Supervised fine-tuning: a trained decoder learns to answer from demonstrations."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np

from transformer_jax.data import (
    Conversation,
    PackedConversations,
    pair_evaluation_batches,
    read_demonstrations,
)
from transformer_jax.data.conversations import AnyTokenizer
from transformer_jax.data.examples import as_demonstration
from transformer_jax.data.files import is_named_json
from transformer_jax.data.forms import question_of, read_examples
from transformer_jax.data.records import first_object
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.answer_scores import answer_questions
from transformer_jax.tasks.answering import AnsweringTask, answering
from transformer_jax.tasks.language_model import LanguageModel
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.evaluation import mean_loss
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.step import Batch, Sums


class SupervisedFineTuning(AnsweringTask):
    """Supervised fine-tuning on conversations, with several conversations in a row. The loss is the
    cross entropy of the assistant's tokens (Ouyang et al., 2022)."""

    name = "sft"
    examples = "demonstrations"
    read_file = staticmethod(read_demonstrations)
    read_example = staticmethod(as_demonstration)

    def prepare(self, examples: Sequence[Conversation], held_out: Sequence[Conversation], tokenizer: AnyTokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Packs the conversations into rows. It stores nothing in ``cache_dir``, because there are
        only a few conversations."""
        train, validation = (PackedConversations.build(part, tokenizer, self.config.model.max_len)
                             for part in (examples, held_out))
        return TaskData(
            train=train, contents=[train.digest, validation.digest],
            summary=f"{train.summary()}; held out: {validation.summary()}",
            evaluation_batches=lambda size: pair_evaluation_batches(validation, size),
            shown=self.shown_prompts((messages[:-1] for messages in held_out), tokenizer))

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the cross entropy of the assistant's tokens, in nats."""
        return next_token_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss without label smoothing and z-loss."""
        return next_token_loss()(model, batch, key)

    def measure(self, bundle: Bundle, data: str | Sequence[Conversation] | None = None, *, batch_size: int = 32,
                answers: bool = False, max_new_tokens: int = 48, language: str = "en") -> dict[str, float]:
        """Measures the loss and the perplexity of the assistant's tokens, and optionally its own
        answers. A text file is measured as for a language model.

        Args:
          bundle: A trained decoder with its tokenizer.
          data: Conversations, a JSON or JSONL file of them, or a text file. ``None`` means the
            held-out part of the training data.
          batch_size: The number of rows in a batch.
          answers: Whether the model also answers every prompt greedily, so that its answers are
            compared with the right ones. A question may have several right answers (FaQuAD, SQuAD).
          max_new_tokens: The largest number of tokens in an answer.
          language: The language of the answers, ``"en"`` or ``"pt"``, whose articles do not count.

        Returns:
          ``loss`` (nats per token), ``perplexity`` and ``conversations``, the number of
          conversations. With ``answers``, also ``answered``, the number of prompts that leave room
          for an answer, and ``exact_match``, ``f1``, ``rouge1``, ``rouge2`` and ``rougeL`` of their
          answers, from 0 to 100. For a text file, the numbers of ``LanguageModel.measure``.

        Raises:
          ImportError: If ``answers`` is set and rouge-score is not installed.
          ValueError: If the file or an example cannot be read, the model has no tokenizer, the
            language is not known, or no prompt leaves room for an answer.
        """
        _, tokenizer = answering(bundle)
        questions = None
        if isinstance(data, (str, pathlib.Path)):
            if not _holds_demonstrations(pathlib.Path(data)):
                return LanguageModel(self.config).measure(bundle, data, batch_size=batch_size)
            questions = read_examples(data, question_of) if answers else None
            data = read_demonstrations(data)
        elif data is None:
            _, data = self.read()
        else:
            if answers and all(isinstance(example, Mapping) for example in data):
                questions = [question_of(cast(Mapping, example)) for example in data]
            data = self._checked(data)
        rows = PackedConversations.build(data, tokenizer, bundle.config.max_len)
        loss = mean_loss(next_token_loss(), lambda: pair_evaluation_batches(rows, batch_size))(bundle.model)
        measured = {"loss": loss["validation_loss"], "perplexity": math.exp(loss["validation_loss"]),
                    "conversations": len(data)}
        if answers:
            questions = questions or [(messages[:-1], (messages[-1].content,)) for messages in data]
            measured |= answer_questions(bundle, questions, batch_size=batch_size, max_new_tokens=max_new_tokens,
                                         language=language)
        return measured

    def finish(self) -> str:
        """Returns a line that says at which step the held-out loss was lowest, and whether it rose
        afterwards."""
        losses = [(line["validation_loss"], line["step"]) for line in read_metrics(self.run_directory / "metrics.jsonl")
                  if "validation_loss" in line]
        (best, step), (last, end) = min(losses), losses[-1]
        if step == end:
            return f"the held-out loss was still falling at the last step: {best:.4f}; more steps may help"
        return (f"the held-out loss was lowest at step {step}: {best:.4f}; this checkpoint is stored in "
                f"{self.workdir}/best (load it with step='best'); after that the model overfits: {last:.4f} at step "
                f"{end}")

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of full rows of packed conversations."""
        shape = (batch_size, self.config.model.max_len)
        return {**dict.fromkeys(("tokens", "targets", "segment_ids"), jax.ShapeDtypeStruct(shape, np.int32)),
                "weights": jax.ShapeDtypeStruct(shape, np.float32)}

    def next_command(self, workdir: str) -> str:
        """Returns the command that asks the best checkpoint a question."""
        return f'transformer-jax generate --workdir={workdir} --step=best --chat --prompt="..."'


def _holds_demonstrations(path: pathlib.Path) -> bool:
    """True if the file contains JSON; False if it is a plain text file."""
    return path.is_file() and (is_named_json(path) or first_object(path) is not None)
