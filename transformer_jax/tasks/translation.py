"""Translation: an encoder-decoder learns from pairs of sentences."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

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
from transformer_jax.tasks.base import Task, TaskData, split
from transformer_jax.tasks.translating import translate
from transformer_jax.tasks.translation_scores import scores
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import translation_loss
from transformer_jax.training.step import Batch, Sums

_SHOWN = 3
_DATES = {"num_train": 60_000, "num_held_out": 2_000, "seed": 0}


class Translation(Task):
    """Pairs of sentences, several to a row; the loss is that of the target's next tokens (Vaswani
    et al., 2017)."""

    name = "translation"
    family = "encoder_decoder"

    def read(self, data: Iterable[tuple[str, str]] | None = None,
             held_out: Iterable[tuple[str, str]] | None = None) -> tuple[Pairs, Pairs]:
        """The pairs to train on, and those held out."""
        settings = self.config.data
        if data is None:
            return read_translation_data(settings)
        if held_out is not None:
            return Pairs(list(data)), Pairs(list(held_out))
        return tuple(map(Pairs, split(list(data), settings.validation_fraction, "pairs")))

    def texts(self, examples: Pairs) -> list[str]:
        """Both sides of every pair."""
        return [text for pair in examples for text in pair]

    def prepare(self, examples: Pairs, held_out: Pairs, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TaskData:
        """Packs the pairs into rows, which are kept in ``cache_dir``."""
        length = self.config.model.max_len
        train, validation = (PackedPairs.build(part, tokenizer, length, length, cache_dir)
                             for part in (examples, held_out))
        fitting = (pair for pair in held_out if len(tokenizer.encode(pair[0])) < length)
        return TaskData(
            train=train, contents=[train.digest, validation.digest], held_out=validation,
            summary=f"{train.summary()} to train on; {validation.summary()} held out",
            evaluation_batches=lambda size: pair_evaluation_batches(validation, size),
            shown=(tokenizer, list(itertools.islice(fitting, _SHOWN))))

    def loss(self, model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The cross entropy of the target's next tokens, in nats."""
        return translation_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Without label smoothing and z-loss."""
        return translation_loss()(model, batch, key)

    def forward(self, model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> Output:
        """The model's output for a batch of pairs."""
        return model(batch["source"], batch["tokens"], source_segment_ids_BS=batch.get("source_segment_ids"),
                     target_segment_ids_BT=batch.get("segment_ids"), key=key)

    def show(self, model: EncoderDecoder, step: int, data: TaskData) -> str:
        """Greedy translations of the first held-out sources, with their references."""
        tokenizer, shown = data.shown
        result = generate(model, [source for source, _ in shown], tokenizer=tokenizer,
                          max_new_tokens=self.config.model.max_len - 1, sampling=Sampling(temperature=0.0))
        return "\n".join(f"{source}\n  -> {text}\n   ? {target}"
                         for (source, target), text in zip(shown, result.texts, strict=True))

    def measure(self, bundle: Bundle, data: str | Iterable[tuple[str, str]] | None = None, *, batch_size: int = 32,
                beam_size: int = 5, length_penalty: float = 1.0, target_language: str | None = None,
                **options: Any) -> dict[str, float]:
        """The share of translations that are exactly the reference and, with a language, BLEU and
        chrF.

        Args:
          bundle: a trained encoder-decoder with its tokenizer.
          data: pairs, or a path as ``config.data.path``; ``None``: those that its run held out.
          batch_size: sentences at a time.
          beam_size: hypotheses of beam search.
          length_penalty: exponent of the length that divides log P.
          target_language: of the targets, such as ``"de"``, by whose rules tokenised BLEU is
            counted.

        Returns:
          ``exact`` in [0, 1], ``sentences``, ``too_long`` (sources that the model cannot read,
          which count as left untranslated), and with a language ``bleu``, ``chrf`` and
          ``tokenised_bleu``, in percent, with the signature of each under ``bleu_signature`` ...
        """
        pairs = self._pairs(bundle, data)
        sources, targets = map(list, zip(*pairs, strict=True))
        if target_language is not None:  # what is wrong or missing is found out before the search
            scores(targets[:1], targets[:1], language=target_language)
        fits = [len(bundle.tokenizer.encode(source)) < bundle.config.max_len for source in sources]
        found = translate(bundle, [source if fit else "" for source, fit in zip(sources, fits, strict=True)],
                          beam_size=beam_size, length_penalty=length_penalty, batch_size=batch_size)
        texts = [hypotheses[0].text.strip() for hypotheses in found]
        exact = sum(text == target for text, target in zip(texts, targets, strict=True))
        measured = {"exact": exact / len(sources), "sentences": len(sources),
                    "too_long": sum(bool(source) and not fit for source, fit in zip(sources, fits, strict=True))}
        return measured if target_language is None else measured | scores(texts, targets, language=target_language)

    def report(self, bundle: Bundle, measured: Mapping[str, Any], *, beam_size: int = 5, length_penalty: float = 1.0,
               **options: Any) -> str:
        """What was read, how many translations are exact, and the scores."""
        lines = [f"step {bundle.step}, {measured['sentences']:,} sentences, beam of {beam_size}, length penalty "
                 f"{length_penalty}"]
        if measured["too_long"]:
            lines.append(f"{measured['too_long']} longer than the {bundle.config.max_len - 1} tokens that the model "
                         "reads: left untranslated")
        lines.append(f"exactly the reference: {measured['exact']:.2%}")
        lines += [f"{name} {measured[name]:.2f}  ({measured[f'{name}_signature']})"
                  for name in ("bleu", "chrf", "tokenised_bleu") if name in measured]
        return "\n".join(lines)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Full rows of packed pairs."""
        shape = (batch_size, self.config.model.max_len)
        names = ("tokens", "targets", "segment_ids", "source", "source_segment_ids")
        return {**dict.fromkeys(names, jax.ShapeDtypeStruct(shape, np.int32)),
                "weights": jax.ShapeDtypeStruct(shape, np.float32)}

    def next_command(self, workdir: str) -> str:
        """Translate a sentence."""
        return f'transformer-jax translate --workdir={workdir} --text="..."'

    def _pairs(self, bundle: Bundle, data: str | Iterable[tuple[str, str]] | None) -> Iterable[tuple[str, str]]:
        settings = None if bundle.experiment is None else bundle.experiment.data
        if data is None:
            if settings is None:
                raise ValueError("this model comes without the config of its training: say --data=SOURCE,TARGET")
            return read_translation_data(settings)[1]
        if not isinstance(data, (str, pathlib.Path)):
            return data
        # Two files have no columns, and what a TFDS set calls source and target are languages.
        has_columns = settings is not None and settings.path is not None and pathlib.Path(data).is_file()
        return read_pairs(data, **(dict(source=settings.source, target=settings.target) if has_columns else {}))


def read_translation_data(config: DataConfig) -> tuple[Pairs, Pairs]:
    """The pairs to train on that a config names, and those held out.

    Raises:
      ValueError: for settings that name no pairs, or several sources.
    """
    if sum(where is not None for where in (config.path, config.tfds, config.generated)) != 1:
        raise ValueError("say what to train on: --config.data.path=SOURCE,TARGET (aligned files) or a TSV file, or "
                         "--config.data.tfds=NAME, or --config.data.generated=dates")
    if config.validation_path is not None and config.path is None:
        raise ValueError("data.validation_path goes with data.path; a TFDS set and generated pairs have a held-out "
                         "part of their own")
    if config.generated is not None:
        return tuple(map(Pairs, dates_corpus(**_DATES)))
    if config.tfds is not None:
        if config.source is None or config.target is None:
            raise ValueError("a TFDS translation set has languages: set --config.data.source and --config.data.target")
        return tuple(read_tfds_pairs(config.tfds, part, source=config.source, target=config.target)
                     for part in ("train", "validation"))
    columns = dict(source=config.source, target=config.target)
    pairs = read_pairs(config.path, **columns)
    if config.validation_path is not None:
        return pairs, read_pairs(config.validation_path, **columns)
    train, held_out = split(list(pairs), config.validation_fraction, "pairs")
    return Pairs(train), Pairs(held_out)
