"""Comparisons and prompts from files."""

import json

import pytest

from transformer_jax.data import Comparison, Message, read_comparisons, read_prompts

ASKED = (Message("user", "Say something."),)


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_a_plain_text_is_the_message_of_the_user():
    comparison = Comparison("Say something.", ["good", "bad"])
    assert comparison == Comparison(ASKED, ("good", "bad"), None) and hash(comparison)
    assert comparison.prompt == ASKED and comparison.responses == ("good", "bad")


@pytest.mark.parametrize(("arguments", "message"), [
    (("a?", ["one"]), "at least 2 responses, got 1"),
    (("a?", ["one", "one"]), "responses 1 and 2 are equal: 'one'"),
    (("a?", ["one", "two", "one"]), "responses 1 and 3 are equal"),
    (("a?", ["one", " "]), "response 2: the message of the assistant is empty"),
    (("a?", ["one", "two"], [1]), "1 ranks for 2 responses"),
    (("a?", ["one", "two"], [2, 1]), r"ranks \[2, 1\] must not decrease"),
    (("", ["one", "two"]), "the message of the user is empty"),
    (((*ASKED, Message("assistant", "x")), ["one", "two"]), "a prompt must end with the user"),
])
def test_bad_comparisons(arguments, message):
    with pytest.raises(ValueError, match=message):
        Comparison(*arguments)


def test_every_form_of_a_comparison(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Say something.", "chosen": "good", "rejected": "bad"},
        {"prompt": "Say something.", "responses": ["best", "good", "bad"]},
        {"instruction": "Say something.", "responses": ["bad", "best", "good"], "ranks": [3, 1, 2]},
        {"messages": [{"role": "user", "content": "Say something."}], "responses": ["b", "a", "c"], "ranks": [2, 1, 2]},
    )
    assert read_comparisons(path) == [
        Comparison(ASKED, ("good", "bad")),
        Comparison(ASKED, ("best", "good", "bad")),
        Comparison(ASKED, ("best", "good", "bad"), (1, 2, 3)),
        Comparison(ASKED, ("a", "b", "c"), (1, 2, 2)),
    ]


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "a?", "chosen": "same", "rejected": "same"}, "line 1: responses 1 and 2 are equal: 'same'"),
    ({"prompt": "a?", "chosen": "good", "rejected": ""}, "line 1: response 2: the message of the assistant is empty"),
    ({"prompt": "a?", "chosen": "good"}, "line 1: no text under the key 'rejected'"),
    ({"prompt": "a?", "response": "good"}, "line 1: no list of texts under the key 'responses'"),
    ({"prompt": "a?", "responses": ["good"]}, "line 1: a comparison needs at least 2 responses"),
    ({"prompt": "a?", "responses": ["a", "b"], "ranks": [1]}, r"line 1: ranks \[1\] are not 2 integers"),
    ({"prompt": "a?", "responses": ["a", "b"], "ranks": [1, 1.5]}, r"line 1: ranks \[1, 1.5\] are not 2 integers"),
    ({"chosen": "good", "rejected": "bad"}, "line 1: found the keys"),
    ({"prompt": "a?", "responses": ["b", "c"], "scores": [0.1, 0.9]}, "line 1: `scores` are not read"),
])
def test_bad_records_are_named_by_their_line(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        read_comparisons(write(tmp_path / "a.jsonl", record))


def test_prompts(tmp_path):
    messages = [{"role": "user", "content": "Say something."}]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Say something."},
        {"instruction": "Say something.", "input": "", "output": "no"},
        {"messages": messages},
        {"messages": [*messages, {"role": "assistant", "content": "no"}]},
    )
    assert read_prompts(path) == [ASKED] * 4
    (tmp_path / "a.txt").write_text("Say something.\r\n\nSay something.\n")
    assert read_prompts(tmp_path / "a.txt") == [ASKED] * 2
    (tmp_path / "b.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="nothing but blank lines"):
        read_prompts(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="line 1: a prompt must end with the user"):
        read_prompts(write(tmp_path / "c.jsonl", {"messages": [{"role": "assistant", "content": "no"}]}))


def test_real_prompts(corpora):
    assert len(read_prompts(corpora / "faquad" / "dev.jsonl")) == 63
