"""Multi30k English to German with a Transformer of 2.4M parameters.

python -m experiments.train --config=multi30k_ende --workdir=runs/ende \
    --config.data.path=train.en.gz,train.de.gz --config.data.validation_path=val.en.gz,val.de.gz
python -m experiments.evaluate --workdir=runs/ende --data=test.en.gz,test.de.gz --target_language=de

28 minutes on two busy CPU cores; tokenised, lower-cased BLEU 41.15 on test_2016_flickr, cased
sacreBLEU 40.76. The paper's own recipe (post-norm, sinusoidal positions, Adam) needs 8,000 steps to
40.7. Muon with post-norm learns slowly.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=3000, batch_size=64,
        model=c.ModelConfig(family="encoder_decoder", max_len=64, num_layers=4, num_heads=4, model_dim=128, mlp_dim=256,
                            positions="rope", norm_position="pre", use_qk_norm=True, activation="relu",
                            scale_embeddings=True, init_std=None, dropout=0.3, attention_dropout=0.0, unroll=4),
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=8000)),
        loss=c.LossConfig(label_smoothing=0.1),
        optim=c.OptimConfig(name="muon", peak_lr=3e-3, muon_lr=0.02, schedule="linear", end_lr=0.0, warmup_steps=100,
                            beta2=0.98, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=300), eval=c.EvalConfig(every=300), sample=c.SampleConfig(every=1000))
