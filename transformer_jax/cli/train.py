"""Trains a model: the program behind ``transformer-jax train`` and its faces ``sft``, ``reward``,
``ppo`` and ``dpo``.

The same command resumes a run that was stopped.
"""

from __future__ import annotations

from absl import flags

from transformer_jax import tasks
from transformer_jax.cli import loading
from transformer_jax.cli.flags import define_config, required, run
from transformer_jax.runs.training import train
from transformer_jax.training.processes import is_first


def program(default: str | None = None, task_name: str | None = None) -> None:
    """Runs the program.

    Args:
      default: the named config that is used where ``--config`` is not given.
      task_name: the task of configs that name none; ``None``: the first of the model's family.
    """
    config = define_config(default)
    workdir = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the tokenizer go.")
    model = flags.DEFINE_string("model", None,
                                "The model to start from: a workdir, or a directory or id of Hugging Face.")
    step = flags.DEFINE_string("step", None, "Of --model: a step kept there, or 'best'; by default the last.")

    def train_or_resume() -> None:
        settings, directory = config(), workdir.value
        if directory is None:
            raise ValueError("--workdir is missing: the directory for checkpoints, metrics and the tokenizer")
        settings = settings.replace(task=settings.task or task_name)
        task = tasks.get(tasks.name_of(settings))
        if task.needs_base:
            required(model)
        base = None if model.value is None else loading.load(None, model.value, step=step.value)
        train(settings, workdir=directory, base=base)
        if is_first():
            print(f"done; next: {task(settings).next_command(directory)}")

    run(train_or_resume)


def main() -> None:
    """``transformer-jax train``."""
    program()


if __name__ == "__main__":
    main()
