"""The programs that train several models together: their output, resume, and errors."""

import json

import pytest

import transformer_jax as tj
from transformer_jax.training.leaves import tree_digest

SETTINGS = ("--config.steps=4", "--config.batch_size=4", "--config.model.max_len=16", "--config.model.model_dim=16",
            "--config.model.num_heads=2", "--config.model.num_layers=1", "--config.model.unroll=1",
            "--config.optim.warmup_steps=1", "--config.eval.batch_size=4", "--config.sample.every=0")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 60)
    return f"--config.data.path={path}"


@pytest.mark.long
def test_a_sweep_from_the_command_line(program, text, tmp_path):
    workdir = tmp_path / "sweep"
    ended = program("sweep", "--config=shakespeare_char", text, f"--workdir={workdir}", *SETTINGS,
                    "--over=optim.peak_lr=1e-3,1e-2", "--over=seed=1")
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:1] == ["model"])
    assert lines[head].split() == ["model", "optim.peak_lr", "seed", "loss", "validation_loss", "skipped"]
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["validation_loss"])
    assert lines[head + 1].split()[:2] == [str(best["model"]), f"{best['optim.peak_lr']:.5g}"]
    assert f"--workdir={workdir}/best_model" in ended.out
    weights = tree_digest(tj.load(workdir / "best_model").model)
    again = program("sweep", f"--workdir={workdir}")  # its config, values and data are in the record
    assert again.status == 0 and tree_digest(tj.load(workdir / "best_model").model) == weights


def test_errors_of_the_sweep_end_in_one_line(program, text, tmp_path):
    def error(*arguments):
        return program("sweep", "--config=shakespeare_char", text, f"--workdir={tmp_path / 'new'}", *arguments).error

    assert "--over=seed has no values" in error("--over=seed")
    assert "--over=seed has the value 'one'; expected numbers separated by commas" in error("--over=seed=one")
    assert "--over=seed is given twice" in error("--over=seed=1", "--over=seed=2")
    assert "model.num_layers cannot differ between the models of a sweep" in error("--over=model.num_layers=1,2")
    assert "values=None must be a dict" in error()
    assert not (tmp_path / "new").exists()
    assert "--workdir is missing" in program("sweep", "--config=shakespeare_char", text, "--over=seed=1").error


@pytest.mark.long
def test_the_scaling_study_fits_and_compares(program, text, tmp_path):
    small = ("--config.steps=3", "--config.batch_size=4", "--config.model.max_len=16", "--config.model.num_layers=1",
             "--config.model.unroll=1", "--config.optim.warmup_steps=1", "--config.eval.batch_size=4", "--head_dim=4")
    sizes, rates = tmp_path / "sizes", tmp_path / "rates"
    ended = program("scaling", text, *small, f"--workdir={sizes}", "--widths=4,8,12,16", "--seeds=3")
    assert ended.status == 0, ended.err
    assert "fits to drawn seeds have the exponent" in ended.out and (sizes / "scaling.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (sizes / "results.jsonl").read_text().splitlines()]
    assert [row["width"] for row in rows[::3]] == [4, 8, 12, 16] and len({row["parameters"] for row in rows}) == 4
    assert set(json.loads((sizes / "fit.json").read_text())) == {"floor", "scale", "exponent"}
    ended = program("scaling", text, *small, f"--workdir={rates}", "--widths=4,8", "--seeds=1", "--mup=4",
                    "--over=optim.peak_lr=1e-3,1e-1")
    assert ended.status == 0, ended.err
    assert "width 8: the best optim.peak_lr is" in ended.out and (rates / "rates.png").exists()
    assert tj.load(rates / "width_8" / "best_model").config.mup == tj.config.MupConfig(base_dim=4)


def test_a_width_that_heads_do_not_divide(program, text, tmp_path):
    ended = program("scaling", text, f"--workdir={tmp_path / 'new'}", "--widths=10")
    assert ended.error == "error: --widths has '10'; expected multiples of --head_dim=16"
