import builtins
import json
import sys

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data import read_documents, read_tfds

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "corpus.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def warnings(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    return warnings


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("no newline at the end", ["no newline at the end"]),
        ("a\n\nb\n", ["a\n\nb\n"]),
        ("a\n<|endoftext|>\nb\n", ["a\n", "b\n"]),
        ("<|endoftext|>\na\n<|endoftext|>\n<|endoftext|>\nb<|endoftext|>", ["a\n", "b<|endoftext|>"]),
        ("a\n<|endoftext|>", ["a\n"]),
        ("a\r\n<|endoftext|>\r\nb\r\n", ["a\r\n", "b\r\n"]),
        ("a <|endoftext|>\n<|endoftext|> \n <|endoftext|>\n", ["a <|endoftext|>\n<|endoftext|> \n <|endoftext|>\n"]),
        ("<|endoftext|><|endoftext|>\n", ["<|endoftext|><|endoftext|>\n"]),
    ],
)
def test_separator_lines_part_documents(write, content, documents):
    assert list(read_documents(write(content))) == documents


def test_any_documents_come_back(tmp_path):
    line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r\ufeff"), max_size=20)
    document = st.lists(line.filter(lambda line: line != SEPARATOR), min_size=1).map(lambda ls: "\n".join(ls) + "\n")

    @settings(max_examples=200, deadline=None)
    @given(st.lists(document, min_size=1))
    def check(documents):
        path = tmp_path / "corpus.txt"
        path.write_bytes(f"{SEPARATOR}\n".join(documents).encode())
        assert list(read_documents(path)) == documents

    check()


def test_documents_can_be_read_again(write):
    documents = read_documents(write("a\n<|endoftext|>\nb\n"))
    assert list(documents) == list(documents) == ["a\n", "b\n"]


def test_directories_and_globs_in_order(write, tmp_path):
    for name in ("b.txt", "a.txt", ".hidden", "c.jsonl"):
        write('{"text": "c"}\n' if name == "c.jsonl" else name, f"corpus/{name}")
    write("deep", "corpus/deeper.txt")
    (tmp_path / "corpus" / "sub").mkdir()
    write("deep", "corpus/sub/d.txt")
    (tmp_path / "corpus" / "deeper.txt").unlink()
    assert list(read_documents(tmp_path / "corpus")) == ["a.txt", "b.txt", "c"]
    assert list(read_documents(tmp_path / "corpus" / "*.txt")) == ["a.txt", "b.txt"]
    assert list(read_documents(str(tmp_path / "corpus" / "**" / "*.txt"))) == ["a.txt", "b.txt", "deep"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(write):
    assert list(read_documents(write("text", "a[1].txt"))) == ["text"]


@pytest.mark.parametrize("name", ["nothing.txt", "*.nothing", "empty_directory"])
def test_nothing_to_read(tmp_path, name):
    (tmp_path / "empty_directory").mkdir()
    with pytest.raises(ValueError, match=r"no text file at .*expected a file"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_empty_files(write, name, content):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        list(read_documents(write(content, name)))


def test_nothing_but_separators(write):
    with pytest.raises(ValueError, match="nothing but"):
        list(read_documents(write("<|endoftext|>\n<|endoftext|>")))


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", "déjà\n<|endoftext|>\n".encode() * 3])
def test_wrong_bytes_are_placed(write, prefix):
    path = write(prefix + b"abc\xe9 def")
    with pytest.raises(ValueError, match=rf"{path} is not UTF-8: byte offset {len(prefix) + 3}:"):
        list(read_documents(path))
    path = write(prefix + b"abc\0 def")
    with pytest.raises(ValueError, match=rf"{path} has a NUL character at byte offset {len(prefix) + 3};"):
        list(read_documents(path))
    path = write(b'{"text": "x"}\n{"text": "\xff"}\n', "corpus.jsonl")
    with pytest.raises(ValueError, match=f"{path} is not UTF-8: byte offset 24:"):
        list(read_documents(path))


def test_byte_order_mark_is_left_out_and_reported(write, warnings):
    assert list(read_documents(write(b"\xef\xbb\xbf<|endoftext|>\na\xef\xbb\xbf\n"))) == ["a\ufeff\n"]
    assert list(read_documents(write(b'\xef\xbb\xbf{"text": "a"}', "corpus.jsonl"))) == ["a"]
    assert len(warnings) == 2 and all("byte order mark" in warning for warning in warnings)


def test_crlf_is_kept_and_reported_once(write, warnings):
    documents = read_documents(write(b"a\r\n<|endoftext|>\r\nb\r\n"))
    assert list(documents) == list(documents) == ["a\r\n", "b\r\n"]
    assert len(warnings) == 1 and "CRLF" in warnings[0]


def test_jsonl(write):
    records = [{"text": "one\ntwo", "other": "x"}, {"text": SEPARATOR, "other": "\U0001f98a"}]
    path = write("".join(json.dumps(record) + "\n" for record in records), "corpus.jsonl")
    assert list(read_documents(path)) == ["one\ntwo", SEPARATOR]
    assert list(read_documents(path, key="other")) == ["x", "\U0001f98a"]


def test_blank_lines_of_jsonl_are_skipped(write):
    """So do ``pandas.read_json(lines=True)`` and ``jq``."""
    path = write('\n{"text": "a"}\n\n  \r\n{"text": "b"}\n\n', "corpus.jsonl")
    assert list(read_documents(path)) == ["a", "b"]
    with pytest.raises(ValueError, match="corpus.jsonl has nothing but blank lines"):
        list(read_documents(write("\n \n", "corpus.jsonl")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": }\n', "line 2 is not JSON: .* column 10"),
        ('{"txt": "x", "id": 3}\n', r"line 2 has no text under the key 'text'; found the keys \['id', 'txt'\]"),
        ('{"text": 3}\n', "line 2 has no text under the key 'text'"),
        ('["text"]\n', "line 2 is a list; expected a JSON object"),
        ('{"text": "ab\\u0000"}\n', "line 2 has a NUL character at character 2"),
        ('{"text": "ab\\ud83d"}\n', "line 2 has half a surrogate pair at character 2"),
    ],
)
def test_wrong_jsonl_lines_are_placed(write, line, message):
    path = write('{"text": "fine"}\n' + line + '{"text": "fine"}\n', "corpus.jsonl")
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        list(read_documents(path))


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """A TFDS data set, built here and read as one prepared on disk, without its builder's code."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS data sets need: pip install tensorflow-datasets")
    directory = tmp_path_factory.mktemp("tfds")

    class TinyPlaysOfTheTest(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"text": tfds.features.Text(), "act": tfds.features.Scalar(np.int32)}
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(["First Citizen:\né\n", "<|endoftext|>"])}

        def _generate_examples(self, texts):
            for act, text in enumerate(texts):
                yield act, {"text": text, "act": act}

    TinyPlaysOfTheTest(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_tfds(plays):
    documents = read_tfds("tiny_plays_of_the_test", data_dir=plays)
    assert sorted(documents) == sorted(documents) == sorted(["First Citizen:\né\n", "<|endoftext|>"])
    assert len(list(read_tfds("tiny_plays_of_the_test", "train[:50%]", plays))) == 1
    assert "tensorflow" not in sys.modules


def test_tfds_errors(plays):
    with pytest.raises(ValueError, match=r"'tiny_plays_of_the_test', example 0 has no text under the key 'play'"):
        list(read_tfds("tiny_plays_of_the_test", data_dir=plays, key="play"))
    with pytest.raises(ValueError, match=r"'nosuch', cannot be read .* Unknown split 'nosuch'"):
        read_tfds("tiny_plays_of_the_test", "nosuch", plays)
    with pytest.raises(ValueError, match=r"'train\[:0%\]', cannot be read"):
        read_tfds("tiny_plays_of_the_test", "train[:0%]", plays)
    with pytest.raises(ValueError, match=r"no_such_data_set.*cannot be read or prepared") as caught:
        read_tfds("no_such_data_set", data_dir=plays)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["DownloadError", "NotImplementedError", "ModuleNotFoundError"])
def test_tfds_that_cannot_be_prepared(plays, monkeypatch, kind):
    import tensorflow_datasets as tfds

    error = tfds.download.DownloadError if kind == "DownloadError" else getattr(builtins, kind)

    def unprepared(*args, **kwargs):
        raise error("The reason\nand much more")

    monkeypatch.setattr(tfds, "data_source", unprepared)
    with pytest.raises(ValueError, match=r"'tiny_shakespeare'.* cannot be read or prepared in .*: The reason$"):
        read_tfds("tiny_shakespeare", data_dir=plays)


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        read_tfds("tiny_shakespeare")
