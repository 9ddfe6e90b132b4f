"""A ModernBERT-shaped masked language model from scratch on one book, on a CPU.

python -m experiments.train --config=book_modernbert --config.data.path=dom_casmurro.txt --workdir=runs/modernbert
python -m experiments.evaluate --workdir=runs/modernbert

Every third layer attends to all tokens of a line, the others to a window of 8 on both sides. 30 %
of the tokens are masked, as in the training of ModernBERT (Warner et al., 2024).
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    windows = (c.LayerKind(), *(c.LayerKind(9, rope_base=10_000.0),) * 2)
    return c.ExperimentConfig(
        steps=1000, batch_size=32,
        model=presets.get("modernbert-base").replace(
            vocab_size=None, max_len=128, num_layers=4, num_heads=4, model_dim=256, mlp_dim=384, layer_pattern=windows,
            init_std=0.05, dropout=0.1, unroll=4),
        data=c.DataConfig(validation_fraction=0.05, mask_probability=0.3,
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2)),
        optim=c.OptimConfig(name="muon", peak_lr=3e-3, muon_lr=0.02, schedule="linear", end_lr=0.0, warmup_steps=50,
                            beta2=0.98, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=250), eval=c.EvalConfig(every=250, batch_size=32),
        sample=c.SampleConfig(every=500, prompt="digo que o amor é <mask>"))
