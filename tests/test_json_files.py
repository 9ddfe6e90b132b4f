"""JSON from disk: for any content, an error is one line that names the file and the place."""

import json
from typing import Any, NotRequired, TypedDict

import pytest

from transformer_jax.json_files import parse_json, read_json, read_json_lines


class File(TypedDict):
    bytes: int
    note: NotRequired[str | None]


class Manifest(TypedDict):
    files: dict[str, File]
    rate: float


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.json"


GOOD = {"files": {"a": {"bytes": 2**60}, "b": {"bytes": 0, "note": None}}, "rate": 1, "further": [None]}


def test_values_of_the_expected_type_are_returned(path):
    path.write_text("\ufeff" + json.dumps(GOOD), "utf-8")
    assert read_json(path, Manifest) == GOOD
    # A length that means "no limit" in published files, and a loss before the first evaluation.
    path.write_text('["\\ud83d\\ude00"]')
    assert read_json(path, list[str]) == ["\U0001f600"]
    assert parse_json("[1000000000000000019884624838656, -Infinity]", path, list[float])[1] == -float("inf")


@pytest.mark.parametrize(("content", "message"), [
    ("", " is empty; expected a JSON object"),
    ("\0" * 40, ", line 1 is not JSON: Expecting value at column 1"),  # blocks that a crash left unwritten
    ('{"files":\n {"a"', ", line 2 is not JSON: Expecting ':' delimiter at column 6"),
    ("[1]", " is a list; expected a JSON object"),
    ("{}", " has no 'files'; found the keys []"),
    ({"files": 3}, ": files is 3; expected a JSON object"),
    ({"files": {"a": []}}, ": files.a is a list; expected a JSON object"),
    ({"files": {"a": {}}}, ": files.a has no 'bytes'; found the keys []"),
    ({"files": {"a": {"bytes": True}}}, ": files.a.bytes is true; expected a whole number"),
    ({"files": {"a": {"bytes": 1.5}}}, ": files.a.bytes is 1.5; expected a whole number"),
    ({"files": {"a": {"bytes": 1, "note": 4}}}, ": files.a.note is 4; expected text or null"),
    ({"rate": "x" * 100}, f': rate is "{"x" * 59}...; expected a number'),
    ("[" * 100_000, " has lists or objects nested more than 100 deep"),
    ('{"a":' * 200 + "1" + "}" * 200, " has lists or objects nested more than 100 deep"),
    (f'{{"rate": {"1" * 5000}}}', " holds the number 11111111111111111111..., which is too large"),
    ('{"rate": 1e999}', " holds the number 1e999..., which is too large"),
    (b'{"rate": "\xff"}', " is not UTF-8: byte offset 10: invalid start byte"),
    ('{"files": {"\\ud83d": {"bytes": 1}}, "rate": 1}', r" holds half a surrogate pair, \ud83d, which is no character"),
    ("{}".encode("utf-16"), " is not UTF-8: byte offset 0: invalid start byte"),
])
def test_values_of_another_type_are_named_with_their_place(path, content, message):
    if isinstance(content, dict):
        content = json.dumps(GOOD | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        read_json(path, Manifest)
    assert str(raised.value).startswith(f"{path}{message}") and "\n" not in str(raised.value)


def test_a_line_of_a_file_is_named_by_its_number(path):
    with pytest.raises(ValueError, match=r"some.json, line 7 is not JSON: .* at column 2"):
        parse_json("{,}\n", path, dict[str, Any], line=7)
    with pytest.raises(ValueError, match=r"some.json, line 7: a\[1\] is null; expected a whole number"):
        parse_json('{"a": [1, null]}', path, dict[str, list[int]], line=7)


@pytest.mark.filterwarnings("error")
def test_a_last_line_cut_short_is_left_out(path):
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    assert [line["step"] for line in read_json_lines(path, dict[str, Any])] == [1]
    path.write_text("")
    assert read_json_lines(path, dict[str, Any]) == []


def test_a_damaged_line_costs_only_itself_and_is_named(path):
    lines = ['{"step": 1}', "\0\0", '{"step": "2"}', "[3]", "[" * 100_000, '{"stop": 4}', '{"step": 5}', "\udcff"]
    path.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning) as warned:
        assert read_json_lines(path, dict[str, Any], numbers=["step"]) == [{"step": 1}, {"step": 5}]
    assert str(warned[0].message) == (
        f"damaged lines are left out: {path}, line 2 is not JSON: Expecting value at column 1; {path}, line 3 has no "
        f"number under the key 'step'; {path}, line 4 is a list; expected a JSON object; and 3 more lines")
