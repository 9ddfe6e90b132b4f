"""Sentence embeddings of pairs of texts from scratch, on a CPU.

python -m experiments.train --config=embed --config.data.path=train.tsv --config.data.validation_path=val.tsv \
    --workdir=runs/sentences
python -m experiments.evaluate --workdir=runs/sentences --data=test.tsv

Each line of the files has the two texts of a pair in its first two columns, such as a sentence and
its translation. With --model=DIRECTORY_OR_ID the run starts from an encoder of Hugging Face; leave
the settings of the model out then (--config=continued --config.task=embed), and export the result
with tj.interop.to_sentence_transformers.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="embed", steps=600, batch_size=64,
        model=presets.get("roberta-base").replace(vocab_size=None, max_len=64, num_layers=2, num_heads=4, model_dim=128,
                                                  unroll=2),
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000)),
        contrastive=c.ContrastiveConfig(dims=(32,)),
        optim=c.OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=50, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=100))
