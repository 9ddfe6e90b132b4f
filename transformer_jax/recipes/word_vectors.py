"""Word vectors by skip-gram with negative sampling, with the settings of word2vec.

python -m experiments.train --config=word_vectors --config.data.path=FILE --workdir=DIR
python -m experiments.evaluate --workdir=DIR --data=questions-words.txt

The first lines of the output say how many steps an epoch has; set --config.steps to five times this
number. --config.model.method=cbow trains CBOW. Source: Mikolov et al., 2013.
"""

from transformer_jax.config import DataConfig, EvalConfig, ExperimentConfig, OptimConfig, SampleConfig, TokenizerConfig
from transformer_jax.config.word_vectors import WordVectorConfig


def get_config() -> ExperimentConfig:
    """Returns the config."""
    return ExperimentConfig(
        task="word_vectors",
        steps=400,
        batch_size=64,
        model=WordVectorConfig(),
        data=DataConfig(tokenizer=TokenizerConfig(kind="word")),
        optim=OptimConfig(name="sgd", peak_lr=0.025, schedule="linear", warmup_steps=0, end_lr=0.004, weight_decay=0.0,
                          beta1=0.0, clip_norm=None),
        eval=EvalConfig(every=1000),
        sample=SampleConfig(every=200, prompt="king sea woman"),
    )
