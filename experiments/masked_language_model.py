"""Masked language modelling on lines of text: an encoder learns to restore what is masked."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import runs
from experiments.language_model import corpus
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import (
    LineRows,
    Masking,
    Tokenizer,
    masked_evaluation_batches,
    read_documents,
    split_lines,
    text_lines,
)
from transformer_jax.data.sentencepiece_training import MASK
from transformer_jax.decoding.fill_mask import check_masked, fill_mask
from transformer_jax.models.encoder import Encoder
from transformer_jax.ops.losses import cross_entropy
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import masked_logits, masked_token_loss
from transformer_jax.training.state import TrainState

_TOP = 5


def train(config: ExperimentConfig, workdir: str | pathlib.Path) -> TrainState:
    """Trains on the lines of the text that the config names, or resumes."""
    if config.sample.every and MASK not in config.sample.prompt:
        raise ValueError(f"sample.prompt={config.sample.prompt!r} has no {MASK} to fill in; set one, or sample.every=0")
    lines, held_out = split(config)
    return runs.run(config, workdir, lines, functools.partial(_task, lines, held_out))


def split(config: ExperimentConfig) -> tuple[list[str], list[str]]:
    """The lines to train on, and those held out."""
    documents = corpus(config.data)
    if config.data.validation_path is None:
        return split_lines(documents, config.data.validation_fraction)
    held_out = read_documents(config.data.validation_path, key=config.data.text_key)
    return text_lines(documents), text_lines(held_out)


def evaluate(bundle: Bundle, data: str | None, batch_size: int) -> None:
    """Prints the loss and the accuracy at masked tokens, beside what counting tokens and pairs of tokens achieves.

    Args:
      bundle: a trained encoder.
      data: a text to measure on; ``None``: the part that its run held out.
      batch_size: rows at a time.
    """
    config, tokenizer = bundle.experiment, bundle.tokenizer
    if config is None:
        raise ValueError("this model comes without the config of its training: its text is not known")
    lines, held_out = split(config)
    if data is not None:
        held_out = text_lines(read_documents(data, key=config.data.text_key))
    train, validation = (LineRows.build(part, tokenizer, config.model.max_len) for part in (lines, held_out))
    masking = Masking.of(tokenizer, config.data.mask_probability, config.data.mask_whole_words)
    guesses = {"unigram": unigram_guesses(train, tokenizer), "bigram": bigram_guesses(train, tokenizer)}
    measure = jax.jit(_loss_and_hits)
    total = weight = 0.0
    hits = {name: np.zeros(2) for name in ("model", *guesses)}
    batches = masked_evaluation_batches(validation, masking, batch_size)
    for batch in tqdm(batches, total=-(-len(validation) // batch_size), unit="batch"):
        loss, model_hits = measure(bundle.model, batch)
        total, weight = total + float(loss), weight + float(batch["masked_weights"].sum())
        hits["model"] += np.asarray(model_hits)
        for name, guess in guesses.items():
            found = (guess(batch) == batch["masked_targets"][..., None]) * batch["masked_weights"][..., None]
            hits[name] += found[..., 0].sum(), found.sum()
    print(f"step {bundle.step}, {len(held_out):,} lines, {int(weight):,} masked tokens")
    print(f"loss {total / weight:.4f} nats per masked token, perplexity {np.exp(total / weight):.2f}")
    for name, (first, any_of_five) in hits.items():
        print(f"{name:8} top-1 {first / weight:6.2%}  top-{_TOP} {any_of_five / weight:6.2%}")


def _loss_and_hits(model: Encoder, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits_BPV, targets_BP, weights_BP = masked_logits(model, batch), batch["masked_targets"], batch["masked_weights"]
    best_BPK = jax.lax.top_k(logits_BPV, _TOP)[1] == targets_BP[..., None]
    found = best_BPK * weights_BP[..., None]
    return (cross_entropy(logits_BPV, targets_BP) * weights_BP).sum(), jnp.stack([found[..., 0].sum(), found.sum()])


Guess = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def unigram_guesses(train: LineRows, tokenizer: Tokenizer) -> Guess:
    """A function from a batch to the five most frequent ordinary tokens, for every masked position alike."""
    best_K = _most_frequent(_ordinary(train.tokens[train.segment_ids != 0], tokenizer), tokenizer.vocab_size)
    return lambda batch: np.broadcast_to(best_K, (*batch["masked_targets"].shape, _TOP))


def bigram_guesses(train: LineRows, tokenizer: Tokenizer) -> Guess:
    """A function from a batch to the five tokens seen most often after the token to the left of each masked position.

    Where fewer were seen, or the token to the left is masked too, the most frequent of all tokens complete them.
    """
    tokens_RT, segments_RT = train.tokens.astype(np.int64), train.segment_ids
    same_RT = segments_RT[:, 1:] == segments_RT[:, :-1]
    followers: dict[int, list[int]] = {}
    for left, token in _pairs(tokens_RT[:, :-1][same_RT], tokens_RT[:, 1:][same_RT], tokenizer):
        best = followers.setdefault(left, [])
        if len(best) < _TOP:
            best.append(token)
    frequent = unigram_guesses(train, tokenizer)({"masked_targets": np.zeros(1)})[0].tolist()
    table_VK = np.tile(np.asarray(frequent), (tokenizer.vocab_size, 1))
    for left, best in followers.items():
        table_VK[left] = (best + [token for token in frequent if token not in best])[:_TOP]

    def guess(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        left_BP = np.take_along_axis(batch["tokens"], np.maximum(batch["masked_positions"] - 1, 0), axis=1)
        return table_VK[left_BP]

    return guess


def _ordinary(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return tokens[Masking.of(tokenizer).is_ordinary_V[tokens]]


def _most_frequent(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")[:_TOP]


def _pairs(left: np.ndarray, right: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Pairs of neighbours of which the second is an ordinary token, the most frequent first."""
    ordinary = Masking.of(tokenizer).is_ordinary_V[right]
    codes, counts = np.unique(left[ordinary] * tokenizer.vocab_size + right[ordinary], return_counts=True)
    for code in codes[np.argsort(-counts, kind="stable")].tolist():
        yield divmod(code, tokenizer.vocab_size)


def _task(lines: list[str], held_out: list[str], config: ExperimentConfig, tokenizer: Tokenizer,
          cache_dir: pathlib.Path) -> runs.Task:
    del cache_dir  # a book is tokenised in a second
    _check_prompt(config, tokenizer)
    train, validation = (LineRows.build(part, tokenizer, config.model.max_len) for part in (lines, held_out))
    masking = Masking.of(tokenizer, config.data.mask_probability, config.data.mask_whole_words)

    def sample(model: Encoder, step: int) -> None:
        shown = [f"{candidate.text}  ({candidate.probability:.3f})"
                 for mask in fill_mask(model, config.sample.prompt, tokenizer=tokenizer)[0] for candidate in mask]
        tqdm.write("\n".join([f"--- step {step} ---", *shown, ""]))

    return runs.Task(
        train=train, contents=[train.digest, validation.digest],
        summary=f"{len(lines):,} lines in {len(train):,} rows to train on, {len(held_out):,} lines held out",
        loss_fn=masked_token_loss(config.loss), sample=sample, transform=masking, held_out=validation,
        evaluate=runs.mean_loss(masked_token_loss(),
                                lambda: masked_evaluation_batches(validation, masking, config.eval.batch_size),
                                config.eval.max_batches))


def _check_prompt(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    if not config.sample.every:
        return
    check_masked(config.sample.prompt, tokenizer)
    if (length := len(tokenizer.encode_masked(config.sample.prompt))) > config.model.max_len:
        raise ValueError(f"sample.prompt has {length} tokens, which is more than the context of "
                         f"model.max_len={config.model.max_len}; shorten it")
