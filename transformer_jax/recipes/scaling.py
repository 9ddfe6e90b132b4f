"""Small character models for studies of width, size and learning rate.

python -m experiments.scaling --config.data.path=input.txt --workdir=runs/scaling

Every width trains on the same tokens, 400 batches of 16 x 64.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=400, batch_size=16,
        model=c.ModelConfig(max_len=64, num_layers=2, num_heads=4, model_dim=64, positions="rope", norm="rmsnorm",
                            use_bias=False, init_std=0.1, unroll=2),
        optim=c.OptimConfig(peak_lr=4e-3, schedule="linear", end_lr=0.0, warmup_steps=20, beta2=0.95, weight_decay=0.0),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=400, batch_size=128))
