"""A small GPT that learns from the documentation inside every Python installation.

python -m experiments.quickstart
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=600, batch_size=16,
        model=c.ModelConfig(max_len=128, num_layers=4, num_heads=4, model_dim=128, positions="rope", norm="rmsnorm",
                            activation="gelu_tanh", use_bias=False, use_qk_norm=True, unroll=4),
        optim=c.OptimConfig(name="muon", peak_lr=3e-3, muon_lr=0.02, schedule="wsd", end_lr=0.0, decay_fraction=0.4,
                            warmup_steps=20, beta2=0.95, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=200),
        sample=c.SampleConfig(every=25, growing=True, at_start=True, prompt="The ", max_new_tokens=120))
