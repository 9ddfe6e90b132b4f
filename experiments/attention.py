"""Shows the attention of a trained model: as an HTML page with every layer and head, and as
pictures.

python -m experiments.attention --workdir=DIR --text="..." --out=maps.html
python -m experiments.attention --workdir=DIR --text="..." --png=maps.png [--layer=3 [--head=5]] [--kind=encoder]
python -m experiments.attention --model=openai-community/gpt2 --text="..." --out=maps.html
"""

from transformer_jax.cli import attention

if __name__ == "__main__":
    attention.main()
