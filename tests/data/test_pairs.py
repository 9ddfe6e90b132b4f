import collections
import gzip
import itertools
import json
import sys

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data import (
    PackedPairs,
    Pairs,
    Tokenizer,
    make_batches,
    pair_evaluation_batches,
    read_pairs,
    read_tfds_pairs,
)

PAIRS = [
    ("A dog runs.", "Ein Hund rennt."),
    ("Two men.", "Zwei Männer."),
    ("A very long sentence about a dog that runs.", "Ein Satz."),
    ("Short.", "Ein sehr langer Satz über einen Hund, der rennt."),
    ("A dog runs.", "Ein Hund rennt."),
    ("<|endoftext|> a </s>\tb", "<pad> é \u2581 <s>"),
]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([text for pair in PAIRS for text in pair], kind="char", byte_fallback=True)


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        data = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def two(source, target) -> str:
    return f"{source},{target}"


# Reading


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_two_files(write, suffix):
    path = two(write(f"a.en{suffix}", "A dog.\n Two \u00a0men.\u3000\n"), write(f"a.de{suffix}", "Ein Hund.\r\nZwei"))
    pairs = read_pairs(path)
    assert list(pairs) == list(pairs) == [("A dog.", "Ein Hund."), ("Two \u00a0men.", "Zwei")]
    assert (len(pairs), pairs.num_read, pairs.num_empty) == (2, 2, 0)
    assert pairs.report() == "2 pairs read, 0 of them left out because a side is empty"


def test_only_line_feeds_end_lines(write):
    odd = "a\u2028b\x85c\x0bd\x0ce\rf"
    assert list(read_pairs(two(write("s", f"{odd}\nx\n"), write("t", "1\n2\n")))) == [(odd, "1"), ("x", "2")]


def test_pairs_with_an_empty_side_are_counted(write):
    source = write("s", "a\n\n \t\nd\n\ne\n")
    target = write("t", "1\n2\n\n\n5\n6\n")
    pairs = read_pairs(two(source, target))
    assert list(pairs) == [("a", "1"), ("e", "6")]
    assert (pairs.num_read, pairs.num_empty) == (6, 4)


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "with,comma.tsv"])
def test_tsv(write, name):
    path = write(name, '"A" dog\tEin \\t Hund\tUm cão\r\n b \t\tc\n')
    assert list(read_pairs(str(path))) == [('"A" dog', "Ein \\t Hund")]
    assert list(read_pairs(str(path), target="2")) == [('"A" dog', "Um cão"), ("b", "c")]
    assert list(read_pairs(str(path), source="2", target="0")) == [("Um cão", '"A" dog'), ("c", "b")]
    assert read_pairs(str(path)).num_empty == 1


def test_byte_order_marks_are_left_out_and_reported_once(write, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    pairs = read_pairs(two(write("s", "\ufeffa\n\ufeffb\n"), write("t", "1\n2\n")))
    assert list(pairs) == [("a", "1"), ("\ufeffb", "2")]
    assert len(warnings) == 1 and "byte order mark" in warnings[0]


@pytest.mark.parametrize(("source", "target", "counts"), [("a\nb\nc\n", "1\n", (3, 1)), ("a\n", "1\n2\n\n", (1, 3))])
def test_other_numbers_of_lines(write, source, target, counts):
    source, target = write("s.gz", source), write("t", target)
    with pytest.raises(ValueError, match=rf"{source} has {counts[0]} lines and {target} has {counts[1]}; expected as"):
        read_pairs(two(source, target))


def test_files_that_cannot_be_read(write, tmp_path):
    good = write("good", "a\n")
    for path, message in [
        (str(tmp_path / "none.tsv"), r"no file at '.*none\.tsv'; expected SOURCE_FILE,TARGET_FILE or a TSV"),
        (two(good, tmp_path / "none"), r"no file at '.*none'"),
        (two(good, ""), "no file at '.'"),
        (two(good, tmp_path), "no file at"),
        ("a,b,c,d", "'a,b,c,d' names 4 files; expected SOURCE_FILE,TARGET_FILE"),
        (two(write("empty", ""), good), "empty is empty; expected UTF-8 text"),
        (two(good, write("empty.gz", "")), r"empty\.gz is empty"),
        (two(write("blank", "\n"), good), "no pair of sentences: 1 were read, 1 of them with an empty side"),
        (two(good, write("latin", b"a\n\xff")), "latin is not UTF-8: byte offset 2: invalid start byte"),
        (two(good, write("latin.gz", "\ufeffé\n".encode() + b"a\xff")), r"latin\.gz is not UTF-8: byte offset 7:"),
        (two(good, write("marked", b"\xef\xbb\xbfa\xff\n")), "marked is not UTF-8: byte offset 4:"),
        (str(write("nul.tsv", b"a\tb\nc\td\0\n")), r"nul\.tsv has a NUL character at byte offset 7"),
        (str(write("few.tsv", "a\tb\nc\n")), r"few\.tsv, line 2 has 1 tab-separated columns; expected at least 2"),
        (str(good), "good, line 1 has 1 tab-separated columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_pairs(path)


def test_broken_gzip(write, tmp_path):
    good = write("good", "a\n")
    for name, data in [("not.gz", b"a\n"), ("cut.gz", gzip.compress(b"a\n" * 999)[:-9]),
                       ("bad.gz", gzip.compress(b"a\n")[:10] + b"\xff" * 20)]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be decompressed: "):
            read_pairs(two(good, tmp_path / name))


def test_wrong_columns(write):
    path = write("a.tsv", "a\tb\n")
    with pytest.raises(ValueError, match="target='de' is not a column of a TSV file; expected a number"):
        read_pairs(str(path), target="de")
    with pytest.raises(ValueError, match=r"line 1 has 2 tab-separated columns; expected at least 4, .* column 3"):
        read_pairs(str(path), source="3")
    with pytest.raises(ValueError, match="source='0' and target=None are columns of a TSV file, but .* names two"):
        read_pairs(two(path, path), source="0")


def test_pairs_of_a_list():
    pairs = Pairs([(" a", "b "), ("", "c")])
    assert list(pairs) == [("a", "b")] and pairs.num_read == 2 and pairs.num_empty == 1
    with pytest.raises(ValueError, match="another iterable, not an iterator"):
        Pairs(iter([("a", "b")]))
    with pytest.raises(ValueError, match="no pair of sentences: 0 were read"):
        len(Pairs([]))


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    """A TFDS translation set, built here and read as one prepared on disk, without its builder's
    code."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS data sets need: pip install tensorflow-datasets")
    directory = tmp_path_factory.mktemp("tfds")

    class TinyTranslateOfTheTest(tfds.core.GeneratorBasedBuilder):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="de-en", version="1.0.0")]  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=["de", "en"]))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, (english, german) in enumerate([*PAIRS[:4], ("Nothing.", " ")]):
                yield index, {"en": english, "de": german}

    TinyTranslateOfTheTest(data_dir=directory, config="de-en", file_format="array_record").download_and_prepare()
    return directory


def test_tfds(translations, tok):
    name = "tiny_translate_of_the_test/de-en"
    pairs = read_tfds_pairs(name, "train", source="en", target="de", data_dir=translations)
    assert sorted(pairs) == sorted(pairs) == sorted(PAIRS[:4])
    assert (pairs.num_read, pairs.num_empty) == (5, 1)
    other_way = read_tfds_pairs(name, "train", source="de", target="en", data_dir=translations)
    assert sorted(other_way) == sorted((target, source) for source, target in PAIRS[:4])
    assert unpacked(PackedPairs.build(pairs, tok, 64, 64), tok) == collections.Counter(PAIRS[:4])
    assert "tensorflow" not in sys.modules


def test_tfds_errors(translations, monkeypatch):
    name = "tiny_translate_of_the_test/de-en"
    pairs = read_tfds_pairs(name, "train", source="en", target="fr", data_dir=translations)
    with pytest.raises(ValueError, match=r"de-en', example 0 has no text under the key 'fr'; found the keys \['de'"):
        list(pairs)
    with pytest.raises(ValueError, match="'nosuch', cannot be read"):
        read_tfds_pairs(name, "nosuch", source="en", target="de", data_dir=translations)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        read_tfds_pairs(name, "train", source="en", target="de")


# Packing


def unpacked(rows: PackedPairs, tok: Tokenizer) -> collections.Counter:
    """The pairs in rows, read token by token; fails where a row is not as it is documented."""
    found = collections.Counter()
    for index in range(len(rows)):
        row = {name: array[0] for name, array in rows[np.array([index])].items()}
        assert row["source"].shape == row["source_segment_ids"].shape == (rows.source_length,)
        assert row["weights"].dtype == np.float32
        assert all(row[name].dtype == np.int32 for name in row if name != "weights")
        assert row["weights"].tolist() == [float(segment != 0) for segment in row["segment_ids"]]
        sides = []
        for name in ("source", "targets", "tokens"):
            segments = row["source_segment_ids" if name == "source" else "segment_ids"]
            groups = itertools.groupby(zip(segments, row[name], strict=True), key=lambda place: place[0])
            numbers, sentences = zip(*((number, [token for _, token in part]) for number, part in groups), strict=True)
            if numbers[-1] == 0:  # padding, at the end only
                assert not any(sentences[-1])
                numbers, sentences = numbers[:-1], sentences[:-1]
            assert list(numbers) == list(range(1, len(numbers) + 1))
            sides.append(sentences)
        for source, target, shifted in zip(*sides, strict=True):
            assert source[-1] == target[-1] == tok.eos_id and shifted == [tok.bos_id, *target[:-1]]
            found[tok.decode(source[:-1]), tok.decode(target[:-1])] += 1
    return found


def test_rows_hold_exactly_the_pairs(tok):
    rows = PackedPairs.build(PAIRS, tok, 64, 64)
    assert unpacked(rows, tok) == collections.Counter(PAIRS)
    assert (rows.num_read, rows.num_pairs, rows.num_empty, rows.num_overlong) == (6, 6, 0, 0)
    assert len(rows) < len(PAIRS)


def test_any_pairs_come_back(tok):
    sentence = st.text(st.sampled_from("ADEHMSZaeimn. é\u2581\t"), max_size=14)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(sentence, sentence), max_size=40), st.integers(3, 12), st.integers(3, 24))
    def check(pairs, source_length, target_length):
        pairs = [("A", "E"), *pairs]
        rows = PackedPairs.build(pairs, tok, source_length, target_length)
        stripped = [(source.strip(), target.strip()) for source, target in pairs]
        full = [pair for pair in stripped if all(pair)]
        fitting = [(s, t) for s, t in full if len(tok.encode(s)) < source_length and len(tok.encode(t)) < target_length]
        assert unpacked(rows, tok) == collections.Counter(fitting)
        assert rows.num_empty == len(pairs) - len(full) and rows.num_overlong == len(full) - len(fitting)

    check()


def test_the_length_counts_the_end(tok):
    pair = [("abc", "Hund")]
    tok = Tokenizer.train([*pair[0]], kind="char")
    assert PackedPairs.build(pair, tok, 4, 5).num_pairs == 1
    for lengths in [(3, 5), (4, 4)]:
        with pytest.raises(ValueError, match=r"none of 1 pairs fits a row: .* source has 4 .* target 5, "):
            PackedPairs.build(pair, tok, *lengths)


def test_summary():
    pairs = [("abc", "de"), ("ab", "d"), ("", "x"), ("abcabcabcabc", "d")] * 1000
    tok = Tokenizer.train(["abcdex"], kind="char")
    rows = PackedPairs.build(pairs, tok, 7, 7)  # two pairs make 7 + 5 tokens: a row with 2 free
    assert rows.summary() == ("4,000 pairs, 1,000 with an empty side, 1,000 longer than 7 tokens left out, 1,000 rows, "
                              "86 % full")
    assert "longer than 7 and 9 tokens" in PackedPairs.build(pairs, tok, 7, 9).summary()


def test_many_rows_at_once_are_each_alone(tok):
    rows = PackedPairs.build(PAIRS, tok, 60, 70)
    indices = np.array([len(rows) - 1, 0, 0])
    for name, array in rows[indices].items():
        assert array.tolist() == [rows[np.array([i])][name][0].tolist() for i in indices]
    for wrong in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[np.array([0, wrong])]


def test_wrong_arguments(tok):
    with pytest.raises(ValueError, match="source_length=0"):
        PackedPairs.build(PAIRS, tok, 0, 4)
    with pytest.raises(ValueError, match="not an iterator"):
        PackedPairs.build(iter(PAIRS), tok, 4, 4)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        pair_evaluation_batches(PackedPairs.build(PAIRS, tok, 64, 64), 0)


def test_large_vocabularies_take_four_bytes(tmp_path):
    words = " ".join(f"w{i}" for i in range(70_000))
    tok = Tokenizer.train([words], kind="word")
    pairs = [("w0 w69999 w1", "w0 w2 w69998"), ("w0 w65536", "w0 w65535")]
    for cache_dir in (None, tmp_path):
        rows = PackedPairs.build(pairs, tok, 8, 8, cache_dir)
        assert rows.source_tokens.dtype == np.uint32 and rows.source_tokens.max() >= 1 << 16
        assert unpacked(rows, tok) == collections.Counter(pairs)


def test_training_batches_hold_every_row_once(tok):
    rows = PackedPairs.build(PAIRS * 4, tok, 64, 64)
    batches = list(make_batches(rows, batch_size=2, seed=1, num_epochs=2))
    found = np.concatenate([batch["source"] for batch in batches]).tolist()
    assert sorted(found) == sorted(rows[np.arange(len(rows))]["source"].tolist() * 2)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_evaluation_batches(tok, batch_size):
    rows = PackedPairs.build(PAIRS, tok, 64, 64)
    batches = list(pair_evaluation_batches(rows, batch_size))
    assert len(batches) == -(-len(rows) // batch_size)
    for name, expected in rows[np.arange(len(rows))].items():
        assert all(batch[name].shape == (batch_size, expected.shape[1]) for batch in batches)
        joined = np.concatenate([batch[name] for batch in batches])
        assert joined.dtype == expected.dtype
        assert joined[: len(rows)].tolist() == expected.tolist() and not joined[len(rows) :].any()


# The file


@pytest.fixture
def encoded(monkeypatch):
    """Counts how often a corpus is really encoded."""
    calls = []
    original = Tokenizer.encode_corpus
    monkeypatch.setattr(Tokenizer, "encode_corpus", lambda self, docs: calls.append(1) or original(self, docs))
    return calls


def contents(rows: PackedPairs) -> list:
    return [array.tolist() for array in rows[np.arange(len(rows))].values()]


def test_the_same_pairs_are_tokenised_once(tok, tmp_path, encoded, write):
    in_memory = PackedPairs.build(PAIRS[:5], tok, 64, 64)
    first = PackedPairs.build(PAIRS[:5], tok, 64, 64, tmp_path / "made" / "here")
    files = two(write("s.gz", "".join(f"{source}\n" for source, _ in PAIRS[:5])),
                write("t", "".join(f"{target}\n" for _, target in PAIRS[:5])))
    same_tok = Tokenizer.from_bytes(tok.to_bytes())
    again = PackedPairs.build(read_pairs(files), same_tok, 64, 64, tmp_path / "made" / "here")
    assert len(encoded) == 2
    assert contents(first) == contents(again) == contents(in_memory)
    assert first.digest == again.digest == in_memory.digest and first.summary() == again.summary()
    assert isinstance(again.source_tokens, np.memmap) and again.source_tokens.dtype == np.uint16


def test_the_digest_depends_on_everything_that_decides_the_rows(tok, tmp_path):
    other = Tokenizer.train([text for pair in PAIRS for text in pair], kind="char")
    swapped = [pair[::-1] for pair in PAIRS]
    moved = [("A dog runs.E", "in Hund rennt."), *PAIRS[1:]]
    built = [
        PackedPairs.build(pairs, tokenizer, *lengths, tmp_path)
        for pairs, tokenizer, lengths in [
            (PAIRS, tok, (64, 64)), (PAIRS[:-1], tok, (64, 64)), (swapped, tok, (64, 64)), (moved, tok, (64, 64)),
            (PAIRS, other, (64, 64)), (PAIRS, tok, (64, 65)), (PAIRS, tok, (65, 64)), (PAIRS[::-1], tok, (64, 64)),
        ]
    ]
    assert len({rows.digest for rows in built}) == len(list(tmp_path.glob("*.bin"))) == len(built)


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "no tokens", "no description", "bad description"])
def test_damage_is_found_and_mended(tok, tmp_path, encoded, damage):
    PackedPairs.build(PAIRS, tok, 64, 64, tmp_path)
    (path,) = tmp_path.glob("*.bin")
    (description,) = tmp_path.glob("*.json")
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "truncate":
        path.write_bytes(data[:-2])
    elif damage == "extend":
        path.write_bytes(data + b"\0\0")
    elif damage == "no tokens":
        path.unlink()
    elif damage == "no description":
        description.unlink()
    else:
        description.write_text("{")
    assert unpacked(PackedPairs.build(PAIRS, tok, 64, 64, tmp_path), tok) == collections.Counter(PAIRS)
    assert len(encoded) == 2 and path.read_bytes() == data and json.loads(description.read_bytes())["size"] == len(data)


# Real corpora


def test_multi30k(corpora, tmp_path):
    folder = corpora / "multi30k"
    pairs = read_pairs(two(folder / "val.en.gz", folder / "val.de.gz"))
    tok = Tokenizer.train([text for pair in pairs for text in pair], vocab_size=2000)
    rows = PackedPairs.build(pairs, tok, 48, 48, tmp_path)
    assert pairs.num_read == 1014
    fitting = [pair for pair in pairs if all(len(tok.encode(text)) < 48 for text in pair)]
    assert unpacked(rows, tok) == collections.Counter(fitting)
    assert rows.num_overlong == len(pairs) - len(fitting) > 0
    num_tokens = sum(len(tok.encode(text)) + 1 for pair in fitting for text in pair)
    assert num_tokens > 0.85 * len(rows) * 96


def test_tatoeba(corpora):
    path = str(corpora / "pt_en_tatoeba" / "test.tsv")
    pairs = list(read_pairs(path, source="1", target="0"))
    assert len(pairs) == 662
    assert ("Uma língua é um dialeto com um exército e uma marinha.",
            "A language is a dialect with an army and a navy.") in pairs
