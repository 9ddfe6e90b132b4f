"""Trains small models of several seeds and learning rates together, in one program.

transformer-jax sweep --config=NAME --config.data.path=FILE --workdir=DIR
    --over=optim.peak_lr=1e-3,3e-3,1e-2 --over=seed=0,1,2                    nine models
transformer-jax sweep --workdir=DIR                                          resumes a sweep

There is a model for each combination of the values. The program prints a table of their losses, and
writes it to results.jsonl, with a figure, sweep.png, and the best model in best_model. The same
command resumes a sweep that was stopped, and so does --workdir alone.
"""

from __future__ import annotations

import json

from absl import flags

from transformer_jax.cli.flags import define_config, directory, run
from transformer_jax.runs.sweeping import sweep


def main() -> None:
    """Runs ``transformer-jax sweep``."""
    config = define_config(resumes=True)
    workdir = flags.DEFINE_string("workdir", None, "The directory for checkpoints, metrics and results.")
    over = flags.DEFINE_multi_string("over", None, "A setting and its values, such as optim.peak_lr=1e-3,3e-3 or "
                                     "seed=0,1,2. The flag may be repeated.")

    def train_all() -> None:
        place = directory(workdir)
        found = sweep(config(), None if over.value is None else read_values(over.value), workdir=place)
        print(f"{found.table()}\n{place}/results.jsonl has these figures; next: transformer-jax generate "
              f'--workdir={place}/best_model --prompt="..."')

    run(train_all)


def read_values(given: list[str]) -> dict[str, list[int | float]]:
    """Reads settings with their values.

    Args:
      given: Texts of the form NAME=VALUE,VALUE.

    Returns:
      The values of each setting.

    Raises:
      ValueError: If a text has another form, or a name is given twice.
    """
    found = {}
    for text in given:
        name, separator, numbers = text.partition("=")
        if not separator or not name:
            raise ValueError(f"--over={text} has no values; expected NAME=VALUE,VALUE, such as optim.peak_lr=1e-3,3e-3")
        if name in found:
            raise ValueError(f"--over={name} is given twice; write all its values in one flag, separated by commas")
        found[name] = [_number(name, number) for number in numbers.split(",")]
    return found


def _number(name: str, text: str) -> int | float:
    """Reads a number. Raises ValueError if the text is not one."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"--over={name} has the value {text!r}; expected numbers separated by commas")
    return value


if __name__ == "__main__":
    main()
