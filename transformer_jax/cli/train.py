"""Trains a model. ``transformer-jax sft``, ``reward``, ``ppo`` and ``dpo`` run the same program
with other defaults.

transformer-jax train --config=NAME --config.data.path=FILE --workdir=DIR    trains a new model
transformer-jax train --model=MODEL --config.data.path=FILE --workdir=DIR    trains a model further
transformer-jax train --workdir=DIR                                          resumes a run
transformer-jax train --workdir=DIR --config.steps=MORE                      extends a run

MODEL is a workdir, or a directory or an id of Hugging Face. It is trained on plain text (for other
data see sft, reward, ppo and dpo), and its default --config is continued. The same command resumes
a run that was stopped, and so does --workdir alone. If a run ended because its weights became
infinite or NaN, pass --change and --config.optim.peak_lr=LOWER to continue from the last saved
step.
"""

from __future__ import annotations

from absl import flags

from transformer_jax import tasks
from transformer_jax.cli.flags import argument_of, define_config, required, run
from transformer_jax.runs.record import read_record
from transformer_jax.runs.training import train
from transformer_jax.training.processes import is_first


def program(default: str | None = None, task_name: str | None = None) -> None:
    """Runs the training program.

    Args:
      default: The named config that is used if ``--config`` is not given.
      task_name: The task that is used if the config names none. ``None`` means the default task of
        the model's family.
    """
    if default is None and argument_of("model"):
        default = "continued"
    config = define_config(default, resumes=True)
    workdir = flags.DEFINE_string("workdir", None, "The directory for checkpoints, metrics and the tokenizer.")
    model = flags.DEFINE_string("model", None,
                                "The model to start from: a workdir, or a directory or id of Hugging Face.")
    step = flags.DEFINE_string("step", None, "The step of a checkpoint of --model, or 'best'; by default the last.")

    change = flags.DEFINE_bool("change", False, "Continue the run in --workdir with new settings of the optimizer, "
                               "the loss and dropout.")

    def train_or_resume() -> None:
        # This check comes before the config is read, because its message helps a new user more.
        if not workdir.value:
            raise ValueError("--workdir is missing: the directory for checkpoints, metrics and the tokenizer")
        if model.value is not None and not model.value.strip():
            raise ValueError("--model is empty: expected a workdir, or a directory or id of Hugging Face")
        settings = config()
        settings = settings.replace(task=settings.task or task_name)
        if tasks.get(tasks.name_of(settings)).needs_base and read_record(workdir.value) is None:
            required(model)  # a resumed run finds its base in its record
        trained = train(settings, workdir=workdir.value, base=model.value, base_step=step.value, change=change.value)
        if is_first():
            task = tasks.make(settings, base=trained)
            print(f"done; next: {task.next_command(workdir.value)}")

    run(train_or_resume)


def main() -> None:
    """Runs ``transformer-jax train``."""
    program()


if __name__ == "__main__":
    main()
