"""Serves models: a chat page, and an API like OpenAI's.

python -m experiments.serve --workdir=DIR [--port=8000 --max_batch=32 --max_context=1024]
python -m experiments.serve --model=openai-community/gpt2 --host=0.0.0.0 --api_key=SECRET
python -m experiments.serve --workdir=runs/base --workdir=runs/sft --workdir=runs/ppo
"""

from transformer_jax.cli import serve

if __name__ == "__main__":
    serve.main()
