"""Counts the n-grams of a text, measures the models of all orders on its last part, prints a text
in the manner of each order, and saves the model.

python -m experiments.ngrams --data=FILE --order=3 --workdir=DIR
python -m experiments.ngrams --data=FILE --order=5 --workdir=DIR --tokenizer=bpe --vocab_size=4000
python -m experiments.next_token --workdir=DIR --text="..."
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
from absl import flags

from transformer_jax.baselines.ngram_counts import LARGEST_ORDER, count_ngrams
from transformer_jax.baselines.ngram_files import save_ngrams
from transformer_jax.baselines.ngram_sampling import generate_ngrams
from transformer_jax.baselines.ngrams import NgramModel
from transformer_jax.baselines.smoothing import Smoothing
from transformer_jax.cli.flags import directory, required, run
from transformer_jax.data import TokenFile, Tokenizer, read_documents
from transformer_jax.decoding.logits import Sampling

_DATA = flags.DEFINE_string("data", None, "A text file, a glob, or JSONL.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory for the model.")
_ORDER = flags.DEFINE_integer("order", 3, f"The length of the longest n-grams, from 1 to {LARGEST_ORDER}.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "char", "char, word, bpe or unigram, or the file of a tokenizer.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "The number of tokens of a new tokenizer; for char and word, "
                                   "by default all that occur.")
_SMOOTHING = flags.DEFINE_enum("smoothing", "kneser_ney", ["kneser_ney", "add_k"], "The smoothing, which gives "
                               "probability to n-grams that the text does not contain.")
_K = flags.DEFINE_float("k", 1.0, "For add_k: the number that is added to every count.")
_VALIDATION_DATA = flags.DEFINE_string("validation_data", None, "A text to measure on, instead of a part of --data.")
_VALIDATION_FRACTION = flags.DEFINE_float("validation_fraction", 0.1, "The part of the tokens of --data, at its end, "
                                          "that is held out.")
_PROMPT = flags.DEFINE_string("prompt", "", "The text that the samples continue.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "The length of the samples; 0 prints none.",
                                       lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "The temperature of the samples.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0 means among all tokens.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same samples.", lower_bound=-2**31,
                             upper_bound=2**32 - 1)


def _main() -> None:
    documents, workdir = read_documents(required(_DATA)), directory(_WORKDIR)
    sampling = Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value)
    smoothing = Smoothing(_SMOOTHING.value, k=_K.value)
    tokenizer = _tokenizer(documents)
    train, held_out, num_bytes = _tokens(documents, tokenizer, workdir / "data")
    counts = count_ngrams(train, _ORDER.value, vocab_size=tokenizer.vocab_size,
                          end_of_text_id=tokenizer.end_of_text_id)
    print(f"{len(train):,} tokens counted, {len(held_out):,} held out, a vocabulary of {tokenizer.vocab_size}")
    print("order  different n-grams  perplexity  bits per byte")
    models = []
    for order in range(1, counts.order + 1):
        models.append(NgramModel(counts.up_to(order), smoothing, tokenizer))
        measured = models[-1].measure_tokens(held_out, num_bytes)
        num_ngrams = np.count_nonzero(counts.counts[order - 1])
        print(f"{order:5}  {num_ngrams:17,}  {measured['perplexity']:10.3f}  {measured['bits_per_byte']:13.4f}")
    save_ngrams(workdir, models[-1])
    for model in models if _MAX_NEW_TOKENS.value else []:
        result = generate_ngrams(model, [_PROMPT.value], key=jax.random.key(_SEED.value), sampling=sampling,
                                 max_new_tokens=_MAX_NEW_TOKENS.value)
        print(f"--- order {model.order} ---\n{_PROMPT.value}{''.join(result.texts or [])}")
    print(f'The model is in {workdir}. Next:\n  python -m experiments.next_token --workdir={workdir} --text="..."')


def _tokenizer(documents) -> Tokenizer:
    """Trains the tokenizer, or loads it from a file."""
    kind = _TOKENIZER.value
    if kind in ("char", "word", "bpe", "unigram"):
        if _VOCAB_SIZE.value is None and kind in ("bpe", "unigram"):
            raise ValueError(f"--tokenizer={kind} needs --vocab_size, the number of its tokens")
        return Tokenizer.train(documents, kind=kind, vocab_size=_VOCAB_SIZE.value)
    if not pathlib.Path(kind).is_file():
        raise ValueError(f"--tokenizer={kind} is neither char, word, bpe or unigram, nor the file of a tokenizer")
    return Tokenizer.load(kind)


def _tokens(documents, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the tokens to count, the held-out tokens, and the number of bytes of the latter."""
    file = TokenFile.build(documents, tokenizer, cache_dir)
    if _VALIDATION_DATA.value is None:
        train, held_out = file.split(_VALIDATION_FRACTION.value)
        return np.array(train), np.array(held_out), int(tokenizer.byte_lengths[held_out[1:]].sum())
    other = TokenFile.build(read_documents(_VALIDATION_DATA.value), tokenizer, cache_dir)
    return np.array(file.tokens), np.array(other.tokens), other.num_bytes


def main() -> None:
    """Runs ``transformer-jax ngrams``."""
    run(_main)


if __name__ == "__main__":
    main()
