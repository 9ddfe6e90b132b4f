"""A GPT of characters with 0.8M weights, the last stage of the road to the Transformer.

python -m experiments.train --config=road_gpt --config.data.path=input.txt --workdir=runs/gpt

``python -m experiments.road`` trains it together with the earlier models, see docs/guides/road.md.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=2000, batch_size=16,
        model=c.ModelConfig(max_len=128, num_layers=4, num_heads=4, model_dim=128, positions="rope", norm="rmsnorm",
                            use_qk_norm=True, init_std=0.05, use_bias=False, unroll=4),
        optim=c.OptimConfig(name="muon", peak_lr=1e-2, muon_lr=0.05, schedule="linear", end_lr=0.0, warmup_steps=10,
                            beta2=0.95, weight_decay=0.01, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=500), sample=c.SampleConfig(every=500))
