"""ELMo over pieces: an LSTM in each direction, for contextual vectors by ``tj.embed``.

python -m experiments.train --config=road_elmo --config.data.path=contos.txt --workdir=runs/elmo
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=2000, batch_size=16,
        model=c.RecurrentConfig(family="elmo", max_len=64, num_layers=2, model_dim=192, dropout=0.1),
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000)),
        optim=c.OptimConfig(peak_lr=2e-3, end_lr=0.1, warmup_steps=50, beta2=0.99, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=500), sample=c.SampleConfig(every=0))
