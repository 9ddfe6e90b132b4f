"""Measures a model with lm-eval, the harness of EleutherAI.

python -m experiments.lm_eval --model_args workdir=DIR --tasks tj_cloze,tj_choice,tj_arithmetic [--limit=100 ...]
python -m experiments.lm_eval --model_args model=openai-community/gpt2 --tasks lambada_openai,hellaswag
"""

from transformer_jax.cli import lm_eval

if __name__ == "__main__":
    lm_eval.main()
