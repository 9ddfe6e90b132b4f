"""Measures a model with lm-eval, the harness of EleutherAI.

python -m experiments.lm_eval --model_args workdir=DIR --tasks tj_cloze,tj_choice,tj_arithmetic [--limit=100 ...]
python -m experiments.lm_eval --model_args model=openai-community/gpt2 --tasks lambada_openai,hellaswag
python -m experiments.lm_eval ls tasks

All arguments are those of the command lm_eval. Three of them have other defaults here: --model is
transformer_jax, --batch_size is 16, and --include_path is the folder with this library's own tasks
(tj_cloze, tj_choice, tj_arithmetic, tj_arithmetic_chain, tj_text). The command lm_eval itself does
not know --model transformer_jax, because it finds only the models of its own package.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

from transformer_jax.runtime import use_compilation_cache

TASKS = pathlib.Path(__file__).resolve().parents[1] / "evaluation" / "harness_tasks"
_COMMANDS = ("run", "ls", "validate")


def main() -> None:
    """Runs ``transformer-jax lm-eval``."""
    if len(sys.argv) == 1:
        print(__doc__)
        sys.exit(2)
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        import transformer_jax.evaluation.harness as registers_the_model
    except ImportError as error:
        _fail(f'{error}; measuring with lm-eval needs: pip install "transformer_jax[lm-eval]"')
    del registers_the_model
    sys.argv[1:] = with_defaults(sys.argv[1:])
    use_compilation_cache()
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forked processes can deadlock beside JAX's threads
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        _fail(str(error))


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """Adds this library's defaults to the arguments of ``lm_eval``.

    Args:
      arguments: the arguments, without the name of the program.

    Returns:
      The arguments, beginning with the name of a command.
    """
    command, *others = arguments if arguments[0] in _COMMANDS else ["run", *arguments]
    defaults = {"--include_path": str(TASKS)}
    if command == "run":
        defaults |= {"--model": "transformer_jax", "--batch_size": "16"}
    short = {"--model": "-M", "--batch_size": "-b"}
    for name, value in defaults.items():
        if not any(given in (name, short.get(name)) or given.startswith(f"{name}=") for given in others):
            others += [name, value]
    return [command, *others]


def _fail(message: str) -> None:
    """Prints an error in one line and exits with status 2."""
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
