"""Loss, perplexity and bits per byte of a trained model on a text.

python -m experiments.evaluate --workdir=DIR --data=FILE
"""

from __future__ import annotations

import math
import tempfile

from absl import flags
from tqdm import tqdm

import transformer_jax as tj
from experiments import cli
from transformer_jax.data import TokenFile, Windows, evaluation_batches, read_documents
from transformer_jax.training.step import make_eval_step, next_token_loss

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that experiments.train wrote.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_DATA = flags.DEFINE_string("data", None, "A text file, a glob, or JSONL.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Windows at a time.", lower_bound=1)


def main() -> None:
    for name, value in (("workdir", _WORKDIR.value), ("data", _DATA.value)):
        if value is None:
            raise ValueError(f"--{name} is missing")
    documents = read_documents(_DATA.value)
    bundle = tj.load(_WORKDIR.value, step=_STEP.value)
    if bundle.tokenizer is None:
        raise ValueError(f"{_WORKDIR.value} holds no tokenizer")
    with tempfile.TemporaryDirectory() as directory:
        file = TokenFile.build(documents, bundle.tokenizer, directory)
        length = min(bundle.config.max_len, len(file.tokens) - 1)
        windows = Windows(file.tokens, length, end_of_text_id=file.end_of_text_id if file.num_documents > 1 else None)
        eval_step = make_eval_step(next_token_loss())
        total = weight = 0.0
        batches = math.ceil((len(file.tokens) - 1) / (length * _BATCH_SIZE.value))
        for batch in tqdm(evaluation_batches(windows, _BATCH_SIZE.value), total=batches, unit="batch"):
            batch_total, batch_weight = eval_step(bundle.model, batch)
            total, weight = total + float(batch_total), weight + float(batch_weight)
        unknown = int((file.tokens == bundle.tokenizer.unk_id).sum())
    if unknown:
        print(f"{unknown:,} tokens stand for characters that the model has never seen: bits per byte leave out what "
              "these are")
    loss = total / weight
    print(f"step {bundle.step}, {int(weight):,} tokens, {file.num_bytes:,} bytes, windows of {length}")
    print(f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}, "
          f"{total / math.log(2) / file.num_bytes:.4f} bits per byte")


if __name__ == "__main__":
    cli.run(main)
