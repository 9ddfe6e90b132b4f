"""The page on objectives, data, optimizers, hooks and loggers runs as it stands."""

import pathlib
import re

import jax
import pytest

import transformer_jax as tj

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending" / "training.md"


@pytest.mark.long
def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    assert len(blocks) == 7 and scope["bundle"].step == 4
    printed = capsys.readouterr().out
    assert "4 loss " in printed and printed.rstrip().endswith("done")
    assert tj.tasks.get("reversed") is scope["Reversed"]
    assert all(bool((abs(leaf) < 1e6).all()) for leaf in jax.tree.leaves(scope["state"].params))
