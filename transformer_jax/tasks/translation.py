"""Translation: an encoder-decoder learns from pairs of sentences."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np

from transformer_jax.config import DataConfig
from transformer_jax.data import (
    PackedPairs,
    Pairs,
    Tokenizer,
    dates_corpus,
    pair_evaluation_batches,
    read_pairs,
    read_tfds_pairs,
)
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.output import Output
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.inputs import split, tokenizer_of
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.tasks.translating import translate
from transformer_jax.tasks.translation_scores import scores
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import translation_loss
from transformer_jax.training.step import Batch, Sums

_NUM_SHOWN_PAIRS = 3
_DATES_CORPUS = {"num_train": 60_000, "num_held_out": 2_000, "seed": 0}


class Translation(Task):
    """Translation on pairs of sentences, with several pairs in a row. The loss is the cross entropy
    of the target's next tokens (Vaswani et al., 2017)."""

    name = "translation"
    family = "encoder_decoder"

    def read(self, data: Iterable[tuple[str, str]] | None = None,
             held_out: Iterable[tuple[str, str]] | None = None) -> tuple[Pairs, Pairs]:
        """Reads the training pairs and the held-out pairs.

        Args:
          data: Pairs ``(source, target)``. ``None`` means the data that the config names.
          held_out: Pairs to evaluate on. ``None`` means the last part of ``data``.

        Returns:
          The training pairs and the held-out pairs.

        Raises:
          ValueError: If no data is given, or an example is not a pair of texts.
        """
        settings = self.config.data
        if data is None:
            return read_translation_data(settings)
        if held_out is not None:
            return Pairs(_check_pairs(data)), Pairs(_check_pairs(held_out))
        train, rest = split(_check_pairs(data), settings.validation_fraction, "pairs")
        return Pairs(train), Pairs(rest)

    def texts(self, examples: Pairs) -> list[str]:
        """Returns the source and the target of every pair."""
        return [text for pair in examples for text in pair]

    def prepare(self, examples: Pairs, held_out: Pairs, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TaskData:
        """Packs the pairs into rows, and stores the rows in ``cache_dir``."""
        length = self.config.row_length
        train, validation = (PackedPairs.build(part, tokenizer, length, length, cache_dir, self.config.model.start_ids)
                             for part in (examples, held_out))
        fitting = (pair for pair in held_out if len(tokenizer.encode_source(pair[0])) <= self.config.model.max_len)
        return TaskData(
            train=train, contents=[train.digest, validation.digest], held_out=validation,
            summary=f"{train.summary()} to train on; {validation.summary()} held out",
            evaluation_batches=lambda size: pair_evaluation_batches(validation, size),
            shown=(tokenizer, list(itertools.islice(fitting, _NUM_SHOWN_PAIRS))))

    def loss(self, model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the cross entropy of the target's next tokens, in nats."""
        return translation_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss without label smoothing and z-loss."""
        return translation_loss()(model, batch, key)

    def forward(self, model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> Output:
        """Runs the model on a batch of pairs."""
        return model(batch["source"], batch["tokens"], source_segment_ids_BS=batch.get("source_segment_ids"),
                     target_segment_ids_BT=batch.get("segment_ids"), key=key)

    def show(self, model: EncoderDecoder, step: int, data: TaskData) -> str:
        """Translates the first held-out sources greedily, and returns them with their
        references."""
        tokenizer, shown = data.shown
        result = generate(model, [source for source, _ in shown], tokenizer=tokenizer,
                          max_new_tokens=self.config.model.max_len - 1, sampling=Sampling(temperature=0.0))
        return "\n".join(f"{source}\n  -> {text}\n   ? {target}"
                         for (source, target), text in zip(shown, result.texts or [], strict=True))

    def measure(self, bundle: Bundle, data: str | Iterable[tuple[str, str]] | None = None, *, batch_size: int = 32,
                beam_size: int = 5, length_penalty: float = 1.0,
                target_language: str | None = None) -> dict[str, Any]:
        """Measures the fraction of translations that equal their reference and, if a target
        language is given, BLEU and chrF.

        Args:
          bundle: A trained encoder-decoder with its tokenizer.
          data: Pairs, or a path in the same form as ``config.data.path``. ``None`` means the
            held-out part of the training data.
          batch_size: The number of sentences in a batch.
          beam_size: The number of hypotheses that beam search keeps.
          length_penalty: The exponent of the length, by which log P of a hypothesis is divided.
          target_language: The language of the targets, such as ``"de"``. Its rules split the texts
            into tokens for tokenised BLEU.

        Returns:
          ``exact`` in [0, 1], ``sentences`` and ``too_long``: the number of sources that are longer
          than the model can read; their translations are empty. With a target language also
          ``bleu``, ``chrf`` and ``tokenised_bleu`` in percent, and the signature of each, such as
          ``bleu_signature``.

        Raises:
          ValueError: If the data cannot be read, or the target language is unknown.
        """
        pairs = self._pairs(bundle, data)
        sources, targets = map(list, zip(*pairs, strict=True))
        if target_language is not None:  # a missing package or a wrong language fails here, before the search
            scores(targets[:1], targets[:1], language=target_language)
        tokenizer = tokenizer_of(bundle)
        fits = [len(tokenizer.encode_source(source)) <= bundle.config.max_source_len for source in sources]
        found = translate(bundle, [source if fit else "" for source, fit in zip(sources, fits, strict=True)],
                          beam_size=beam_size, length_penalty=length_penalty, batch_size=batch_size)
        texts = [(hypotheses[0].text or "").strip() for hypotheses in found]
        exact = sum(text == target for text, target in zip(texts, targets, strict=True))
        measured: dict[str, Any] = {"exact": exact / len(sources), "sentences": len(sources),
                    "too_long": sum(bool(source) and not fit for source, fit in zip(sources, fits, strict=True))}
        return measured if target_language is None else measured | scores(texts, targets, language=target_language)

    def report(self, bundle: Bundle, measured: Mapping[str, Any], *, beam_size: int = 5, length_penalty: float = 1.0,
               **options: Any) -> str:
        """Formats the counts, the fraction of exact translations, and the scores."""
        lines = [f"step {bundle.step}, {measured['sentences']:,} sentences, beam of {beam_size}, length penalty "
                 f"{length_penalty}"]
        if measured["too_long"]:
            lines.append(f"{measured['too_long']} sentences are longer than the {bundle.config.max_len - 1} tokens "
                         "that the model reads; they are not translated")
        lines.append(f"translations that equal the reference: {measured['exact']:.2%}")
        lines += [f"{name} {measured[name]:.2f}  ({measured[f'{name}_signature']})"
                  for name in ("bleu", "chrf", "tokenised_bleu") if name in measured]
        return "\n".join(lines)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of full rows of packed pairs."""
        shape = (batch_size, self.config.row_length)
        names = ("tokens", "targets", "segment_ids", "source", "source_segment_ids")
        return {**dict.fromkeys(names, jax.ShapeDtypeStruct(shape, np.int32)),
                "weights": jax.ShapeDtypeStruct(shape, np.float32)}

    def next_command(self, workdir: str) -> str:
        """Returns the command that translates a sentence with the trained model."""
        return f'transformer-jax translate --workdir={workdir} --text="..."'

    def _pairs(self, bundle: Bundle, data: str | Iterable[tuple[str, str]] | None) -> Iterable[tuple[str, str]]:
        """Returns the pairs to measure on; see ``measure`` for ``data``."""
        settings = None if bundle.experiment is None else bundle.experiment.data
        if data is None:
            if settings is None:
                raise ValueError("the model has no config of its training, so its held-out data is unknown; pass "
                                 "--data=SOURCE,TARGET")
            return read_translation_data(settings)[1]
        if not isinstance(data, (str, pathlib.Path)):
            return _check_pairs(data)
        # Only a single file has columns: for two files, ``source`` and ``target`` are not used, and
        # for a TFDS data set they name languages.
        if settings is not None and settings.path is not None and pathlib.Path(data).is_file():
            return read_pairs(data, source=settings.source, target=settings.target)
        return read_pairs(data)


def _check_pairs(examples: Iterable[Any]) -> list[tuple[str, str]]:
    """Returns the examples as a list, or raises ValueError if one of them is not a pair of
    texts."""
    found = list(examples)
    for number, pair in enumerate(found):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"example {number} is {pair!r:.80}; expected a pair of texts, (source, target)")
    return found


def read_translation_data(config: DataConfig) -> tuple[Pairs, Pairs]:
    """Reads the training pairs and the held-out pairs that a config names.

    Args:
      config: The data settings, in which one of ``path``, ``tfds`` and ``generated`` is set.

    Returns:
      The training pairs and the held-out pairs.

    Raises:
      ValueError: If the settings name no source of pairs, or more than one.
    """
    if sum(where is not None for where in (config.path, config.tfds, config.generated)) != 1 or (
            config.generated == "agreement"):
        raise ValueError("set exactly one source of training data: --config.data.path=SOURCE,TARGET (aligned files) or "
                         "a TSV file, or --config.data.tfds=NAME, or --config.data.generated=dates")
    if config.validation_path is not None and config.path is None:
        raise ValueError("data.validation_path can only be used with data.path, because a TFDS data set and generated "
                         "pairs have their own held-out part; leave it out")
    if config.generated is not None:
        train, held_out = dates_corpus(**_DATES_CORPUS)
        return Pairs(train), Pairs(held_out)
    if config.tfds is not None:
        if config.source is None or config.target is None:
            raise ValueError("a TFDS translation data set needs the names of two languages; set --config.data.source "
                             "and --config.data.target")
        return (read_tfds_pairs(config.tfds, "train", source=config.source, target=config.target),
                read_tfds_pairs(config.tfds, "validation", source=config.source, target=config.target))
    columns = dict(source=config.source, target=config.target)
    pairs = read_pairs(cast(str, config.path), **columns)
    if config.validation_path is not None:
        return pairs, read_pairs(config.validation_path, **columns)
    train, held_out = split(list(pairs), config.validation_fraction, "pairs")
    return Pairs(train), Pairs(held_out)
