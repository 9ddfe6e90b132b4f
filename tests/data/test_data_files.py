"""The content of a file, and not its name, decides how it is read; a file that is not text is
refused in one line."""

import gzip
import json
import pickle

import pytest
from absl import logging

from transformer_jax.data import (
    Message,
    read_comparisons,
    read_demonstrations,
    read_documents,
    read_pairs,
    read_prompts,
)
from transformer_jax.data.files import read_lines

DOCUMENTS = ["one\ntwo", "três"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
ASKED = (Message("user", "why?"),)
RECORD = {"prompt": "why?", "response": "so", "chosen": "so", "rejected": "no"}
READERS = {
    "documents": lambda path: list(read_documents(path)), "pairs": lambda path: list(read_pairs(str(path))),
    "demonstrations": read_demonstrations, "comparisons": read_comparisons, "prompts": read_prompts,
}


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        data = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
        return path

    return write


@pytest.mark.parametrize("layout", [None, 1])
def test_a_list_of_objects_is_json_by_any_name(write, layout):
    records = [{"text": "a"}, {"text": "b"}]
    for name in ("a.txt", "corpus", "a.txt.gz"):
        assert list(read_documents(write(name, json.dumps(records, indent=layout)))) == ["a", "b"]
    for prose in ("[ a bracket\nand more", '[{"text": "a"}, said the file\n', "[1, 2]"):
        assert list(read_documents(write("b.txt", prose))) == [prose]
    pairs = json.dumps([{"source": "a", "target": "b"}], indent=layout)
    assert list(read_pairs(str(write("pairs.txt", pairs)))) == [("a", "b")]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.Jsonl", "a.ndjson", "a.json", "a.JSON", "a.jsonl.gz",
                                  "a.JSONL.GZ", "a.json.gz", "a.txt", "a", "a.txt.gz", "part-00000"])
@pytest.mark.parametrize("encode", [
    lambda text: text, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"), lambda text: text.rstrip("\n")], ids=["lf", "bom", "crlf", "cr", "no end"])
def test_json_lines_by_any_name(write, name, encode):
    assert list(read_documents(write(name, encode(LINES)))) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz", "a.jsonl"])
@pytest.mark.parametrize("documents", [DOCUMENTS, [{"text": text} for text in DOCUMENTS]], ids=["texts", "objects"])
def test_a_list_of_documents(write, name, documents):
    assert list(read_documents(write(name, json.dumps(documents, indent=1)))) == DOCUMENTS


def test_compressed_text_and_text_in_capitals(write):
    text = "a\n<|endoftext|>\nb\n"
    for name in ("a.txt.gz", "a.TXT.GZ", "A.TXT", "a.gz"):
        assert list(read_documents(write(name, text))) == ["a\n", "b\n"]
    path = write("hidden.txt", gzip.compress(text.encode()))  # compressed, and its name does not say so
    assert list(read_documents(path)) == list(read_documents(path)) == ["a\n", "b\n"]


def test_carriage_returns_end_the_lines_of_separators(write):
    assert list(read_documents(write("a.txt", "a\r<|endoftext|>\rb\r"))) == ["a\r", "b\r"]


def test_json_that_is_no_text_is_read_as_it_is_and_reported(write, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    dump = '{"a": 1}\n{"a": 2}\n'
    assert list(read_documents(write("a.txt", dump))) == [dump]
    assert "found the keys ['a']; it is read as plain text, since they have no text under the key 'text'" in warnings[0]
    prose = '{"text": 1} is JSON\nand this is not\n'
    assert list(read_documents(write("b.txt", prose))) == [prose] and len(warnings) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.jsonl.gz", "a.json", "a.txt", "a.txt.gz"])
def test_examples_by_any_name(write, name):
    path = write(name, f"{json.dumps(RECORD)}\n" * 2)
    assert read_demonstrations(path) == [(*ASKED, Message("assistant", "so"))] * 2
    assert [comparison.responses for comparison in read_comparisons(path)] == [("so", "no")] * 2
    assert read_prompts(path) == [ASKED] * 2


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz"])
def test_prompts_by_any_name(write, name):
    assert read_prompts(write(name, "why?\r\n\nwhy?")) == read_prompts(write(name, "why?\rwhy?\r")) == [ASKED] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSON", "a.jsonl.gz", "a.tsv"])
def test_pairs_in_json(write, name):
    records = [{"source": "a", "target": "b"}, {"translation": {"source": "c", "target": "d", "fr": "e"}}]
    path = write(name, "".join(f"{json.dumps(record)}\n" for record in records))
    assert list(read_pairs(str(path))) == [("a", "b"), ("c", "d")]
    path = write(name, json.dumps([{"translation": {"en": "a", "pt": "b"}}]))
    if name != "a.tsv":
        assert list(read_pairs(str(path), source="en", target="pt")) == [("a", "b")]
        with pytest.raises(ValueError, match=r"object 1 has no text under the key 'source'; found the keys \['en', 'p"):
            read_pairs(str(path))


PARQUET = b"PAR1\x15\x04\x15" + b"\0" * 20 + b"PAR1"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.parquet", PARQUET, "is a Parquet table; write its texts as JSON lines"),
    ("a.jsonl", PARQUET, "is a Parquet table"),
    ("a.txt", "déjà".encode("utf-16"), "is UTF-16 text; convert it with: iconv -f UTF-16"),
    ("a.jsonl", LINES.encode("utf-16"), "is UTF-16 text"),
    ("a.txt", "déjà".encode("utf-32"), "is UTF-32 text"),
    ("a.docx", b"PK\x03\x04" + b"\0" * 30, "is a zip archive"),
    ("a.txt.bz2", b"BZh91AY&SY", "is a bzip2 file; only gzip files are decompressed"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00", "is a zstd file"),
    ("a.pdf", b"%PDF-1.7\n", "is a PDF file"),
    ("a.json", "", "is empty"),
    ("a.json.gz", "", "is empty"),
    ("a.ndjson", b"\xef\xbb\xbf", "is empty except for a byte order mark"),
    ("a.csv", "prompt,response\nwhy?,so\n", "(is named like a table|is a CSV file by its name|neither a .jsonl file)"),
])
def test_files_that_are_not_text_raise_one_line_errors(write, reader, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", ["documents", "demonstrations", "comparisons", "prompts", "pairs"])
@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": ', "line 2 is not JSON"),
    ("[" * 100_000, "line 2 has lists or objects nested"),
    ('{"prompt": ' + "1" * 5000 + "}", "line 2 holds the number 1111.*too large"),
    ('{"prompt": 1e999}', "line 2 holds the number 1e999"),
    ("3", "line 2 is 3; expected a JSON object"),
    ("null", "line 2 is null; expected a JSON object"),
    ('["a", "b"]', "line 2 is a list; expected a JSON object"),
    ("{}", r"line 2.* found the keys \[\]"),
    ('{"a": null}', r"line 2.* found the keys \['a'\]"),
    ('{"prompt": {"a": 1}, "text": 3, "messages": 4, "source": []}', "line 2"),
    ("\x00", "has a NUL character at byte offset"),
])
def test_damaged_lines_are_named(write, reader, line, message):
    good = RECORD | {"text": "a", "source": "a", "target": "b"}
    path = write("a.jsonl", f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_pickle_is_never_loaded(write):
    path = write("a.jsonl", pickle.dumps(["text"]))
    for reader in READERS.values():
        with pytest.raises(ValueError, match=r"a\.jsonl"):
            reader(path)


def test_aligned_files_are_plain_text(write):
    plain, table = write("a.en", "a\n"), write("a.jsonl", '{"source": "a"}\n')
    with pytest.raises(ValueError, match="hold sentences a line; a TSV file or one of JSON has both sides"):
        read_pairs(f"{plain},{table}")


def test_lines_of_an_old_macintosh(write):
    assert list(read_lines(write("a", "one\rtwo"))) == ["one\r", "two"]
    assert list(read_lines(write("a", "one\rtwo\n"))) == ["one\rtwo\n"]
