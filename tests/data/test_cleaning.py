"""Cleaning a corpus: which texts it removes, and that it ends with the same bytes wherever it was
stopped."""

import json
import pathlib
import random

import pytest

from transformer_jax.data import Cleaning, QualityClassifier, clean_corpus, cleaning, deduplicate, read_documents

pytest.importorskip("datasketch", reason="near duplicates need the extra 'corpus'")
pytest.importorskip("sklearn", reason="the quality filter needs the extra 'corpus'")

GOOD = ["the river ran in the morning light", "she answered the letter from the house"]
BAD = ["click here buy cheap offer", "cheap offer click now buy"]


def documents():
    """30 texts; 5 exact duplicates, 5 near ones, 10 that the quality filter scores low."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(" ".join(GOOD).split(), k=60)) for _ in range(30)]
    near = [f"{text} and one more" for text in texts[5:10]]
    bad = [" ".join(draw.choices(BAD[0].split(), k=40)) + f" {number}" for number in range(10)]
    return [*texts, *texts[:5], *near, *bad]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "corpus.jsonl", documents())
    write(folder / "good.jsonl", GOOD * 5)
    write(folder / "bad.jsonl", BAD * 5)
    return Cleaning(folder / "corpus.jsonl", good=folder / "good.jsonl", bad=folder / "bad.jsonl")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "new"
    return clean_corpus(files, output), output


def contents(folder: pathlib.Path):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_counts_are_those_of_the_steps_one_by_one(files, whole):
    report, output = whole
    texts = documents()
    equal = {text: texts.index(text) for text in texts}
    first = [number for number, text in enumerate(texts) if equal[text] == number]
    classifier = QualityClassifier.train(GOOD * 5, BAD * 5)
    good = [n for n in first if cleaning.is_kept(float(classifier([texts[n]])[0]), n)]
    kept = [good[index] for index in deduplicate([texts[number] for number in good]).kept]
    assert list(read_documents(output / "corpus.jsonl")) == [texts[number] for number in kept]
    assert report.documents == {"read": 50, "exact": 5, "quality": len(first) - len(good),
                                "near": len(good) - len(kept), "kept": len(kept)}
    assert report.documents["quality"] >= 5 and report.documents["near"] >= 1
    assert report.bytes["read"] == sum(len(text.encode()) for text in texts)
    assert report.bytes["kept"] == sum(len(texts[number].encode()) for number in kept)
    assert sum(report.documents[name] for name in ("exact", "quality", "near", "kept")) == 50
    example = report.examples[0]
    assert example["step"] == "exact" and texts[example["document"]] == texts[example["of"]]
    assert all(texts[example["document"]].startswith(example["text"]) and example["text"]
               for example in report.examples)
    assert {example["step"] for example in report.examples} == {"exact", "quality", "near"}
    assert "exact duplicates            5   10.00%" in str(report) and "near duplicates: document" in str(report)
    assert json.loads((output / "report.json").read_text())["documents"] == report.documents
    assert not list(output.glob("*.partial"))


class Power(Exception):
    """The process ends here."""


def test_a_cleaning_that_stops_anywhere_continues_to_the_same_bytes(files, whole, tmp_path, monkeypatch):
    """It is stopped at every 67th reading of a document, and a part of a record is left behind."""
    reads = [0]
    read = cleaning.read_documents

    class Stopping:
        def __init__(self, texts):
            self._texts = texts

        def __iter__(self):
            for text in self._texts:
                reads[0] += 1
                if reads[0] % 67 == 0:
                    raise Power
                yield text

    monkeypatch.setattr(cleaning, "read_documents", lambda path, key: Stopping(read(path, key=key)) if
                        str(path) == files.data else read(path, key=key))
    stops = 0
    while not (tmp_path / "report.json").exists():
        try:
            report = clean_corpus(files, tmp_path)
        except Power:
            stops += 1
            for partial in tmp_path.glob("*.partial"):
                with partial.open("ab") as stream:
                    stream.write(b"hal")
    assert stops >= 3
    assert report == whole[0] and contents(tmp_path) == contents(whole[1])
    assert clean_corpus(files, tmp_path) == report  # a finished cleaning returns its report again


def test_the_filter_can_be_left_out(files, tmp_path):
    report = clean_corpus(Cleaning(files.data), tmp_path)
    assert report.documents["quality"] == 0 and report.documents["exact"] == 5
    assert not (tmp_path / "quality.npz").exists()


def test_a_corpus_that_changed_since_the_first_start_is_refused(files, tmp_path):
    data = tmp_path / "data.jsonl"
    texts = documents()
    for changed in (texts[:-1], [*texts, "new"], ["new", *texts[1:]]):
        write(data, texts)
        output = tmp_path / str(len(changed)) / changed[0][:3]
        clean_corpus(Cleaning(data), output)
        (output / "report.json").unlink()
        write(data, changed)
        with pytest.raises(ValueError, match=r"document \d+ of .* is not the one that was there at the first start"):
            clean_corpus(Cleaning(data), output)
    with pytest.raises(ValueError, match=r"another cleaning|other settings: threshold: 0.8 -> 0.5; use another"):
        clean_corpus(Cleaning(data, threshold=0.5), output)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(good="a"), "needs both good and bad examples, but got good='a' and bad=None"),
    (dict(threshold=0.0), r"threshold=0.0 must be in \(0, 1\]"),
    (dict(seed=-1), "seed=-1 must not be negative"),
])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Cleaning("x", **settings)
