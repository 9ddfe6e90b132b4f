"""Runs all code blocks of docs/inspection.md in order, and checks the shapes in their comments. It
runs with the long tests, as the guides do."""

import contextlib
import pathlib
import re

import numpy as np
import pytest

from transformer_jax.training.loggers import JsonlLogger

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "inspection.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SHAPES = re.compile(r"^(\w+) = .*# (\([\d, ]*\))$", re.MULTILINE)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The variables that the page's blocks define, and the folder that they write to."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "runs" / "shakespeare"
    run.mkdir(parents=True)
    metrics = JsonlLogger(run)
    for step in (100, 200):
        metrics.write(step, {"self_attention/induction": np.full((3, 4), 1 / step)})
    metrics.close()
    names, shapes = {}, []
    with contextlib.chdir(folder):
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
            shapes += [(name, shape, np.shape(names[name])) for name, shape in SHAPES.findall(block)]
    return names | {"shapes": shapes, "folder": folder}


def test_every_answer_is_short():
    assert len(BLOCKS) > 15
    for block in BLOCKS:
        assert len(block.strip().splitlines()) < 10, block
        assert max(map(len, block.splitlines())) <= 120


@pytest.mark.long
def test_the_shapes_are_those_of_the_comments(values):
    assert len(values["shapes"]) >= 20
    for name, documented, shape in values["shapes"]:
        assert str(shape) == documented, name


@pytest.mark.long
def test_the_values_on_the_page_are_right(values):
    assert values["inspected"].tokens[1] == " Mary" and values["pair"].tokens == ["<s>", "When", " Mary", " went"]
    np.testing.assert_allclose(values["logit"], values["tj"].forward(values["model"], values["ids"])[0, -1][
        values["answer"]], atol=1e-4)
    assert set(values["scores"]) == {"entropy", "distance", "sink", "previous_token", "diagonal", "duplicate_token",
                                     "induction"}
    assert set(values["values"]) == {*values["scores"], "loss"}
    assert list(values["words"]) == ["When", " Mary", " went", "(next)"]
    assert (values["folder"] / "maps.html").stat().st_size > 10_000 and (values["folder"] / "maps.png").exists()
    assert values["figure"].axes[0].get_ylabel() == "induction"
    assert values["known"][-1, 0, 0] <= 0 and values["guesses"][-1][0] in values["tokenizer"].pieces(
        range(values["tokenizer"].vocab_size))
    assert all(np.isfinite(values[name]).all() for name in ("blind", "steered", "result", "effect", "direct", "table"))
