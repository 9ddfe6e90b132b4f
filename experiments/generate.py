"""Continues a prompt with a trained model.

python -m experiments.generate --workdir=DIR --prompt="ROMEO:" [--max_new_tokens=300 --temperature=0.8 --top_k=40 ...]
python -m experiments.generate --model=openai-community/gpt2 --prompt="The house" [--temperature=0 ...]
python -m experiments.generate --workdir=DIR --step=best --chat --prompt="What is the capital of Brazil?"
python -m experiments.generate --workdir=DIR --chat --documents=FOLDER --prompt="..."     answers from own documents
python -m experiments.generate --workdir=DIR --prompt="..." --choice=yes --choice=no      or --regex, --json_schema
"""

from transformer_jax.cli import generate

if __name__ == "__main__":
    generate.main()
