"""Trains a small GPT on Python's documentation, shows its progress, and prints commands to try
next.

python -m experiments.quickstart
"""

from __future__ import annotations

from absl import flags

from transformer_jax.cli.flags import define_config, directory, run
from transformer_jax.runs.training import train
from transformer_jax.training.metrics import plot_losses

_CONFIG = define_config("quickstart")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "The directory for all results.")


def main() -> None:
    """Trains the model, draws its losses, and prints what to try next."""
    workdir, config = directory(_WORKDIR), _CONFIG()
    if config.data.path is not None or config.data.tfds is not None:
        raise ValueError("the quickstart always trains on Python's documentation; to train on your text, use "
                         "python -m experiments.train")
    train(config, documents(), workdir=workdir)
    plot_losses(workdir / "metrics.jsonl", workdir / "loss.png", "quickstart: Python's documentation, characters")
    print(f"""The model is in {workdir}, and its loss curve is in {workdir / "loss.png"}. Next:
  python -m experiments.generate --workdir={workdir} --prompt="A class " --temperature=0.7 --stream
  python -m experiments.generate --workdir={workdir} --prompt="def " --top_p=0.9 --num_samples=3
  python -m experiments.evaluate --workdir={workdir} --data=README.md
  python -m experiments.train --config=shakespeare_char --config.data.path=YOUR.txt --workdir=runs/mine
In Python:
  import jax, transformer_jax as tj
  bundle = tj.load("{workdir}")
  tokens = bundle.tokenizer.encode("The class")
  tj.trace(bundle.model, jax.numpy.array([tokens])).attention(layers=-1)""")


def documents() -> list[str]:
    """Returns the documentation in the standard library as one long text."""
    from pydoc_data import topics

    return ["\n".join(topics.topics[name] for name in sorted(topics.topics))]


if __name__ == "__main__":
    run(main)
