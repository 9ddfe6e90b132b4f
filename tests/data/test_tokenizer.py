import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformer_jax.data import StreamDecoder, Tokenizer, sentencepiece_runs
from transformer_jax.data.sentencepiece_training import KINDS, SPECIAL_TOKENS

SHARED = Path(os.environ.get("TRANSFORMER_JAX_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXT = topics["for"] + topics["import"] + "\tIndented  twice,   thrice; déjà vu - naïve café!\r\nThe fox.\n" * 9
VOCAB_SIZES = {"char": None, "word": None, "bpe": 420, "unigram": 420}
NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "a\nb\n\nc\r\nd\re\t\tf\n",
    "caf\u00e9 cafe\u0301 \ufb01 \u2460",  # NFC, NFD, and characters that NFKC would change
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e7\U0001f1f7",
    "\u202b\u05e9\u05dc\u05d5\u05dd \u0639\u0644\u064a\u202c",  # right to left
    "\u2581 \u2581\u2581 a\u2581b\u2581",
    "\u2047 x\u2047\u2047",
    "\0 a\0",
    "\ufeff\ufffd\u2585\u0085\u2028\u00a0\u3000",
    "<pad><s></s><unk><mask><|endoftext|><0x41>",
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        kind: Tokenizer.train([TEXT], kind=kind, vocab_size=VOCAB_SIZES[kind], byte_fallback=True) for kind in KINDS
    }


@pytest.fixture(scope="module")
def plain_char() -> Tokenizer:
    return Tokenizer.train([TEXT], kind="char")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first_and_are_no_text(tokenizers, kind):
    tok = tokenizers[kind]
    ids = [tok.pad_id, tok.bos_id, tok.eos_id, tok.unk_id, tok.mask_id, tok.end_of_text_id]
    assert ids == list(range(6))
    assert [tok.id_to_piece(i) for i in ids] == list(SPECIAL_TOKENS)
    assert [tok.piece_to_id(name) for name in SPECIAL_TOKENS] == ids
    assert tok.decode_bytes([0, 1, 2, 4, 5]) == b""
    assert tok.vocab_size == (VOCAB_SIZES[kind] or tok.vocab_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [TEXT, *NASTY])
def test_round_trip_of_nasty_texts(tokenizers, kind, text):
    tok = tokenizers[kind]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()
    assert tok.byte_lengths[ids].sum() == len(text.encode())
    assert not set(ids) & set(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_any_unicode(tokenizers, kind):
    tok = tokenizers[kind]
    anything = st.text(st.characters(exclude_categories=["Cs"]))
    ours = st.lists(st.sampled_from([" ", "\n", "\t", "\u2581", "fox", " fox", "\u2047", "é", "e\u0301", "\0"]))

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(anything, ours.map("".join)))
    @example("zq fox\u2581zq  zq")
    def check(text):
        assert tok.decode(tok.encode(text)) == text

    check()


def test_without_spaces_in_the_vocabulary_spaces_still_round_trip():
    tok = Tokenizer.train(["日本語テスト" * 3], kind="bpe", vocab_size=269)
    with pytest.raises(ValueError, match="no piece"):
        tok.piece_to_id("\u2581")
    assert tok.decode(tok.encode("日本 語\u2581 テ")) == "日本 語\u2581 テ"


def test_tinyshakespeare_has_65_characters():
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"no corpus at {path}; set TRANSFORMER_JAX_DATA")
    text = path.read_text(encoding="utf-8")
    tok = Tokenizer.train([text], kind="char")
    assert tok.vocab_size == 65 + 6
    assert {tok.decode([i]) for i in range(6, 71)} == set(text)
    ids = tok.encode(text)
    assert len(ids) == len(text) == 1_115_394
    assert tok.decode(ids) == text


def test_char_maps_what_it_never_saw_to_unk(plain_char):
    assert plain_char.vocab_size == 6 + len(set(TEXT))
    ids = plain_char.encode("a日b\u2581c")
    assert [i == plain_char.unk_id for i in ids] == [False, True, False, True, False]
    assert plain_char.decode(ids) == "a\ufffdb\ufffdc"
    assert plain_char.pieces(ids) == ["a", "<unk>", "b", "<unk>", "c"]


def test_rare_characters_get_a_token():
    tok = Tokenizer.train(["a" * 100_000 + "é"], kind="char")
    assert tok.decode(tok.encode("éa")) == "éa"


def test_indentation_is_learnt():
    tok = Tokenizer.train(["def f():\n        return\n" * 20], kind="bpe", vocab_size=285)
    assert len(tok.encode(8 * " " + "return")) <= 5


def test_char_with_a_limit_keeps_the_most_frequent():
    tok = Tokenizer.train(["aaaabbbccd"], kind="char", vocab_size=8)
    assert tok.vocab_size == 8
    assert tok.decode(tok.encode("abcd")) == "ab\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_text_cannot_inject_control_tokens_unless_allowed(tokenizers, kind):
    tok = tokenizers[kind]
    text = "fox<mask>\n<|endoftext|></s><s><pad><unk>"
    assert not set(tok.encode(text)) & set(range(6))
    allowed = tok.encode(text, allow_special=True)
    newline = tok.encode("\n")
    assert allowed == [*tok.encode("fox"), tok.mask_id, *newline, tok.end_of_text_id, tok.eos_id, tok.bos_id, 0, 3]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_control_names_in_the_training_text_are_text(kind):
    text = "<mask> <unk> <s> </s> <pad> <|endoftext|> <0x4B>\n" * 20
    tok = Tokenizer.train([text], kind=kind, vocab_size=None if kind == "char" else 290)
    for char in set(text):
        assert tok.unk_id not in tok.encode(char)
        assert len(tok.encode(char)) == 1
    assert tok.decode(tok.encode(text)) == text


def test_pieces_are_what_a_reader_sees(tokenizers):
    tok = tokenizers["bpe"]
    assert "".join(tok.pieces(tok.encode("the quick\nfox"))) == "the quick\nfox"
    assert tok.pieces(tok.encode("日")) == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert tok.pieces([tok.mask_id]) == ["<mask>"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(tokenizers, kind):
    again = Tokenizer.train(iter([TEXT]), kind=kind, vocab_size=VOCAB_SIZES[kind], byte_fallback=True)
    assert again.to_bytes() == tokenizers[kind].to_bytes()


def test_training_does_not_depend_on_the_process(tokenizers):
    program = (
        "import sys; from transformer_jax.data import Tokenizer;"
        "print(Tokenizer.train([sys.argv[1]], kind='unigram', vocab_size=420).digest)"
    )
    path = [str(Path(__file__).parents[2]), *sys.path]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, TEXT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in "12"
    }
    assert digests == {tokenizers["unigram"].digest}


def test_saved_pickled_and_loaded(tokenizers, tmp_path):
    tok = tokenizers["bpe"]
    tok.save(tmp_path / "tok.model")
    for copy in (
        Tokenizer.load(tmp_path / "tok.model"),
        Tokenizer.from_bytes(tok.to_bytes()),
        pickle.loads(pickle.dumps(tok)),
    ):
        assert copy.digest == tok.digest == hashlib.sha256(tok.to_bytes()).hexdigest()
        assert copy.encode(TEXT) == tok.encode(TEXT)


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
def test_long_lines_are_cut_where_it_makes_no_difference(tokenizers, kind):
    line = TEXT.replace("\n", " ").replace("\r", " ").replace("\t", "   ") * 3 + ("fox" + 8 * " ") * 2000
    assert len(line) > 8 * 4096
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizers[kind].to_bytes())
    whole, ours = model.encode(line), tokenizers[kind].encode(line)
    if kind == "unigram":  # many segmentations are equally likely up to the rounding of a float32 sum along the line
        total = [sum(map(model.get_score, ids)) for ids in (whole, ours)]
        assert total[0] == pytest.approx(total[1], rel=1e-6)
        assert len(whole) == pytest.approx(len(ours), abs=3)
    else:
        assert ours == whole


@pytest.mark.parametrize("line", ["x" * 10_000, " " * 10_000, "ab " * 5_000, "é" * 4096 + " x"])
def test_lines_without_a_good_place_to_cut_round_trip(tokenizers, line):
    for tok in tokenizers.values():
        assert tok.decode(tok.encode(line)) == line


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_stream_is_the_documents_in_bounded_blocks(tokenizers, kind, monkeypatch):
    monkeypatch.setattr(sentencepiece_runs, "_BLOCK_CHARS", 1000)
    tok = tokenizers[kind]
    documents = [TEXT, "", "<|endoftext|>\nno separator here", *NASTY, "y" * 9000]
    blocks = list(tok.encode_corpus(iter(documents)))
    assert np.concatenate(blocks).tolist() == [i for text in documents for i in [tok.end_of_text_id, *tok.encode(text)]]
    # A block is closed by the run that fills it, and a run has at most 4,096 characters of at most
    # 4 bytes.
    assert max(map(len, blocks)) <= 4 * (1000 + 4096)
    assert len(blocks) > 5


def test_a_batch_equals_single_rows(tokenizers):
    tok = tokenizers["bpe"]
    assert tok.encode_batch(NASTY) == [tok.encode(text) for text in NASTY]


def test_stream_decoder_shows_whole_characters(tokenizers):
    tok = tokenizers["bpe"]
    text = "fox 日本 \U0001f98a é\u2581\n"
    decoder = StreamDecoder(tok)
    shown = [decoder.push(i) for i in tok.encode(text)]
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown)
    assert decoder.finish() == ""

    assert decoder.push(tok.piece_to_id("<0xE6>")) == ""
    assert decoder.finish() == "\ufffd"


def test_stream_decoder_agrees_with_decode_on_any_tokens(tokenizers):
    tok = tokenizers["bpe"]

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, tok.vocab_size - 1)))
    def check(ids):
        decoder = StreamDecoder(tok)
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == tok.decode(ids)

    check()


def learned(tok):
    """The text of all pieces of several characters that are neither byte pieces nor special
    tokens."""
    pieces = [tok.id_to_piece(i) for i in range(tok.vocab_size)]
    return [p.replace("\u2581", " ") for p in pieces if len(p) > 1 and not re.fullmatch("<.*>", p)]


def occurrences(piece, text):
    """The number of places of the text at which the piece occurs, including overlapping ones."""
    return len(re.findall(f"(?={re.escape(piece)})", text))


@pytest.mark.parametrize("min_frequency", [2, 5, 20])
def test_rare_pieces_are_dropped_and_no_others(min_frequency):
    with pytest.raises(ValueError, match="at most") as caught:
        Tokenizer.train([TEXT], vocab_size=50_000)
    whole = Tokenizer.train([TEXT], vocab_size=int(re.search(r"at most (\d+)", str(caught.value))[1]))
    tok = Tokenizer.train([TEXT], vocab_size=50_000, min_frequency=min_frequency)
    assert learned(tok) == [piece for piece in learned(whole) if occurrences(piece, TEXT) >= min_frequency]
    assert 20 < len(learned(tok)) < len(learned(whole))
    # Characters, bytes and special tokens are all still there, in their order.
    names = [[t.id_to_piece(i) for i in range(t.vocab_size)] for t in (whole, tok)]
    dropped = {piece.replace(" ", "\u2581") for piece in set(learned(whole)) - set(learned(tok))}
    assert names[1] == [name for name in names[0] if name not in dropped]
    for piece in set(learned(tok)):  # every one can still be built
        assert tok.pieces(tok.encode(piece)) == whole.pieces(whole.encode(piece))


def test_a_tokenizer_without_rare_pieces_round_trips_and_is_deterministic():
    tok = Tokenizer.train([TEXT], vocab_size=50_000, min_frequency=3)
    for text in [TEXT, *NASTY]:
        assert tok.decode(tok.encode(text)) == text
    assert Tokenizer.train(iter([TEXT]), vocab_size=60_000, min_frequency=3).vocab_size == tok.vocab_size
    assert Tokenizer.train(iter([TEXT]), vocab_size=50_000, min_frequency=3).to_bytes() == tok.to_bytes()


def test_a_reached_limit_is_the_vocabulary_and_only_frequent_pieces_are_in_it(tokenizers):
    tok = Tokenizer.train([TEXT], vocab_size=420, min_frequency=2)
    assert [tok.id_to_piece(i) for i in range(420)] == [tokenizers["bpe"].id_to_piece(i) for i in range(420)]


@pytest.mark.long
@pytest.mark.parametrize("min_frequency", [2, 4])
def test_min_frequency_on_a_book(min_frequency):
    path = SHARED / "machado_books" / "dom_casmurro.txt"
    if not path.exists():
        pytest.skip(f"no corpus at {path}; set TRANSFORMER_JAX_DATA")
    text = path.read_text(encoding="utf-8")
    tok = Tokenizer.train([text], vocab_size=52_000, min_frequency=min_frequency)
    assert tok.decode(tok.encode(text)) == text
    pieces = learned(tok)
    assert len(pieces) > 8_000
    rarest = pieces[-200:] + pieces[::97]
    assert all(occurrences(piece, text) >= min_frequency for piece in rarest)


def test_min_frequency_errors():
    for kind in ("char", "word", "unigram"):
        with pytest.raises(ValueError, match=f"min_frequency=2 is for a tokenizer of kind 'bpe', not '{kind}'"):
            Tokenizer.train([TEXT], kind=kind, vocab_size=420, min_frequency=2)
    with pytest.raises(ValueError, match="min_frequency=0 must be positive"):
        Tokenizer.train([TEXT], vocab_size=420, min_frequency=0)
    with pytest.raises(ValueError, match=r"vocab_size=270 is too small: .* at least \d+"):
        Tokenizer.train([TEXT], vocab_size=270, min_frequency=2)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_too_large_names_the_largest(kind):
    with pytest.raises(ValueError, match=r"vocab_size=5000 is larger .* at most \d+") as caught:
        Tokenizer.train([TEXT], kind=kind, vocab_size=5000)
    assert ".cc" not in str(caught.value)
    largest = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert Tokenizer.train([TEXT], kind=kind, vocab_size=largest).vocab_size == largest


@pytest.mark.parametrize(("kind", "vocab_size"), [*((kind, 3) for kind in KINDS), ("bpe", 270), ("unigram", 270)])
def test_vocabulary_too_small_names_what_is_needed(kind, vocab_size):
    with pytest.raises(ValueError, match=r"is too small: .* at least \d+") as caught:
        Tokenizer.train([TEXT], kind=kind, vocab_size=vocab_size)
    assert int(re.search(r"at least (\d+)", str(caught.value))[1]) > vocab_size


def test_training_errors():
    with pytest.raises(ValueError, match="unknown tokenizer kind 'wordpiece'; expected one of char, word"):
        Tokenizer.train([TEXT], kind="wordpiece")
    with pytest.raises(ValueError, match="needs a vocab_size"):
        Tokenizer.train([TEXT], kind="bpe")
    for nothing in ([], [""], ["\n\n"]):
        with pytest.raises(ValueError, match="no text to train"):
            Tokenizer.train(nothing, kind="char")


def test_sentencepiece_is_silent(capfd):
    Tokenizer.train([TEXT], kind="unigram", vocab_size=420)
    assert capfd.readouterr() == ("", "")


def test_wrong_models_tokens_and_texts(tokenizers, tmp_path):
    tok = tokenizers["bpe"]
    for garbage in (b"", b"not a model", tok.to_bytes()[:1000]):
        with pytest.raises(ValueError, match="SentencePiece model"):
            Tokenizer.from_bytes(garbage)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text"]), model_prefix=str(tmp_path / "other"), model_type="char", minloglevel=2
    )
    with pytest.raises(ValueError, match=r"lacks <pad>, <mask>, <\|endoftext\|>"):
        Tokenizer.load(tmp_path / "other.model")
    for token in (-1, tok.vocab_size):
        for decode in (tok.decode, tok.decode_bytes, tok.pieces):
            with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 420"):
                decode([7, token])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tok.id_to_piece(token)
    with pytest.raises(ValueError, match="no piece 'xyzzy'"):
        tok.piece_to_id("xyzzy")
    with pytest.raises(ValueError, match="surrogate"):
        tok.encode("a\ud800")


def test_arrays_decode_like_lists(tokenizers):
    tok = tokenizers["bpe"]
    ids = tok.encode("the fox")
    assert tok.decode(np.array(ids, np.int32)) == tok.decode(iter(ids)) == "the fox"
    assert tok.decode([]) == tok.decode(np.zeros(0, np.int32)) == ""
