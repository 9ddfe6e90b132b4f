"""Fine-tunes a trained GPT on demonstrations: prompts and ideal answers.

python -m experiments.sft --model=BASE_WORKDIR --workdir=DIR --config.data.path=FILE
python -m experiments.sft --config=sft_faquad --model=BASE_WORKDIR --workdir=DIR --config.data.path=TRAIN \
    --config.data.validation_path=DEV --config.lora.rank=8

A base trained here needs role tokens in its tokenizer (--config.data.tokenizer.chat=true in its
training); to a model of Hugging Face (--model=openai-community/gpt2) roles are named in text. The
same command resumes a run that was stopped.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("sft_instructions", task_name="sft")
