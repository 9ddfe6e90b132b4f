"""A GRU language model of characters with 0.8M weights, a stage of the road to the Transformer.

python -m experiments.train --config=road_gru --config.data.path=input.txt --workdir=runs/gru

``python -m experiments.road`` trains it together with the other models, see docs/guides/road.md.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=2000, batch_size=16,
        model=c.RecurrentConfig(cell="gru", max_len=128, num_layers=2, model_dim=256),
        optim=c.OptimConfig(peak_lr=8e-3, end_lr=0.1, warmup_steps=50, beta2=0.99, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=500), sample=c.SampleConfig(every=500))
