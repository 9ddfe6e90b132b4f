"""The console command ``transformer-jax``: ``transformer-jax PROGRAM --flag=value ...``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from transformer_jax.settings import nearest


def _program(module: str) -> Callable[[], None]:
    return lambda: importlib.import_module(f"transformer_jax.cli.{module}").main()


def _training(config: str, task: str) -> Callable[[], None]:
    return lambda: importlib.import_module("transformer_jax.cli.train").program(config, task)


# Program -> what it is for, and what runs it.
PROGRAMS: dict[str, tuple[str, Callable[[], None]]] = {
    "train": ("train a model on text, or resume a run", _program("train")),
    "sft": ("fine-tune a model on demonstrations", _training("sft_instructions", "sft")),
    "reward": ("train a reward model on comparisons", _training("reward", "reward")),
    "dpo": ("train a policy on comparisons", _training("dpo", "dpo")),
    "ppo": ("train a policy by rewards of its answers", _training("ppo", "policy")),
    "generate": ("continue a prompt", _program("generate")),
    "translate": ("translate by beam search", _program("translate")),
    "fill-mask": ("fill in masked tokens", _program("fill_mask")),
    "evaluate": ("measure a trained model, or compare several", _program("evaluate")),
    "attention": ("write a page with attention maps", _program("attention")),
    "preflight": ("say what memory a training run needs", _program("preflight")),
}


def main() -> None:
    """Runs the program that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print("usage: transformer-jax PROGRAM --flag=value ...   (transformer-jax PROGRAM --help lists its flags)\n")
        for name, (purpose, _) in PROGRAMS.items():
            print(f"  {name:<10}  {purpose}")
        sys.exit(0 if arguments else 2)
    name = arguments[0]
    if name not in PROGRAMS:
        print(f"error: there is no program {name!r}{nearest(name, PROGRAMS)}; programs: {', '.join(PROGRAMS)}",
              file=sys.stderr)
        sys.exit(2)
    sys.argv[:] = [f"transformer-jax {name}", *arguments[1:]]
    PROGRAMS[name][1]()


if __name__ == "__main__":
    main()
