"""Masked language modelling on a mixture that the flags name."""

import json

import pytest

import transformer_jax as tj

SMALL = ["--config=book_mlm", "--config.steps=2", "--config.log_every=2", "--config.batch_size=8",
         "--config.model.num_layers=1", "--config.model.num_heads=2", "--config.model.model_dim=16",
         "--config.model.mlp_dim=16", "--config.model.max_len=24", "--config.data.tokenizer.kind=char",
         "--config.data.tokenizer.vocab_size=None", "--config.data.tokenizer.min_frequency=1",
         "--config.sample.every=0",
         "--config.data.validation_fraction=0.1"]


@pytest.mark.long
def test_flags_name_a_mixture(program, tmp_path):
    (tmp_path / "cats.txt").write_text("the cat sat\non the mat\n" * 30)
    (tmp_path / "digits.jsonl").write_text('{"text": "3 1 4 1 5\\n9 2 6 5 3"}\n' * 20)
    mixture = f"(('cats', '{tmp_path}/cats.txt', 3.0), ('digits', '{tmp_path}/digits.jsonl', 1.0))"
    ended = program("train", *SMALL, f"--workdir={tmp_path / 'run'}", f"--config.data.mixture={mixture}")
    assert ended.status == 0, ended
    assert [line.split()[:2] for line in ended.out.splitlines()[1:3]] == [["cats", "75.00%"], ["digits", "25.00%"]]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    line = {name: value for line in lines for name, value in line.items()}
    assert line["validation_loss"] == pytest.approx(
        0.75 * line["validation_loss_cats"] + 0.25 * line["validation_loss_digits"])
    assert line["epochs_cats"] > 0 and line["tokens_cats"] == pytest.approx(3 * line["tokens_digits"], rel=0.3)
    assert tj.evaluate(tj.load(tmp_path / "run"), batch_size=8)["lines"] == 6 + 4


@pytest.mark.parametrize(("mixture", "message"), [
    ("(('a', 'b', 1.0), 'c')", "DataConfig.mixture has the entry 'c'; expected (name, path, weight)"),
    ("(('a', 'b', 1), ('a', 'c', 2))", "data.mixture has the name 'a' twice; give every corpus its own name"),
    ("(('a', 'none.txt', 1),)", "no text file at 'none.txt'"),
])
def test_a_wrong_mixture_is_one_line(program, tmp_path, mixture, message):
    ended = program("train", *SMALL, f"--workdir={tmp_path / 'run'}", f"--config.data.mixture={mixture}")
    assert message in ended.error and not (tmp_path / "run").exists()
