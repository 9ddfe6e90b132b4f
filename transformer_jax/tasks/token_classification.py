"""Classification of words: an encoder or a decoder with a head learns the label of each word."""

from __future__ import annotations

import dataclasses

from transformer_jax.data import LabelledWords
from transformer_jax.data.labelled import labelled_words_of, read_labelled_words
from transformer_jax.decoding.classify import classify_tokens
from transformer_jax.models.classifier import Classifier
from transformer_jax.models.texts import text_form
from transformer_jax.tasks.classification import TextClassification
from transformer_jax.tasks.inputs import split
from transformer_jax.tasks.task_data import TaskData


class TokenClassification(TextClassification):
    """Classification of words, such as named entity recognition. The label of a word is learned at
    its first token (Devlin et al., 2019, section 5.3)."""

    name = "classify_tokens"
    family = "token_classifier"
    examples = "texts with labelled words"
    read_file = staticmethod(read_labelled_words)
    read_example = staticmethod(labelled_words_of)

    def show(self, model: Classifier, step: int, data: TaskData) -> str | None:
        """Returns the first held-out texts with the predicted label after each word."""
        bundle, examples = data.shown
        form, most = text_form(model), model.config.max_len
        examples = [each for each in examples if len(bundle.tokenizer.spans(each.texts[0], form)) <= most]
        if not examples:
            return None
        found = classify_tokens(dataclasses.replace(bundle, model=model), [example.words for example in examples])
        return "\n".join(" ".join(f"{each.word}/{each.label}" for each in words) for words in found)

    def next_command(self, workdir: str) -> str:
        """Returns the command that labels the words of a text with the trained model."""
        return f'transformer-jax classify --workdir={workdir} --text="..."'

    def _split(self, examples: list[LabelledWords]) -> tuple[list[LabelledWords], list[LabelledWords]]:
        return split(examples, self.config.data.validation_fraction, self.examples)
