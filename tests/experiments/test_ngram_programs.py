"""The programs for n-grams and for the table of the next token."""

import re

import pytest

from transformer_jax.baselines import load_ngrams


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the rat sat on the hat\n" * 40)
    return path


def test_ngrams_are_counted_measured_and_saved(program, text, tmp_path):
    ended = program("ngrams", f"--data={text}", "--order=3", f"--workdir={tmp_path / 'model'}", "--max_new_tokens=20",
                    "--prompt=the ")
    assert ended.status == 0, ended
    rows = re.findall(r"^ +(\d) +([\d,]+) +([\d.]+) +([\d.]+)$", ended.out, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    perplexities = [float(row[2]) for row in rows]
    assert perplexities == sorted(perplexities, reverse=True) and perplexities[2] < 2 < perplexities[0]
    assert all(f"--- order {order} ---\nthe " in ended.out for order in (1, 2, 3))
    model = load_ngrams(tmp_path / "model")
    held_out = text.read_text()[-200:]
    assert model.order == 3 and model.measure([held_out])["perplexity"] < 2

    picture = tmp_path / "next.png"
    ended = program("next_token", f"--workdir={tmp_path / 'model'}", "--text=the ", "--top=3", f"--figure={picture}")
    assert ended.status == 0 and len(re.findall(r"^  0\.\d{4}  #", ended.out, re.MULTILINE)) == 3, ended
    assert picture.stat().st_size > 1000
    ended = program("next_token", f"--workdir={tmp_path / 'model'}", "--text=the ", "--step=3")
    assert "--step=3 selects a checkpoint" in ended.error


def test_the_next_token_of_a_decoder(program, gpt):
    ended = program("next_token", f"--workdir={gpt}", "--text=the k", "--top=2")
    assert ended.status == 0 and len(ended.out.splitlines()) == 2, ended
    assert "--text is missing" in program("next_token", f"--workdir={gpt}").error


@pytest.mark.parametrize(("flags", "message"), [
    (["--order=7"], "order=7 must be a whole number from 1 to 5"),
    (["--tokenizer=bpe"], "--tokenizer=bpe needs --vocab_size"),
    (["--tokenizer=nowhere.model"], "--tokenizer=nowhere.model is neither char"),
    (["--validation_fraction=2"], "validation_fraction must lie between 0 and 1"),
])
def test_wrong_flags(program, text, tmp_path, flags, message):
    assert message in program("ngrams", f"--data={text}", f"--workdir={tmp_path / 'model'}", *flags).error
    assert "--data is missing" in program("ngrams", f"--workdir={tmp_path}").error
