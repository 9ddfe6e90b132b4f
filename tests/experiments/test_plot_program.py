"""The program that draws the losses of runs."""

import json
import re

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def runs(tmp_path):
    for name, factor in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": factor / step} for step in range(1, 101)]
        lines += [{"step": step, "validation_loss": factor / step + 0.125} for step in (50, 100)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_several_runs_in_one_picture(program, runs):
    ended = program("plot", runs / "a", f"{runs}/b/", "--out", runs / "pictures" / "two.svg", "--title=both")
    assert ended.status == 0 and ended.out == f"{runs}/pictures/two.svg: open it in an image viewer\n"
    words = re.findall(r"<!-- (.*?) -->", (runs / "pictures" / "two.svg").read_text())
    assert [word for word in words if str(runs) in word] == [
        f"{runs}/a training", f"{runs}/a validation (0.135)", f"{runs}/b training", f"{runs}/b validation (0.145)"]
    assert {"both", "step", "loss (nats)"} <= set(words)


def test_a_power_law_is_a_straight_line_on_logarithmic_axes(program, runs):
    """Along the curve of 1 / step, rows of pixels fall evenly with columns."""
    out = runs / "one.png"
    assert program("plot", runs / "a" / "metrics.jsonl", f"--out={out}", "--log_steps", "--log_loss").status == 0
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    curve = np.abs(pixels - (0x9E, 0xCA, 0xE1)).sum(-1) < 20
    columns = np.flatnonzero(curve.any(0))[20:-150]  # without the ends and the legend
    rows = np.array([np.flatnonzero(curve[:, column]).mean() for column in columns])
    fit = np.polyval(np.polyfit(columns, rows, 1), columns)
    assert len(columns) > 200 and np.abs(rows - fit).max() < 2


def test_runs_that_cannot_be_drawn_end_with_one_line(program, runs):
    (runs / "empty").mkdir()
    (runs / "new").mkdir()
    (runs / "new" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    (runs / "negative").mkdir()
    (runs / "negative" / "metrics.jsonl").write_text('{"step": 1, "loss": -1.0}\n')
    for arguments, message in (
            ([], "no run is named; pass one or more workdirs: transformer-jax plot runs/a runs/b"),
            ([runs / "none"], f"there is no directory {runs}/none"),
            ([runs / "empty"], f"{runs}/empty has no metrics.jsonl; expected a workdir that a training program "
             "wrote"),
            ([runs / "new"], f"{runs}/new/metrics.jsonl contains no loss that is a finite number, so that "
             "there is nothing to plot"),
            ([runs / "negative", "--log_loss"],
             f"{runs}/negative/metrics.jsonl contains losses of 0 or less, which a logarithmic axis cannot show; leave "
             "log_loss out"),
            ([runs / "a", f"--out={runs}/x.gif"], f"cannot save a figure as {runs}/x.gif; the name of the "
             "file must end in .png or .svg"),
            ([runs / "a", "--out="], "--out is empty: name a file that ends in .png or .svg"),
            ([runs / "a", f"--oot={runs}/x.png"], "Unknown command line flag 'oot'. Did you mean: out ?")):
        assert program("plot", *arguments).error == f"error: {message}"
