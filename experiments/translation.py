"""Translation: an encoder-decoder learns from pairs of sentences."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import pathlib

from tqdm import tqdm

from experiments import runs
from experiments.translation_scores import scores
from transformer_jax.config import DataConfig, ExperimentConfig
from transformer_jax.data import (
    PackedPairs,
    Pairs,
    Tokenizer,
    dates_corpus,
    pair_evaluation_batches,
    read_pairs,
    read_tfds_pairs,
)
from transformer_jax.decoding.beam import Hypothesis, beam_search
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import translation_loss
from transformer_jax.training.state import TrainState

_SHOWN = 3
_SEARCHES_AT_ONCE = 4  # a step is a few small products after each other: one search leaves half of two cores idle
_DATES = {"num_train": 60_000, "num_held_out": 2_000, "seed": 0}


def train(config: ExperimentConfig, workdir: str | pathlib.Path) -> TrainState:
    """Trains on the pairs that the config names, or resumes."""
    pairs, held_out = read(config.data)
    texts = [text for pair in pairs for text in pair]
    return runs.run(config, workdir, texts, functools.partial(_task, pairs, held_out))


def read(config: DataConfig) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those held out.

    Raises:
      ValueError: for settings that name no pairs, or several.
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
        return tuple(read_tfds_pairs(config.tfds, split, source=config.source, target=config.target)
                     for split in ("train", "validation"))
    columns = dict(source=config.source, target=config.target)
    pairs = read_pairs(config.path, **columns)
    if config.validation_path is not None:
        return pairs, read_pairs(config.validation_path, **columns)
    pairs = list(pairs)
    cut = int(len(pairs) * (1 - config.validation_fraction))
    if not 0 < cut < len(pairs):
        raise ValueError(f"data.validation_fraction={config.validation_fraction} of {len(pairs)} pairs leaves a part "
                         "empty; set data.validation_path, or another fraction")
    return Pairs(pairs[:cut]), Pairs(pairs[cut:])


def translate(bundle: Bundle, sources: list[str], *, beam_size: int, length_penalty: float, n_best: int = 1,
              batch_size: int = 32) -> list[list[Hypothesis]]:
    """The best translations of every source, by beam search over batches of sources of similar length.

    What is blank has a blank translation, whatever the model would make of it.
    """
    lengths = [len(bundle.tokenizer.encode(source)) for source in sources]
    longest = max(lengths, default=0)
    if longest >= bundle.config.max_len:
        raise ValueError(f"line {lengths.index(longest) + 1} has {longest} tokens; the model reads "
                         f"{bundle.config.max_len - 1} at most: shorten or split it")
    order = sorted((row for row, source in enumerate(sources) if source.strip()), key=lengths.__getitem__, reverse=True)
    blank = Hypothesis(text="", tokens=[], score=0.0, logprob=0.0, finish_reason="eos")
    found = [[blank] * n_best for _ in sources]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]

    def search(rows: list[int]) -> list[list[Hypothesis]]:
        # Always the same number of rows: another one would compile anew.
        texts = [sources[row] for row in rows] + [""] * (len(batches[0]) - len(rows))
        return beam_search(bundle.model, texts, tokenizer=bundle.tokenizer, beam_size=beam_size, n_best=n_best,
                           length_penalty=length_penalty, penalty="length").n_best

    with (concurrent.futures.ThreadPoolExecutor(_SEARCHES_AT_ONCE) as threads,
          tqdm(total=len(order), unit="sentence", disable=len(order) <= batch_size) as bar):
        for rows, n_bests in zip(batches, threads.map(search, batches), strict=True):
            for row, hypotheses in zip(rows, n_bests, strict=False):
                found[row] = hypotheses
            bar.update(len(rows))
    return found


def evaluate(bundle: Bundle, data: str | None, *, batch_size: int, beam_size: int, length_penalty: float,
             language: str | None) -> None:
    """Prints how many translations are exactly the reference, and, with a language, BLEU and chrF.

    Args:
      bundle: a trained encoder-decoder.
      data: pairs to measure on, as ``data.path`` of a config; ``None``: those that its run held out.
      batch_size: sentences at a time.
      beam_size: hypotheses of beam search.
      length_penalty: exponent of the length that divides log P.
      language: of the targets.
    """
    config = bundle.experiment
    if data is not None:
        # Two files have no columns, and what a TFDS set calls source and target are languages.
        has_columns = config is not None and config.data.path is not None and pathlib.Path(data).is_file()
        pairs = read_pairs(data, **(dict(source=config.data.source, target=config.data.target) if has_columns else {}))
    elif config is not None:
        _, pairs = read(config.data)
    else:
        raise ValueError("this model comes without the config of its training: say --data=SOURCE,TARGET")
    sources, targets = map(list, zip(*pairs, strict=True))
    if language is not None:
        scores(targets[:1], targets[:1], language=language)  # what is wrong or missing is found out before the search
    # What is too long to be read counts as left untranslated: no sentence is left out of a score.
    readable = [source if len(bundle.tokenizer.encode(source)) < bundle.config.max_len else "" for source in sources]
    too_long = sum(bool(source) and not kept for source, kept in zip(sources, readable, strict=True))
    found = [hypotheses[0].text.strip() for hypotheses in translate(
        bundle, readable, beam_size=beam_size, length_penalty=length_penalty, batch_size=batch_size)]
    exact = sum(text == target for text, target in zip(found, targets, strict=True))
    print(f"step {bundle.step}, {len(sources):,} sentences, beam of {beam_size}, length penalty {length_penalty}")
    if too_long:
        print(f"{too_long} longer than the {bundle.config.max_len - 1} tokens that the model reads: left untranslated")
    print(f"exactly the reference: {exact / len(sources):.2%}")
    if language is None:
        return
    measured = scores(found, targets, language=language)
    for name in ("bleu", "chrf", "tokenised_bleu"):
        print(f"{name} {measured[name]:.2f}  ({measured[f'{name}_signature']})")


def _task(pairs: Pairs, held_out: Pairs, config: ExperimentConfig, tokenizer: Tokenizer,
          cache_dir: pathlib.Path) -> runs.Task:
    length = config.model.max_len
    train, validation = (PackedPairs.build(part, tokenizer, length, length, cache_dir) for part in (pairs, held_out))
    fitting = (pair for pair in held_out if len(tokenizer.encode(pair[0])) < length)
    shown = list(itertools.islice(fitting, _SHOWN))

    def sample(model: EncoderDecoder, step: int) -> None:
        result = generate(model, [source for source, _ in shown], tokenizer=tokenizer, max_new_tokens=length - 1,
                          sampling=Sampling(temperature=0.0))
        lines = [f"{source}\n  -> {text}\n   ? {target}"
                 for (source, target), text in zip(shown, result.texts, strict=True)]
        tqdm.write("\n".join([f"--- step {step} ---", *lines, ""]))

    return runs.Task(
        train=train, contents=[train.digest, validation.digest],
        summary=f"{train.summary()} to train on; {validation.summary()} held out",
        loss_fn=translation_loss(config.loss), sample=sample, held_out=validation,
        evaluate=runs.mean_loss(translation_loss(), lambda: pair_evaluation_batches(validation, config.eval.batch_size),
                                config.eval.max_batches))
