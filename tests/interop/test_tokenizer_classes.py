"""Tokenizers read from directories give the ids, texts and offsets that ``AutoTokenizer`` gives
there.

The directories and what transformers reads in them were written by ``make_tokenizers.py``; nothing
here needs transformers.
"""

import json
import pathlib
import shutil

import pytest

from transformer_jax.data.huggingface_tokenizer import tokenizer_from_bytes
from transformer_jax.interop.tokenizer import read_tokenizer, write_tokenizer

pytest.importorskip("tokenizers", reason="the extra `hf` is not installed")

HERE = pathlib.Path(__file__).parent / "fixtures" / "tokenizers"
CASES, TEXTS, EXPECTED = (json.loads((HERE / f"{name}.json").read_text("utf-8"))
                          for name in ("cases", "texts", "expected"))
EXPECTED = {name: EXPECTED["cases"][expected] if isinstance(expected, str) else expected
            for name, expected in EXPECTED["cases"].items()}


def directory_of(name, tmp_path):
    """The directory of a case, or the one that transformers wrote again."""
    if name.endswith(" again"):
        return HERE / "again" / name.removesuffix(" again")
    for file, source in CASES[name]["files"].items():
        shutil.copy(HERE / source, tmp_path / file)
    for file, content in CASES[name]["json"].items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    return tmp_path


def read(directory):
    return read_tokenizer(directory, json.loads((directory / "config.json").read_text()))


def check(tokenizer, expected):
    """Compares everything that transformers stored in the fixtures."""
    for text, row in zip(TEXTS, expected["rows"], strict=True):
        assert tokenizer.encode_source(text) == row["ids"], text
        assert tokenizer.encode(text) == row["bare"], text
        assert tokenizer.decode(row["ids"]) == row["decoded"], text
        assert tokenizer.decode(row["ids"], skip_special=False) == row["whole"], text
        before, after = tokenizer.frame("source")
        assert [*before, *row["bare"], *after] == row["ids"]
        if "offsets" in row:
            assert [place for span in tokenizer.spans(text) for place in span] == row["offsets"], text
        elif expected["class"] == "MarianTokenizer":
            before, after = tokenizer.frame("target")
            assert [*before, *tokenizer.encode_target(text), *after] == row["target"], text
    roles = dict(expected["roles"])
    roles["bos"] = roles["cls"] if roles["bos"] is None else roles["bos"]
    roles["eos"] = roles["sep"] if roles["eos"] is None else roles["eos"]
    roles["unk"] = None if roles["unk"] == roles["eos"] else roles["unk"]
    assert {role: getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad", "unk", "mask")} == {
        role: roles[role] for role in ("bos", "eos", "pad", "unk", "mask")}


@pytest.mark.parametrize("name", EXPECTED)
def test_as_auto_tokenizer(name, tmp_path):
    tokenizer, expected = read(directory_of(name, tmp_path)), EXPECTED[name]
    check(tokenizer, expected)
    further = 100 if expected["class"] == "M2M100Tokenizer" else 0  # languages, which transformers does not count
    assert tokenizer.vocab_size == expected["length"] + further
    check(tokenizer_from_bytes(tokenizer.to_bytes()), expected)


@pytest.mark.parametrize("name", ["marian", "m2m_100", "t5", "llama", "bert-cased", "clip", "gemma"])
def test_one_token_at_a_time(name, tmp_path):
    tokenizer = read(directory_of(name, tmp_path))
    for row in EXPECTED[name]["rows"]:
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, row["ids"])) + decoder.finish() == row["decoded"]


@pytest.mark.parametrize("name", CASES)
def test_written_and_read_again(name, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    tokenizer = read(directory_of(name, tmp_path / "one"))
    write_tokenizer(tmp_path / "two", tokenizer)
    (tmp_path / "two" / "config.json").write_text('{"model_type": "of another family"}')
    check(read(tmp_path / "two"), EXPECTED[name])


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_written(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    directory = directory_of(name, tmp_path / "one")
    write_tokenizer(tmp_path / "two", read(directory))
    shutil.copy(directory / "config.json", tmp_path / "two")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    for text, row in zip(TEXTS, EXPECTED[name]["rows"], strict=True):
        assert theirs(text).input_ids == row["ids"], text
        assert theirs.decode(row["ids"], skip_special_tokens=True) == row["decoded"], text


@pytest.mark.parametrize("name", ["t5", "llama-legacy", "xlm-roberta", "gpt2", "bert", "nllb", "gemma", "marian",
                                  "m2m_100", "pegasus", "albert", "roberta-prefix", "llama-no-class"])
def test_spans_cover_each_word(name, tmp_path):
    """The tokens that stand for a word decode to it, without what is beside it."""
    tokenizer = read(directory_of(name, tmp_path))
    text = "a robot  walks, the old bridge sings"
    ids = tokenizer.encode_source(text)
    spans = tokenizer.spans(text)
    assert len(ids) == len(spans)
    for word in ("robot", "walks", "bridge", "sings"):
        start = text.index(word)
        held = [token for token, (begin, end) in zip(ids, spans, strict=True)
                if begin < start + len(word) and end > start]
        assert tokenizer.decode(held).strip() == word
    wide = "日本語"  # each byte token of a character has the offsets of the character
    for begin, end in tokenizer.spans(wide):
        assert 0 <= begin <= end <= 3


def test_a_sentinel_and_a_mask_of_pegasus(tmp_path):
    """Numbers of the papers' models: sentinels go down from the end, and pieces begin at 105."""
    (tmp_path / "t5").mkdir()
    (tmp_path / "pegasus").mkdir()
    t5 = read(directory_of("t5", tmp_path / "t5"))
    assert [t5.piece_to_id(f"<extra_id_{number}>") for number in (0, 1, 99)] == [
        t5.vocab_size - 1, t5.vocab_size - 2, t5.vocab_size - 100]
    assert t5.decode(t5.encode("<extra_id_0> robot"), skip_special=False).startswith("<extra_id_0>")
    pegasus = read(directory_of("pegasus", tmp_path / "pegasus"))
    assert (pegasus.pad_id, pegasus.eos_id, pegasus.piece_to_id("<unk>")) == (0, 1, 105)
    assert pegasus.piece_to_id("<unk_2>") == 4 and pegasus.piece_to_id("<unk_102>") == 104


BAD = [
    ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    ("tokenizer_config.json", "{", "tokenizer_config.json, line 1 is not JSON"),
    ("tokenizer_config.json", '{"eos_token": 7}', "tokenizer_config.json: eos_token is 7; expected a token"),
    ("tokenizer_config.json", '{"mask_token": {"content": "<m>", "lstrip": 3}}', "lstrip is 3; expected true or false"),
    ("tokenizer_config.json", '{"extra_special_tokens": "x"}', "extra_special_tokens is 'x'; expected a list"),
    ("tokenizer_config.json", '{"additional_special_tokens": [[1]]}', "expected a token: a string, or an object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is []; expected tokens by id"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "expected tokens by id"),
    ("tokenizer_config.json", '{"extra_ids": "many"}', "cannot be read"),
    ("tokenizer_config.json", '{"extra_ids": 1e400}', "tokenizer_config.json"),
    ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
    ("tokenizer_config.json", '{"tokenizer_class": "WhisperTokenizer"}', "WhisperTokenizer, which is not supported;"),
    ("tokenizer_config.json", '{"tokenizer_class": "ByT5Tokenizer"}', "ByT5Tokenizer, which is not supported"),
    ("special_tokens_map.json", '{"eos_token": {"text": "x"}}', "special_tokens_map.json: eos_token"),
    ("added_tokens.json", '{"<x>": "9"}', "added_tokens.json: the id of '<x>' is '9'; expected a number"),
    ("tokenizer.json", "{}", "cannot be read"),
    ("tokenizer.json", '{"model": 3}', "cannot be read"),
    ("tokenizer.json", '{"added_tokens": [3]}', "tokenizer.json: added_tokens has 3; expected an object with an id"),
    ("spiece.model", "no model", "spiece.model is not a SentencePiece model"),
    ("spiece.model", "", "spiece.model"),
    ("tokenizer.model", "bm8gbW9kZWw= 0\n", "tokenizer.model is not a SentencePiece model"),
]


def test_a_class_that_is_not_read_becomes_one_that_is(tmp_path):
    """Follows the advice of the error, which then makes the files readable."""
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    shutil.copytree(HERE / "again" / "llama", tmp_path, dirs_exist_ok=True)
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "CodeLlamaTokenizer"}))
    with pytest.raises(ValueError, match="CodeLlamaTokenizer, which is not supported; .*TokenizerFast.from_pre"):
        read(tmp_path)
    transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    tokenizer = read(tmp_path)
    assert all(tokenizer.encode_source(text) == plain(text).input_ids for text in TEXTS)


@pytest.mark.parametrize("name", ["CodeLlamaTokenizer", "CodeGenTokenizer", "HerbertTokenizer", "ByT5Tokenizer"])
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json", None])
def test_a_class_that_is_not_read_is_named_with_what_to_do(name, files, tmp_path):
    directory_of("gpt2", tmp_path)
    if files == "tokenizer.json":
        shutil.copy(HERE / "again" / "llama" / "tokenizer.json", tmp_path)
    for vocabulary in ("vocab.json", "merges.txt") if files is None else ():
        (tmp_path / vocabulary).unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{name}Fast"}))
    if files is None:
        with pytest.warns(UserWarning, match=f"{tmp_path} is loaded without a tokenizer: its class in transformers is "
                                             f"{name}, which is not supported; give the model token ids"):
            assert read(tmp_path) is None
        return
    advice = r"TokenizerFast.from_pretrained\(DIRECTORY\)" if files == "tokenizer.json" else "delete them, and"
    with pytest.raises(ValueError, match=f"class in transformers is {name}, which is not supported; .*{advice}"):
        read(tmp_path)


def test_missing_files_of_a_class_that_is_read(tmp_path):
    directory_of("gpt2", tmp_path)
    for vocabulary in ("vocab.json", "merges.txt"):
        (tmp_path / vocabulary).unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.warns(UserWarning, match="loaded without a tokenizer: the files of its GPT2Tokenizer are missing"):
        assert read(tmp_path) is None


def test_special_tokens_of_a_translation_model_beyond_the_usual(tmp_path):
    """As ``AutoTokenizer``: new names get ids after the vocabulary, and ``cls_token`` begins a
    text."""
    directory_of("marian", tmp_path)
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"source_lang": "en", "target_lang": "ro", "cls_token": "<new>", "mask_token": "<mask>"}))
    tokenizer = read(tmp_path)
    assert (tokenizer.bos_id, tokenizer.mask_id, tokenizer.mask_token) == (size, size + 1, "<mask>")
    assert tokenizer_from_bytes(tokenizer.to_bytes()).mask_id == size + 1


@pytest.mark.parametrize(("file", "content", "words"), BAD)
def test_hostile_files(file, content, words, tmp_path):
    directory_of("t5", tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 700


def test_a_vocabulary_without_its_unknown_token(tmp_path):
    """transformers reads this file too, but fails on an unknown word."""
    tokenizer_config = tmp_path / "tokenizer_config.json"
    directory_of("bert", tmp_path)
    tokenizer_config.write_text('{"unk_token": "<unk>"}')
    tokenizer = read(tmp_path)
    assert tokenizer.encode("robot")
    for ask in (tokenizer.encode, tokenizer.spans):
        with pytest.raises(ValueError, match="this tokenizer cannot encode the text: .*UNK"):
            ask("\u2603")


def test_a_token_that_is_null(tmp_path):
    """BERT's class then still puts its usual ids around a text; XLM-R's cannot."""
    directory_of("bert", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": null}')
    assert read(tmp_path).encode_source("robot")[-1] == 3
    (tmp_path / "vocab.txt").unlink()
    directory_of("xlm-roberta", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(ValueError, match="bos_token is null, but the class puts this token around a text"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "missing", "words"), [
    ("gpt2", "merges.txt", "merges.txt missing; expected tokenizer.json or vocab.json and merges.txt"),
    ("marian", "target.spm", "target.spm missing"),
    ("m2m_100", "vocab.json", "vocab.json missing"),
    ("mbart", None, "set tokenizer_class in tokenizer_config.json"),
])
def test_missing_files(name, missing, words, tmp_path):
    directory_of(name, tmp_path)
    if missing is None:
        (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    else:
        (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("vocabulary", ["[]", "{}", '{"a": "b"}', '{"<unk>": -1}', '{"a": 0}'])
def test_hostile_vocabularies(vocabulary, tmp_path):
    directory_of("marian", tmp_path)
    (tmp_path / "vocab.json").write_text(vocabulary)
    with pytest.raises(ValueError, match=r"vocab\.json"):
        read(tmp_path)
