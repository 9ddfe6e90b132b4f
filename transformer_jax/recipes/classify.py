"""A classifier of texts from scratch (JSONL with text and label), on a CPU.

python -m experiments.train --config=classify --config.data.path=reviews.jsonl --workdir=runs/reviews
python -m experiments.evaluate --workdir=runs/reviews --step=best
python -m experiments.classify --workdir=runs/reviews --step=best --text="a quiet, moving film"

To start from a trained encoder or decoder, use --config=classify_finetuned.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="classify", steps=600, batch_size=32,
        model=c.ModelConfig(family="encoder", max_len=128, num_layers=2, num_heads=4, model_dim=128, positions="rope",
                            activation="gelu", dropout=0.3, unroll=2,
                            classifier=c.ClassifierConfig(pooling="mean", activation="none")),
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2)),
        optim=c.OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=50, weight_decay=0.1),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=100), sample=c.SampleConfig(every=200))
