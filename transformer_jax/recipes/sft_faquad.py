"""A base model learns to answer Portuguese questions about a given text (FaQuAD).

python -m experiments.sft --config=sft_faquad --model=runs/base_pt --workdir=runs/faquad \
    --config.data.path=train.jsonl --config.data.validation_path=dev.jsonl [--config.lora.rank=8]
"""

import transformer_jax.config as c
from transformer_jax.recipes import sft_instructions


def get_config() -> c.ExperimentConfig:
    return sft_instructions.get_config().replace(
        batch_size=8, data=c.DataConfig(), sample=c.SampleConfig(every=100, max_new_tokens=40, temperature=0.0))
