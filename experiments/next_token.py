"""Prints the probabilities of the next token after a text, with any language model: n-grams, a
recurrent network, a GPT of this library or one of Hugging Face.

python -m experiments.next_token --workdir=DIR --text="To be or not to" [--top=10 --figure=next.png]
python -m experiments.next_token --model=openai-community/gpt2 --text="To be or not to"
"""

from transformer_jax.cli import next_token

if __name__ == "__main__":
    next_token.main()
