import json
import threading

import numpy as np
import pytest

from transformer_jax.data import TokenFile, Tokenizer, read_documents

DOCUMENTS = ["First document.\n", "", "The second, <|endoftext|> longer\tone.\n", "Third é\n"]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(DOCUMENTS, kind="char")


@pytest.fixture
def encoded(monkeypatch):
    """Counts how often a corpus is really encoded."""
    calls = []
    original = Tokenizer.encode_corpus
    monkeypatch.setattr(Tokenizer, "encode_corpus", lambda self, docs: calls.append(1) or original(self, docs))
    return calls


def expected(tok, documents):
    return [i for text in documents for i in [tok.end_of_text_id, *tok.encode(text)]]


def test_every_document_opens_with_end_of_text(tok, tmp_path):
    file = TokenFile.build(DOCUMENTS, tok, tmp_path / "made" / "on demand")
    assert file.tokens.tolist() == expected(tok, DOCUMENTS)
    assert file.tokens.dtype == np.uint16 and isinstance(file.tokens, np.memmap)
    assert file.num_documents == np.sum(file.tokens == tok.end_of_text_id) == 4
    assert file.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_the_same_content_is_tokenised_once(tok, tmp_path, encoded):
    first = TokenFile.build(DOCUMENTS, tok, tmp_path)
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    again = TokenFile.build(read_documents(text), Tokenizer.from_bytes(tok.to_bytes()), tmp_path)
    assert len(encoded) == 1
    assert again.tokens.filename == first.tokens.filename
    assert again.tokens.tolist() == first.tokens.tolist()
    assert (again.num_documents, again.num_bytes) == (first.num_documents, first.num_bytes)


def test_other_content_or_tokenizer_is_another_file(tok, tmp_path, encoded):
    other = Tokenizer.train(DOCUMENTS, kind="char", byte_fallback=True)
    joined = ["".join(DOCUMENTS[:2]), *DOCUMENTS[2:]]  # the same bytes with other document boundaries
    moved = [DOCUMENTS[0] + DOCUMENTS[2][0], "", DOCUMENTS[2][1:], DOCUMENTS[3]]
    names = {
        TokenFile.build(documents, tokenizer, tmp_path).tokens.filename
        for documents, tokenizer in [(DOCUMENTS, tok), (DOCUMENTS, other), (joined, tok), (moved, tok)]
    }
    assert len(names) == len(encoded) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "no tokens", "no description", "bad description"])
def test_damage_is_found_and_mended(tok, tmp_path, encoded, damage):
    file = TokenFile.build(DOCUMENTS, tok, tmp_path)
    (path,) = tmp_path.glob("*.bin")
    (description,) = tmp_path.glob("*.json")
    assert str(file.tokens.filename) == str(path)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
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
    assert TokenFile.build(DOCUMENTS, tok, tmp_path).tokens.tolist() == expected(tok, DOCUMENTS)
    assert len(encoded) == 2
    TokenFile.build(DOCUMENTS, tok, tmp_path)
    assert len(encoded) == 2
    assert path.read_bytes() == data


def test_interrupted_writing_leaves_nothing(tok, tmp_path, monkeypatch):
    def interrupted(self, documents):
        yield np.arange(5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_corpus", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TokenFile.build(DOCUMENTS, tok, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert TokenFile.build(DOCUMENTS, tok, tmp_path).tokens.tolist() == expected(tok, DOCUMENTS)


def test_writers_at_the_same_time_do_not_disturb_each_other(tok, tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(TokenFile.build(DOCUMENTS, tok, tmp_path).tokens.tolist()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected(tok, DOCUMENTS)] * 8
    assert len(list(tmp_path.iterdir())) == 2


def test_large_vocabularies_take_four_bytes(tmp_path):
    text = " ".join(f"w{i}" for i in range(70_000))
    tok = Tokenizer.train([text], kind="word")
    file = TokenFile.build([text], tok, tmp_path)
    assert file.tokens.dtype == np.uint32
    assert file.tokens.max() >= 1 << 16
    assert tok.decode(file.tokens) == text


def test_wrong_documents(tok, tmp_path):
    with pytest.raises(ValueError, match="another iterable, not an iterator"):
        TokenFile.build(iter(DOCUMENTS), tok, tmp_path)
    with pytest.raises(ValueError, match="no document"):
        TokenFile.build([], tok, tmp_path)


def test_one_document_is_cut_at_a_token(tok, tmp_path):
    file = TokenFile.build(["First document.\n" * 50], tok, tmp_path)
    train, validation = file.split(0.1)
    assert (len(train), len(validation)) == (720, 81)  # 801 tokens; 720 = int(801 * 0.9)
    assert np.concatenate([train, validation]).tolist() == file.tokens.tolist()


@pytest.mark.parametrize(("num_documents", "between"), [(19, False), (20, True), (31, True)])
def test_many_documents_are_cut_between_two(tok, tmp_path, num_documents, between):
    documents = [DOCUMENTS[0] * (1 + i * i % 7) for i in range(num_documents)]
    file = TokenFile.build(documents, tok, tmp_path)
    starts = np.cumsum([0, *(1 + len(text) for text in documents)])[1:-1]
    for fraction in (0.001, 0.1, 0.25, 0.5, 0.9, 0.99):
        train, validation = file.split(fraction)
        target = int(len(file.tokens) * (1 - fraction))
        cut = min(starts, key=lambda start: abs(start - target)) if between else target
        assert len(train) == cut
        assert (validation[0] == tok.end_of_text_id) or not between
        assert np.concatenate([train, validation]).tolist() == file.tokens.tolist()


def test_the_nearest_document_is_found_far_away(tok, tmp_path):
    file = TokenFile.build(["a", "b"] + ["c" * 300_000] * 18, tok, tmp_path)
    train, _ = file.split(0.5)
    assert len(train) in (4 + 8 * 300_001, 4 + 9 * 300_001)
    assert abs(len(train) - len(file.tokens) / 2) <= 150_001


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_wrong_fractions(tok, tmp_path, fraction):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        TokenFile.build(DOCUMENTS, tok, tmp_path).split(fraction)


def test_a_part_without_tokens(tok, tmp_path):
    with pytest.raises(ValueError, match="leaves a part empty"):
        TokenFile.build(["ab"], tok, tmp_path).split(0.9)
