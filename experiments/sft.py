"""Fine-tunes a trained GPT on demonstrations: prompts and ideal answers.

python -m experiments.sft --model=BASE_WORKDIR --workdir=DIR --config.data.path=FILE
python -m experiments.sft --config=sft_faquad --model=BASE_WORKDIR --workdir=DIR --config.data.path=TRAIN \
    --config.data.validation_path=DEV --config.lora.rank=8

The tokenizer of a base that this library trained needs role tokens: train the base with
--config.data.tokenizer.chat=true. For a model of Hugging Face (--model=openai-community/gpt2) the
prompt names the roles in plain text. The same command resumes a stopped run.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("sft_instructions", task_name="sft")
