"""Questions in Portuguese on a given text (FaQuAD): a base learns to answer from it.

python -m experiments.sft --config=sft_faquad --model=runs/base_pt --workdir=runs/faquad \
    --config.data.path=train.jsonl --config.data.validation_path=dev.jsonl [--config.lora.rank=8]
"""

from experiments.cli import named, overridable
from transformer_jax.config import DataConfig, SampleConfig


def get_config():
    return overridable(named("sft_instructions").replace(
        batch_size=8, data=DataConfig(), sample=SampleConfig(every=100, max_new_tokens=40, temperature=0.0)))
