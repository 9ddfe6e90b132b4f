"""Recurrent translation with additive attention, as Bahdanau et al. (2015): a stage of the road.

python -m experiments.train --config=road_pairs_attention --config.data.path=pairs.tsv --workdir=runs/attention

``python -m experiments.road --pairs=dates`` trains it together with the other models.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=1500, batch_size=16,
        model=c.RecurrentConfig(family="recurrent_pairs", max_len=64, cell="gru", num_layers=1, model_dim=128),
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=600)),
        optim=c.OptimConfig(peak_lr=2e-3, schedule="linear", end_lr=0.0, warmup_steps=50, beta2=0.98, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=500), sample=c.SampleConfig(every=500))
