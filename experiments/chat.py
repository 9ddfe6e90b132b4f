"""Talks with a model in the terminal, in several turns.

python -m experiments.chat --workdir=DIR [--system="Be brief." --temperature=0.8 --top_k=40 ...]
python -m experiments.chat --model=ID_OR_DIRECTORY
"""

from transformer_jax.cli import chat

if __name__ == "__main__":
    chat.main()
