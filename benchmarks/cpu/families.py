"""The benchmarks of encoders and encoder-decoders; run by
``python -m benchmarks {mlm,translate}``."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time

import jax
import numpy as np
from tqdm import tqdm

import transformer_jax as tj
from benchmarks.peers.huggingface import marian_beam_search, roberta_training, write_marian
from benchmarks.timing import OtherProcess, take_turns
from transformer_jax import recipes
from transformer_jax.config import OptimConfig
from transformer_jax.data import LineRows, Masking, Tokenizer, make_batches, masked_evaluation_batches
from transformer_jax.interop.huggingface import to_huggingface
from transformer_jax.tasks import translating
from transformer_jax.tasks.masked_language_model import MaskedLanguageModel
from transformer_jax.tasks.translation import read_translation_data
from transformer_jax.training.evaluation import mean_loss
from transformer_jax.training.objectives import masked_token_loss
from transformer_jax.training.optimizer import make_optimizer, make_schedule
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

_TURN = 10
_SIZES = ("max_len", "num_layers", "num_heads", "model_dim", "unroll")
_ROBERTA_ADAMW = OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=50, beta2=0.98,
                             weight_decay=0.01)
_BEAM = dict(beam_size=5, length_penalty=1.0, max_new_tokens=48)
_BATCH_SIZE, _NUM_BATCHES = 16, 32


def mlm(book: str, steps: int) -> list[dict]:
    """Trains RoBERTa with this library and with Hugging Face, from the same weights and at the size
    of ``book_mlm``. The sides take turns of ten steps."""
    config = recipes.get("book_mlm")
    model = tj.presets.get("roberta-base").replace(
        vocab_size=None, position_offset=1, init_std=config.model.init_std,
        **{name: getattr(config.model, name) for name in _SIZES})
    config = config.replace(steps=steps, model=model, optim=_ROBERTA_ADAMW,
                            data=dataclasses.replace(config.data, path=book))
    lines, held_out = MaskedLanguageModel(config).read()
    settings = config.data.tokenizer
    tokenizer = Tokenizer.train(lines, kind=settings.kind, vocab_size=settings.vocab_size,
                                min_frequency=settings.min_frequency)
    config = config.replace(model=config.model.replace(vocab_size=tokenizer.vocab_size))
    train, validation = (LineRows.build(part, tokenizer, config.model.max_len) for part in (lines, held_out))
    masking = Masking.of(tokenizer, config.data.mask_probability)
    stream = make_batches(train, batch_size=config.batch_size, seed=0, transform=masking)
    batches = list(itertools.islice(stream, steps))
    validation_batches = list(masked_evaluation_batches(validation, masking, config.eval.batch_size))

    optimizer, schedule = make_optimizer(config.optim, steps), make_schedule(config.optim, steps)
    train_step = make_train_step(masked_token_loss(config.loss), optimizer)
    state = init_state(lambda key: tj.Encoder(config.model, key=key), optimizer, jax.random.key(config.seed))
    with tempfile.TemporaryDirectory() as directory:
        to_huggingface(tj.Bundle(state.params, None, config.model), directory)
        theirs = OtherProcess(roberta_training, config, [float(schedule(step)) for step in range(steps)], directory)
        theirs(("evaluate", validation_batches[:1]))  # the answer comes after the weights are read
    seconds: dict[str, list[float]] = {"transformer_jax": [], "Hugging Face": []}
    for start in tqdm(range(0, steps, _TURN), unit="turn"):
        turn = batches[start:start + _TURN]
        start_time = time.perf_counter()
        for batch in turn:
            state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds["transformer_jax"].append(time.perf_counter() - start_time)
        start_time = time.perf_counter()
        theirs(("train", turn))
        seconds["Hugging Face"].append(time.perf_counter() - start_time)
    ours = mean_loss(masked_token_loss(), lambda: validation_batches)(state.params)
    losses = {"transformer_jax": ours["validation_loss"],
              "Hugging Face": theirs(("evaluate", validation_batches))}
    theirs.close()
    tokens = _TURN * config.batch_size * config.model.max_len
    medians = {side: statistics.median(values[1:]) for side, values in seconds.items()}  # the first turn compiles
    return [{"steps": steps, **{f"{side} tokens/s": tokens / median for side, median in medians.items()},
             "ratio": medians["Hugging Face"] / medians["transformer_jax"],
             **{f"{side} validation loss": loss for side, loss in losses.items()}}]


def translate(workdir: str, rounds: int) -> list[dict]:
    """Measures beam search with the same weights, on the held-out sentences in batches of 16.

    This library runs in two ways: as ``experiments.translate`` does, with several sorted batches at
    the same time, and with one sorted batch at a time. Hugging Face runs on the sorted batches, and
    on batches in the order of the file.
    """
    bundle = tj.load(workdir)
    tokenizer = bundle.tokenizer
    _, pairs = read_translation_data(bundle.experiment.data)
    texts = [source for source, _ in itertools.islice(pairs, _BATCH_SIZE * _NUM_BATCHES)]
    by_length = sorted(texts, key=lambda text: len(tokenizer.encode(text)), reverse=True)
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    with tempfile.TemporaryDirectory() as directory:
        write_marian(bundle.model, directory)
        theirs = OtherProcess(marian_beam_search, bundle.config, directory, ids, *_BEAM.values())
        theirs([[ids["eos"]]])  # the answer comes after the weights are read
    found: dict[str, list] = {}

    def batches(texts: list[str]) -> list[list[list[int]]]:
        sources = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        return [sources[start:start + _BATCH_SIZE] for start in range(0, len(sources), _BATCH_SIZE)]

    def ours():
        found["transformer_jax"] = [hypotheses[0].tokens for hypotheses in translating.translate(
            bundle, by_length, beam_size=_BEAM["beam_size"], length_penalty=_BEAM["length_penalty"],
            batch_size=_BATCH_SIZE)]

    def ours_one_at_a_time():
        for batch in batches(by_length):
            tj.beam_search(bundle.model, batch, penalty="length", start_id=ids["bos"], end_ids=[ids["eos"]], **_BEAM)

    def huggingface():
        found["Hugging Face"] = [tokens for batch in batches(by_length) for tokens in theirs(batch)]

    def huggingface_in_order():
        for batch in batches(texts):
            theirs(batch)

    medians = take_turns({"transformer_jax": ours, "one batch at a time": ours_one_at_a_time,
                          "Hugging Face": huggingface, "Hugging Face in the file's order": huggingface_in_order},
                         rounds)
    theirs.close()
    same = np.mean([a == b for a, b in zip(*found.values(), strict=True)])
    return [{"sentences": len(texts), **{f"{side} sentences/s": len(texts) / s for side, s in medians.items()},
             "ratio": medians["Hugging Face"] / medians["transformer_jax"], "the same translation": float(same)}]
