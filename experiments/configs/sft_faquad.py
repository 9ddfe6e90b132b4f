"""Questions in Portuguese on a given text (FaQuAD): a base learns to answer from it.

python -m experiments.sft --config=sft_faquad --model=runs/base_pt --workdir=runs/faquad \
    --config.data.path=train.jsonl --config.data.validation_path=dev.jsonl [--config.lora.rank=8]
"""

from experiments.cli import overridable
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=200, batch_size=8, model=ModelConfig(dropout=0.1),
        data=DataConfig(),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=20, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=100, keep=1), eval=EvalConfig(every=10, batch_size=8),
        sample=SampleConfig(every=100, max_new_tokens=40, temperature=0.0)))
