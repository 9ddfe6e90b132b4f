"""The console command ``transformer-jax``: ``transformer-jax PROGRAM --flag=value ...``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from transformer_jax.settings import nearest


def _program(module: str) -> Callable[[], None]:
    """Returns a function that imports a program and runs it."""
    return lambda: importlib.import_module(f"transformer_jax.cli.{module}").main()


def _training(config: str, task: str) -> Callable[[], None]:
    """Returns a function that runs the training program with a default config and a default
    task."""
    return lambda: importlib.import_module("transformer_jax.cli.train").program(config, task)


# For each program its purpose, and a function that runs it.
PROGRAMS: dict[str, tuple[str, Callable[[], None]]] = {
    "train": ("train a model on text, or resume a run", _program("train")),
    "sft": ("fine-tune a model on demonstrations", _training("sft_instructions", "sft")),
    "reward": ("train a reward model on comparisons", _training("reward", "reward")),
    "dpo": ("train a policy on comparisons", _training("dpo", "dpo")),
    "ppo": ("train a policy with rewards for its answers", _training("ppo", "policy")),
    "sweep": ("train models of several seeds and learning rates together", _program("sweep")),
    "generate": ("continue a prompt", _program("generate")),
    "chat": ("talk with a model in the terminal", _program("chat")),
    "serve": ("serve models: a chat page, and an API like OpenAI's", _program("serve")),
    "next-token": ("print the probabilities of the next token", _program("next_token")),
    "ngrams": ("count and measure n-grams", _program("ngrams")),
    "translate": ("translate by beam search", _program("translate")),
    "fill-mask": ("fill in masked tokens", _program("fill_mask")),
    "classify": ("classify texts, or the words of texts", _program("classify")),
    "evaluate": ("measure a trained model, or compare several", _program("evaluate")),
    "lm-eval": ("measure a model with the harness lm-eval", _program("lm_eval")),
    "attention": ("write an HTML page or a picture of attention maps", _program("attention")),
    "plot": ("draw the losses of runs", _program("plot")),
    "clean-corpus": ("remove duplicates and bad texts from a corpus", _program("clean_corpus")),
    "preflight": ("compute the memory that a training run needs", _program("preflight")),
}


def main() -> None:
    """Runs the program that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print("usage: transformer-jax PROGRAM --flag=value ...   (transformer-jax PROGRAM --help lists its flags)\n")
        for name, (purpose, _) in PROGRAMS.items():
            print(f"  {name:<12}  {purpose}")
        sys.exit(0 if arguments else 2)
    name = arguments[0]
    if name not in PROGRAMS:
        print(f"error: there is no program {name!r}{nearest(name, PROGRAMS)}; the programs are: {', '.join(PROGRAMS)}",
              file=sys.stderr)
        sys.exit(2)
    sys.argv[:] = [f"transformer-jax {name}", *arguments[1:]]
    PROGRAMS[name][1]()


if __name__ == "__main__":
    main()
