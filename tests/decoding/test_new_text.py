"""The text of new tokens is the part after the prompt when all tokens are decoded together. The
tests use tokenizers of the library ``tokenizers``."""

import functools

import jax
import numpy as np
import pytest
from test_stream import scripted

import transformer_jax as tj
from transformer_jax.alignment.rollouts import collect
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.tokens import StreamDecoder, text_after

tokenizers = pytest.importorskip("tokenizers")

WORDS = "the cat sat on a mat and cats sat , then it was happy . mats are not dogs it's don't".split()  # noqa: SIM905
TEXT = "the cat sat on 日本 a mat . 🎉 é then"
GREEDY = tj.Sampling(temperature=0)
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]


def parts(words):
    """All beginnings and ends of the words, so that any of their characters can be spelled."""
    return sorted({word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)})


def pairs(pieces):
    """Merges that make every piece of the shorter ones."""
    return [(piece[:i], piece[i:]) for piece in sorted(pieces, key=len) for i in range(1, len(piece))
            if piece[:i] in pieces and piece[i:] in pieces]


def metaspace_bytes(strips):
    """Llama's and Gemma's kinds: a space is U+2581, what is unknown is bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["▁", *parts([f"▁{word}" for word in WORDS[:10]])]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *BYTE_NAMES, *pieces]))}
    found = Tokenizer(models.BPE(vocab, pairs(set(pieces)), byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * strips + [normalizers.Replace(" ", "▁")]
    found.normalizer = normalizers.Sequence(steps)
    ends = [decoders.Strip(" ", 1, 0)] * strips
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return found


def unigram():
    """T5's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["▁", *parts([f"▁{word}" for word in [*WORDS[:10], "日本", "🎉", "é", "."]])]
    found = Tokenizer(models.Unigram([("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], unk_id=1))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    return found


def wordpiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    begins = [*WORDS, *parts(WORDS[:6]), "日", ".", "'", "🎉", "é"]
    names = dict.fromkeys(["[UNK]", "[CLS]", "</s>", *begins, *(f"##{part}" for part in [*parts(WORDS[:6]), "本"])])
    found = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece(cleanup=True)
    return found


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [*pre_tokenizers.ByteLevel.alphabet(), *parts([f"Ġ{word}" for word in WORDS[:8]])]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(["</s>", *sorted(pieces)]))}
    found = Tokenizer(models.BPE(vocab, pairs(set(pieces))))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return found


def suffixed():
    """The first GPT's kind: the last piece of a word ends with </w>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    chars = sorted({*"".join(WORDS), *TEXT} - {" "})
    found = Tokenizer(models.BPE({name: i for i, name in enumerate(["</s>", *chars, *(f"{c}</w>" for c in chars)])}, [],
                                 end_of_word_suffix="</w>"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    return found


MAKERS = {"llama": functools.partial(metaspace_bytes, 1), "gemma": functools.partial(metaspace_bytes, 0),
          "t5": unigram, "wordpiece": wordpiece, "gpt2": byte_level, "gpt1": suffixed}


@functools.cache
def make(kind):
    if kind == "ours":
        return tj.Tokenizer.train([" ".join(WORDS)] * 3, kind="bpe", vocab_size=300)
    made = MAKERS[kind]()
    made.add_special_tokens(["</s>"])
    return HuggingFaceTokenizer.make(made.to_str(), {"eos_token": "</s>"}, {})


KINDS = [*MAKERS, "ours"]


def streamed(decoder, tokens):
    return "".join([*map(decoder.push, tokens), decoder.finish()])


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_after_any_others(kind):
    """Broken characters, runs of bytes and special tokens too; past the length of a window."""
    tokenizer, rng = make(kind), np.random.default_rng(0)
    text = tokenizer.encode(TEXT)
    num_plain, beginnings = 0, set()
    for trial in range(150):
        ids = rng.integers(0, min(tokenizer.vocab_size, 300), size=rng.integers(0, 25)).tolist()
        if trial % 2:  # and texts with a few tokens among them
            ids = text[:rng.integers(0, len(text))] + ids[:3] + text[rng.integers(0, len(text)):]
        if trial % 25 == 0:
            ids = (text * 6 + ids)[:rng.integers(70, 200)]
        cut = rng.integers(0, len(ids) + 1)
        before, tokens = ids[:cut], ids[cut:]
        found = text_after(tokenizer, before, tokens)
        assert streamed(tokenizer.stream_decoder(before), tokens) == found
        prompt, whole = tokenizer.decode(before), tokenizer.decode(ids)
        if whole.startswith(prompt):
            assert prompt + found == whole
            num_plain += 1
            beginnings.add(found[:1])
    assert num_plain > 100 and " " in beginnings


def test_text_that_later_tokens_change_is_held_back():
    """A decoder that removes the spaces before punctuation, as some tokenizers of transformers
    do."""
    names = ["it", "'", "s", " ", ".", "n", "t", "a", "!", "do"]

    class CleansUp:
        def decode(self, ids):
            text = " ".join(names[token] for token in ids)
            for spaced, plain in ((" .", "."), (" !", "!"), (" ' ", "'"), (" n't", "n't"), (" 's", "'s")):
                text = text.replace(spaced, plain)
            return text

    rng, changed = np.random.default_rng(1), 0
    for _ in range(200):
        ids = rng.integers(0, len(names), size=rng.integers(1, 150)).tolist()
        cut = rng.integers(0, len(ids))
        decoder = StreamDecoder(CleansUp(), ids[:cut], margin=16)
        assert streamed(decoder, ids[cut:]) == text_after(CleansUp(), ids[:cut], ids[cut:])
        changed += not CleansUp().decode(ids).startswith(CleansUp().decode(ids[:cut]))
    assert changed > 5


def test_a_long_stream_decodes_a_short_window(monkeypatch):
    tokenizer, lengths = make("llama"), []
    tokens = tokenizer.encode(TEXT) * 40
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(list(ids))) or decode(ids))
    assert streamed(tokenizer.stream_decoder(tokens[:5]), tokens[5:]) == text_after(tokenizer, tokens[:5], tokens[5:])
    assert len(tokens) > 500 and max(lengths[:-2]) < 100


VOCAB, PROMPT_LENGTH = 320, 3


@functools.cache
def written(kind):
    """Returns a model that writes the rest of TEXT after its first tokens, the first tokens, the
    rest, and their texts."""
    tokenizer = make(kind)
    ids = tokenizer.encode(TEXT)
    prompt, rest = ids[:PROMPT_LENGTH], ids[PROMPT_LENGTH:]
    whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
    assert whole.startswith(before) and before
    return scripted([0] * (PROMPT_LENGTH - 1) + rest, VOCAB), tokenizer, prompt, rest, whole[len(before):]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_function_gives_the_text_that_stands_after_the_prompt(kind):
    model, tokenizer, prompt, rest, text = written(kind)
    arguments = dict(tokenizer=tokenizer, max_new_tokens=len(rest))
    found = tj.generate(model, [prompt], sampling=GREEDY, **arguments)
    assert (found.tokens, found.texts) == ([rest], [text])
    pieces = list(tj.stream(model, prompt, sampling=GREEDY, **arguments))
    assert "".join(pieces) == text and len(pieces) > 4
    assert not any("\ufffd" in piece for piece in pieces)
    assert " " in text


@pytest.mark.parametrize("kind", ["llama", "wordpiece"])
def test_beam_search_and_rollouts_return_the_new_text(kind):
    model, tokenizer, prompt, rest, text = written(kind)
    found = tj.beam_search(model, [prompt], tokenizer=tokenizer, beam_size=2, max_new_tokens=len(rest))
    assert (found.tokens, found.texts) == ([rest], [text])
    _, texts = collect(model, [prompt], reference=model, reward=lambda texts: [0.0], tokenizer=tokenizer,
                       key=jax.random.key(0), prompt_len=4, max_new_tokens=len(rest))
    assert texts == [text]


@pytest.mark.parametrize("kind", ["llama", "t5", "wordpiece", "gpt2"])
def test_stop_strings_that_begin_with_a_space(kind):
    model, tokenizer, prompt, rest, text = written(kind)
    arguments = dict(tokenizer=tokenizer, sampling=GREEDY, max_new_tokens=len(rest))
    for stop in (text[:3], " a", " mat"):
        assert stop.startswith(" ") or stop == text[:3]
        found = tj.generate(model, [prompt], stop=stop, **arguments)
        assert found.texts == [text[:text.index(stop)]] and found.finish_reasons == ["stop"]
        assert "".join(tj.stream(model, prompt, stop=stop, **arguments)) == found.texts[0]
        # The last token is the one that completes the stop string.
        assert stop in text_after(tokenizer, prompt, found.tokens[0])
        assert stop not in text_after(tokenizer, prompt, found.tokens[0][:-1])


def test_a_line_end_of_byte_fallback_stops_at_once():
    """The stream holds the text back until the next token, which could complete other bytes; a stop
    string does not wait."""
    tokenizer = make("llama")
    line_end = tokenizer.piece_to_id("<0x0A>")
    no_character = tokenizer.piece_to_id("<0xC1>")
    prompt = tokenizer.encode("the cat")
    rest = [*tokenizer.encode("sat"), line_end, no_character, line_end, line_end]
    model = scripted([0] * (len(prompt) - 1) + rest, VOCAB)
    arguments = dict(tokenizer=tokenizer, sampling=GREEDY, max_new_tokens=len(rest))
    found = tj.generate(model, [prompt], stop="\n", **arguments)
    assert (found.texts, found.tokens) == ([" sat"], [rest[:rest.index(line_end) + 1]])
    assert list(tj.stream(model, prompt, stop="\n", **arguments)) == [" sat"]
    broken = "".join(tj.stream(model, prompt, **arguments))
    assert broken == tj.generate(model, [prompt], **arguments).texts[0] == " sat" + "\ufffd" * 4


def test_ids_of_a_prompt_that_cannot_be_decoded():
    model, tokenizer, prompt, rest, text = written("llama")
    model = scripted([0] * PROMPT_LENGTH + rest, VOCAB)
    arguments = dict(tokenizer=tokenizer, sampling=GREEDY, max_new_tokens=len(rest))
    unknown = [*prompt, VOCAB - 1]
    assert tokenizer.vocab_size < VOCAB
    assert tj.generate(model, [unknown], **arguments).texts == [text]
    assert "".join(tj.stream(model, unknown, **arguments)) == text


def test_fill_mask_shows_words_as_they_stand_in_the_text():
    """A word at the beginning has no space before it, one inside has."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "."]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.add_special_tokens(pieces[:5])
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    tokenizer = HuggingFaceTokenizer.make(made.to_str(), settings, {})
    config = tj.ModelConfig(family="encoder", vocab_size=len(pieces), max_len=16, num_layers=1, num_heads=1,
                            model_dim=8)
    first, second = tj.fill_mask(tj.Encoder(config, key=jax.random.key(0)), "[MASK] cat [MASK]", tokenizer=tokenizer,
                                 top_k=len(pieces))[0]
    assert {one.token: one.text for one in first}["the"] == "the cat [MASK]"
    texts = {one.token: one.text for one in second}
    assert texts[" sat"] == "[MASK] cat sat" and texts["s"] == "[MASK] cats"
    assert texts["."] == "[MASK] cat." and texts["[SEP]"] == "[MASK] cat[SEP]"
