"""``--help`` lists every setting, and the console command finds its programs."""

import dataclasses
import pathlib
import re
import subprocess
import sys
import typing

import pytest

from transformer_jax.cli import __main__ as command
from transformer_jax.cli import help
from transformer_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig


def leaves(cls, prefix="config"):
    """The dotted names of all settings, found without the code under test."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", cls


@pytest.mark.parametrize("name", ["preflight", "train"])
def test_every_setting_is_listed_with_a_line_of_its_own(program, name):
    ended = program(name, "--config", "shakespeare_char", "--help")
    assert ended.status == 0
    for setting, _ in leaves(ExperimentConfig):
        assert re.search(rf"^  --{re.escape(setting)}  \(.+, default .+\)\n      \S", ended.out, re.M), setting
    assert "--config.steps  (int, default 2000)" in ended.out
    assert "--config.seed  (int, default 1337)" in ended.out, "the default is that of the named experiment"
    assert re.search(r"--config.optim.clip_norm  \(float \| None, default 1.0\)", ended.out)
    assert ended.out.index("--config.model: The architecture of a Transformer.") < ended.out.index("\n--config.data: ")


def test_the_help_of_a_program_without_settings(program):
    ended = program("generate", "--help")
    assert ended.status == 0 and ended.out.startswith("Continues a prompt with a trained model.")
    assert "--temperature  (0.8)\n      The sampling temperature; 0 takes the most probable token." in ended.out
    assert "--config" not in ended.out


def test_choices_are_those_of_the_checks():
    assert help.choices_of(OptimConfig, "name") == ["adamw", "adafactor", "lion", "sgd", "muon"]
    assert help.choices_of(OptimConfig, "gradient_dtype") == ["float32", "bfloat16"]
    assert "rope" in help.choices_of(ModelConfig, "positions") and help.choices_of(ModelConfig, "max_len") == []
    assert help.choices_of(DataConfig, "path") == []


def test_a_config_file_of_a_user_returns_the_dataclass(program, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from transformer_jax import recipes\n\n\ndef get_config():\n"
                    "    return recipes.get('shakespeare_char').replace(steps=7)\n")
    assert "--config.steps  (int, default 7)" in program("train", f"--config={path}", "--help").out
    ended = program("train", f"--config={path}", "--config.optim.peak_l=1")
    assert ended.error == "error: OptimConfig has no field 'peak_l'; did you mean 'peak_lr'?"
    assert program("train", f"--config={path}", "--config.steps=9").error.startswith("error: --workdir is missing")


@pytest.mark.parametrize(("arguments", "message"), [
    (["genrate"], "there is no program 'genrate'; did you mean 'generate'?; the programs are: train, sft, "),
])
def test_an_unknown_command(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["transformer-jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")


def test_every_program_of_the_package_has_a_command():
    with_main = {path.stem for path in pathlib.Path(help.__file__).parent.glob("*.py")
                 if re.search(r"^def main\(", path.read_text(), re.M)} - {"__main__"}
    assert with_main <= {name.replace("-", "_") for name in command.PROGRAMS}


def test_the_command_lists_its_programs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transformer-jax", "--help"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in command.PROGRAMS)


@pytest.mark.long
def test_a_reader_that_stops_early_ends_the_help_without_a_trace():
    command = f"{sys.executable} -m transformer_jax.cli train --help | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("Trains a model.") and ended.stdout.count("\n") == 1 and not ended.stderr
