import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data import LineRows, Tokenizer, read_documents, split_lines

LINES = ["the fox", "the quick brown fox jumps over the lazy dog", " a", "<mask> </s>", "dog\tdog", "o fim é aqui"]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(LINES * 3, kind="bpe", vocab_size=300)


def blocks(rows, tokenizer):
    """The lines of rows, token by token, read off by their segment ids alone."""
    found = []
    for tokens, segments in zip(rows.tokens.tolist(), rows.segment_ids.tolist(), strict=True):
        used = len([segment for segment in segments if segment])
        assert segments[:used] == sorted(segments[:used]) and set(segments[:used]) == set(range(1, max(segments) + 1))
        assert tokens[used:] == [tokenizer.pad_id] * (len(tokens) - used)
        for segment in range(1, max(segments) + 1):
            block = [token for token, s in zip(tokens, segments, strict=True) if s == segment]
            assert block[0] == tokenizer.bos_id and block[-1] == tokenizer.eos_id
            found.append(block[1:-1])
    return found


def test_lines_are_split_at_line_ends_only():
    train, validation = split_lines(["one\r\n\n two \u2028x\n \t\nthree\x0cthree\r", "four\nfive"], 0.4)
    assert (train, validation) == (["one", " two \u2028x", "three\x0cthree"], ["four", "five"])


@pytest.mark.parametrize(("num_lines", "fraction"), [(2, 0.5), (10, 0.1), (10, 0.19), (3445, 0.05), (100, 0.999)])
def test_the_last_fraction_of_the_lines_is_held_out(num_lines, fraction):
    lines = [str(i) for i in range(num_lines)]
    documents = ["\n".join(lines[: num_lines // 3]), "\n\n".join(lines[num_lines // 3 :])]
    if int(num_lines * (1 - fraction)):
        train, validation = split_lines(iter(documents), fraction)
        assert train + validation == lines
        assert len(train) == int(num_lines * (1 - fraction))
    else:
        with pytest.raises(ValueError, match="leaves a part empty"):
            split_lines(documents, fraction)


def test_wrong_splits():
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            split_lines(["a\nb"], fraction)
    for documents in ([], ["\n \n"], ["a"]):
        with pytest.raises(ValueError, match=r"validation_fraction=0.1 of \d lines leaves a part empty"):
            split_lines(documents, 0.1)


@pytest.mark.parametrize("length", [3, 4, 7, 16, 64])
def test_every_token_is_in_a_row_once(tok, length):
    rows = LineRows.build(LINES, tok, length)
    assert rows.tokens.shape == rows.segment_ids.shape == (len(rows), length)
    assert rows.num_lines == len(LINES)
    expected = []
    for line in LINES:
        ids = tok.encode(line)
        expected += [ids[start : start + length - 2] for start in range(0, len(ids), length - 2)]
    assert sorted(blocks(rows, tok)) == sorted(expected)


def test_any_lines_come_back(tok):
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), st.integers(3, 20))
    def check(lines, length):
        rows = LineRows.build(lines, tok, length)
        found = blocks(rows, tok)
        assert sorted(t for block in found for t in block) == sorted(t for line in lines for t in tok.encode(line))
        assert rows.segment_ids.astype(bool).sum() == sum(len(block) + 2 for block in found)

    check()


def test_short_lines_share_a_row_and_long_ones_continue(tok):
    fox = tok.encode("the fox")
    rows = LineRows.build(["the fox", "the fox"], tok, 2 * len(fox) + 5)
    wrapped = [tok.bos_id, *fox, tok.eos_id]
    assert rows.tokens.tolist() == [[*wrapped, *wrapped, tok.pad_id]]
    assert rows.segment_ids.tolist() == [[1] * len(wrapped) + [2] * len(wrapped) + [0]]

    long = tok.encode(LINES[1])
    rows = LineRows.build([LINES[1]], tok, 7)
    assert [token for block in blocks(rows, tok) for token in block] == long
    assert len(rows) == -(-len(long) // 5)


def test_names_of_special_tokens_are_text_and_empty_lines_nothing(tok):
    rows = LineRows.build(["", "<mask></s>", ""], tok, 32)
    (block,) = blocks(rows, tok)
    assert tok.decode(block) == "<mask></s>"
    assert tok.mask_id not in rows.tokens
    assert rows.num_lines == 3


def test_rows_are_taken_one_or_many_at_a_time(tok):
    rows = LineRows.build(LINES * 5, tok, 16)
    indices = np.array([2, 0, len(rows) - 1, 2])
    for name, array in rows[indices].items():
        assert array.dtype == np.int32 and array.shape == (4, 16)
        assert array.tolist() == [rows[i][name].tolist() for i in indices]
    assert set(rows[0]) == {"tokens", "segment_ids"} and rows[0]["tokens"].shape == (16,)
    assert rows.tokens.dtype == np.uint16 and rows.segment_ids.dtype == np.uint8
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_digest_tells_content_apart(tok):
    digest = LineRows.build(LINES, tok, 16).digest
    assert len(digest) == 64
    assert LineRows.build(tuple(LINES), Tokenizer.from_bytes(tok.to_bytes()), 16).digest == digest
    others = [(LINES, 17), (LINES[:-1], 16), (LINES[::-1], 16), ([*LINES[:-1], "o fim e aqui"], 16)]
    assert len({digest, *(LineRows.build(lines, tok, length).digest for lines, length in others)}) == 5
    # The same tokens in a row, but with other line boundaries.
    rows = LineRows.build(LINES, tok, 64)
    assert LineRows(rows.tokens, np.ones_like(rows.segment_ids), len(LINES)).digest != rows.digest




def test_a_large_vocabulary_takes_four_bytes():
    words = [f"w{i}" for i in range(70_000)]
    tok = Tokenizer.train([" ".join(words)], kind="word")
    rows = LineRows.build(words[-2:], tok, 8)
    assert rows.tokens.dtype == np.uint32
    assert sorted(map(tok.decode, blocks(rows, tok))) == sorted(words[-2:])


def test_wrong_rows(tok):
    with pytest.raises(ValueError, match="length=2 must be at least 3"):
        LineRows.build(LINES, tok, 2)
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="no line of text"):
            LineRows.build(nothing, tok, 8)


def test_a_book_fills_its_rows(corpora):
    path = corpora / "machado_books" / "dom_casmurro.txt"
    if not path.exists():
        pytest.skip(f"no book at {path}")
    train, validation = split_lines(read_documents(path), 0.05)
    paragraphs = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    assert train + validation == paragraphs
    tok = Tokenizer.train(train, vocab_size=4000)
    rows = LineRows.build(train, tok, 128)
    assert len(blocks(rows, tok)) >= len(train)
    assert sum(map(len, blocks(rows, tok))) == sum(len(tok.encode(line)) for line in train)
    assert np.mean(rows.segment_ids > 0) > 0.98
