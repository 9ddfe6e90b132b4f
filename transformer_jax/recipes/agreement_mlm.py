"""A small masked language model of generated Portuguese sentences. It needs no file.

python -m experiments.agreement
python -m experiments.train --config=agreement_mlm --workdir=runs/agreement_mlm

The first command trains both models of these sentences, measures them and looks inside. All
answers are right for pairs of nouns that training never had.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=1200, batch_size=32,
        model=c.ModelConfig(family="encoder", max_len=64, num_layers=3, num_heads=4, model_dim=128, positions="rope",
                            activation="gelu", use_qk_norm=True, unroll=3),
        data=c.DataConfig(generated="agreement", mask_probability=0.2,
                          tokenizer=c.TokenizerConfig(kind="word", vocab_size=570)),
        optim=c.OptimConfig(name="muon", peak_lr=3e-3, muon_lr=0.02, schedule="wsd", end_lr=0.0, decay_fraction=0.4,
                            warmup_steps=50, beta2=0.98, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=400), eval=c.EvalConfig(every=400, batch_size=32),
        sample=c.SampleConfig(every=400, prompt="Verteu água da jarra para o copo até que ele ficasse <mask>"))
