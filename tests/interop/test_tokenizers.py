"""Tokenizers in Hugging Face's form against the library that runs them, and against
transformers."""

# ruff: noqa: RUF001

import functools
import json
import pickle

import numpy as np
import pytest

from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_from_bytes
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.interop.tokenizer import read_tokenizer, write_tokenizer

tokenizers = pytest.importorskip("tokenizers")
decoders, models, pre_tokenizers = tokenizers.decoders, tokenizers.models, tokenizers.pre_tokenizers
processors, trainers = tokenizers.processors, tokenizers.trainers

CORPUS = ["The quick brown fox jumps over the lazy dog. ", "Größe, naïve café: Ça va? don't I'll it's",
          "日本語のテキスト 你好 мир", "hello   world\n\n\ttabs and   spaces", "שלום עולם مرحبا", "🙂🎉👩‍👩‍👧 emoji",
          "a b c d e f g 0 1 2 3 4 5 6 7 8 9 ! ? . , ; : ( ) [ ] < > / s"] * 4
TORTURE = ["", " ", "Hello world", "Ünïcödé café naïve e\u0301", "🙂🎉👩‍👩‍👧‍👦 x", "שלום עולם mixed مرحبا", "a\0b\0",
           "a" + " " * 50 + "b  c   ", "\n\n\t\r\n x \u00a0 y\u3000z", "日本語 你好，世界", "don't we're I'LL , . !",
           "   leading", "trailing   ", "\u2581 U+2581", "ﬁ ligature ½ ™", "\u202eRTL\u202c", "\ufeffbom", "𝔘𝔫𝔦",
           "x<|endoftext|>y </s> <s> <mask> <pad>[MASK] a [CLS]b", "A" * 300]


def gpt2():
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return found, names, "GPT2Tokenizer"


def roberta():
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    found.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    found.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    found.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
             "mask_token": "<mask>"}
    return found, names, "RobertaTokenizer"


def bert():
    found = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.decoder = tokenizers.normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    found.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special,
                                                                show_progress=False))
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]",
             "mask_token": {"content": "[MASK]"}}  # as older files write it
    return found, names, "BertTokenizer"


def t5():
    found = tokenizers.Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    found.decoder = decoders.Metaspace()
    found.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return found, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, "T5Tokenizer"


def llama():
    found = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "<s>", "</s>"]
    found.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*names, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False))
    stored = json.loads(found.to_str())  # bytes are not special tokens, but they must be in the vocabulary
    stored["added_tokens"] = [entry for entry in stored["added_tokens"] if entry["content"] in names]
    found = tokenizers.Tokenizer.from_str(json.dumps(stored))
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "LlamaTokenizer"


@pytest.mark.parametrize(("single", "message"), [
    ("<s>", "does not contain the text"), ("$A $A", "does not contain the text"), ("$B:1", "does not contain the text"),
    (["<s>:0", "$A:0"], "several parts of its post_processor add special tokens")])
def test_a_frame_that_is_none(single, message):
    from tokenizers import processors

    found, names, _ = llama()
    frame = processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=[("<s>", 1)])
    found.post_processor = processors.Sequence([frame, frame]) if isinstance(single, list) else frame
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer.make(found.to_str(), names, {})


KINDS = {kind.__name__: kind for kind in (gpt2, roberta, bert, t5, llama)}


@functools.cache
def made(kind):
    found, names, _ = KINDS[kind]()
    return HuggingFaceTokenizer.make(found.to_str(), names, {})


@pytest.mark.parametrize("kind", KINDS)
def test_as_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    found, names, cls = KINDS[kind]()
    names = {name: value if isinstance(value, str) else value["content"] for name, value in names.items()}
    extra = {"extra_ids": 0} if kind == "t5" else {}
    getattr(transformers, cls)(tokenizer_object=found, **names, **extra).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path, {})
    assert ours.vocab_size == len(theirs)
    for text in TORTURE:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode_source(text) == theirs.encode(text), text
        literally = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, allow_special=False) == literally, text
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text
    if kind != "bert":
        assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
            theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    (tmp_path / "again").mkdir()
    write_tokenizer(tmp_path / "again", ours)
    (tmp_path / "again" / "config.json").write_text(json.dumps({"model_type": kind}))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again.encode(text) for text in TORTURE] == [theirs.encode(text) for text in TORTURE]


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time(kind):
    tokenizer = made(kind)
    for text in TORTURE:
        ids = tokenizer.encode_source(text)
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_back(kind):
    tokenizer = made(kind)
    for again in (tokenizer_from_bytes(tokenizer.to_bytes()), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(again, HuggingFaceTokenizer) and again.digest == tokenizer.digest
        assert again.encode_source(TORTURE[2]) == tokenizer.encode_source(TORTURE[2])
        assert (again.bos_id, again.eos_id, again.end_ids, again.mask_id) == (
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids, tokenizer.mask_id)


def test_both_kinds_of_file_are_recognised_by_their_bytes():
    ours = Tokenizer.train(["some text"], kind="char")
    assert tokenizer_from_bytes(ours.to_bytes()).digest == ours.digest
    with pytest.raises(ValueError, match=r"not a tokenizer of Hugging Face \(9 bytes\)"):
        tokenizer_from_bytes(b'{"a": 12}')


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_every_text_comes_back_from_bytes(kind):
    tokenizer = made(kind)
    for text in TORTURE:
        ids = tokenizer.encode(text, allow_special=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert not set(ids) & set(tokenizer.special_ids)


def test_pieces_are_shown_with_their_spaces():
    for kind, text, shown in [("gpt2", "The dog", ["The", " dog"]), ("roberta", "the é", ["the", " é"]),
                              ("llama", "the dog", [" the", " dog"]), ("t5", "the", [" the"])]:
        found = made(kind).pieces(made(kind).encode(text))
        assert "".join(found) == "".join(shown) and found[0][0] == shown[0][0]
    assert made("bert").pieces([2, *made("bert").encode("a dog"), 4]) [0] == "[CLS]"
    assert "".join(made("bert").pieces(made("bert").encode("A dog"))) == " a dog"
    emoji = made("gpt2").encode("🙏")
    assert made("gpt2").pieces(emoji[-1:])[0].startswith("<0x")
    with pytest.raises(ValueError, match="word pieces do not store white space"):
        _ = made("bert").byte_lengths


def test_how_texts_are_framed():
    assert made("gpt2").encode_prompt("") == [made("gpt2").eos_id] == [made("gpt2").start_id]
    llama, bert, t5 = made("llama"), made("bert"), made("t5")
    assert llama.encode_prompt("the") == [llama.bos_id, *llama.encode("the")]
    assert llama.encode_prompt("") == [llama.bos_id]
    assert t5.encode_source("the") == [*t5.encode("the"), t5.eos_id]
    assert bert.encode_masked("the [MASK] dog") == [bert.bos_id, *bert.encode("the"), bert.mask_id,
                                                    *bert.encode("dog"), bert.eos_id]
    assert bert.mask_token == "[MASK]" and made("roberta").mask_token == "<mask>"
    assert (bert.bos_id, bert.eos_id) == (2, 3) and t5.bos_id is None
    assert llama.encode_role("user") == llama.encode("\n<|user|>\n")


def test_a_corpus_is_a_stream_of_documents():
    tokenizer = made("gpt2")
    documents = ["The dog.", "<|endoftext|>", *["a fox"] * 300]
    blocks = list(tokenizer.encode_corpus(documents))
    expected = [token for text in documents
                for token in (tokenizer.end_of_text_id, *tokenizer.encode(text, allow_special=False))]
    assert len(blocks) > 1 and all(block.dtype == np.int32 for block in blocks)
    assert np.concatenate(blocks).tolist() == expected


def test_special_tokens_that_config_json_names(tmp_path):
    found, _, _ = KINDS["llama"]()
    (tmp_path / "tokenizer.json").write_text(found.to_str())
    tokenizer = read_tokenizer(tmp_path, {"bos_token_id": 1, "eos_token_id": [2, 260], "pad_token_id": None})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, None, None)
    assert tokenizer.end_ids == (2, 260)


def test_unreadable_tokenizer_files_raise(tmp_path):
    assert read_tokenizer(tmp_path, {}) is None
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"\(merges.txt\) cannot be read: .* from tokenizer.json or tokenizer.model"):
        read_tokenizer(tmp_path, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"\(tokenizer.json, merges.txt\) cannot be read"):
        read_tokenizer(tmp_path, {})
    with pytest.raises(ValueError, match="tokenizer.json is not a valid tokenizer"):
        HuggingFaceTokenizer.make("{}", {}, {})
    tokenizer = made("gpt2")
    with pytest.raises(ValueError, match=f"token id {tokenizer.vocab_size} is outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="no piece 'xyzzy'"):
        tokenizer.piece_to_id("xyzzy")
    with pytest.raises(ValueError, match="no token that ends a text"):
        _ = HuggingFaceTokenizer.make(KINDS["gpt2"]()[0].to_str(), {}, {}).end_of_text_id


def test_ours_is_written_under_a_name_that_transformers_does_not_read(tmp_path):
    ours = Tokenizer.train(["some text"], kind="char")
    settings = write_tokenizer(tmp_path, ours)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer_jax_tokenizer.model"]
    assert settings["eos_token_id"] == [ours.eos_id, ours.end_of_text_id] and settings["pad_token_id"] == ours.pad_id
    assert read_tokenizer(tmp_path, {}).digest == ours.digest


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_sentencepiece_models_as_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    import sentencepiece

    options = {"llama": dict(model_type="bpe", byte_fallback=True, vocab_size=420, normalization_rule_name="identity",
                             remove_extra_whitespaces=False),
               "t5": dict(model_type="unigram", vocab_size=150, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)}[kind]
    model = tmp_path / {"llama": "tokenizer", "t5": "spiece"}[kind]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=str(model),
                                             minloglevel=2, hard_vocab_limit=False, **options)
    model.with_suffix(".vocab").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = {"llama": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
                "t5": {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}}[kind]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path, {})
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model.with_suffix(".model")))
    assert ours.encode("The quick brown fox") == raw.encode("The quick brown fox")
    for text in TORTURE:
        assert ours.encode_source(text) == theirs.encode(text), text
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
