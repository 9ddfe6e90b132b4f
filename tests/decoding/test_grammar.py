"""Constrained text is what its grammar allows, checked by ``jsonschema`` and ``re`` on random
models."""

import json
import re

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.decoding.loop import decode, prefill

pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")

TEXTS = ['{"name": "Ann", "age": 31, "tags": ["a", "b"]} yes no maybe 0123456789 +-*/()\n', "né 🎉 plain text " * 3]
TOKENIZERS = {
    "char": tj.Tokenizer.train(TEXTS, kind="char"),
    "bpe": tj.Tokenizer.train(TEXTS, kind="bpe", vocab_size=320),
}
VOCAB = 512  # larger than every tokenizer's vocabulary, so that some ids cannot be decoded
CONFIG = tj.ModelConfig(vocab_size=VOCAB, max_len=64, num_layers=1, num_heads=1, model_dim=16, mlp_dim=16, init_std=0.5)
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "age", "tags"], "properties": {
    "name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "tags": {"type": "array", "items": {"enum": ["a", "b", "né 🎉"]}, "maxItems": 2}}}
PATTERN = r"(yes|no)( [a-n]+){0,2}\n?|[0-9]{2,4}/🎉?"
CHOICES = ["yes", "no", "maybe", "may", 'a"\n🎉']


def byte_level_tokenizer():
    """A tokenizer.json in the form of GPT-2's, with a few merges."""
    tokenizers = pytest.importorskip("tokenizers", reason='needs pip install "transformer_jax[hf]"')
    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ('"', ":"), ("Ġ", '"'), ("a", "g"), ("ag", "e")]
    names = [*pieces, *("".join(pair) for pair in merges), "<|endoftext|>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: token for token, name in enumerate(names)}, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return huggingface(made, {"eos_token": "<|endoftext|>"})


def metaspace_tokenizer():
    """A tokenizer.json in the form of Llama's, whose decoder leaves out a space that begins a
    text."""
    tokenizers = pytest.importorskip("tokenizers", reason='needs pip install "transformer_jax[hf]"')
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁yes", "▁no", "yes", "▁a",
             *"abcdefghijklmnoy"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        {name: token for token, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    made.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return huggingface(made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def huggingface(made, settings):
    from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer.make(made.to_str(), settings, {})


def tokenizer_of(name):
    return TOKENIZERS[name] if name in TOKENIZERS else {
        "byte-level": byte_level_tokenizer, "metaspace": metaspace_tokenizer}[name]()


def is_valid(kind, text):
    if kind == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
        return text == json.dumps(json.loads(text), ensure_ascii=False) or "\\" in text
    return text in CHOICES if kind == "choice" else re.fullmatch(PATTERN, text) is not None


GRAMMARS = {"json": lambda: tj.Grammar.json_schema(SCHEMA), "regex": lambda: tj.Grammar.regex(PATTERN),
            "choice": lambda: tj.Grammar.choice(CHOICES)}


@pytest.mark.long
@pytest.mark.parametrize("name", ["char", "bpe", "byte-level", "metaspace"])
def test_texts_of_random_models_are_valid(name):
    """24 rows: each of 8 seeds follows three grammars at the same time, at a high temperature."""
    tokenizer = tokenizer_of(name)
    prompts = ["", "a", "né"] if name in TOKENIZERS else ["a", "", "no a"]
    kinds = list(GRAMMARS)
    model = tj.Decoder(CONFIG, key=jax.random.key(3))
    result = tj.generate(model, prompts, tokenizer=tokenizer, key=jax.random.key(0), num_samples=8, max_new_tokens=48,
                         sampling=tj.Sampling(temperature=1.5), grammar=[GRAMMARS[kind]() for kind in kinds])
    complete = 0
    for row, (text, reason) in enumerate(zip(result.texts, result.finish_reasons, strict=True)):
        assert reason in ("eos", "grammar", "length")
        if reason == "length":
            assert result.lengths[row] == 48
            continue
        assert is_valid(kinds[row // 8], text), (kinds[row // 8], text)
        complete += 1
    assert complete >= 16
    assert len(set(result.texts)) > 10


@pytest.mark.long
def test_a_row_does_not_depend_on_its_neighbours_and_few_programs_are_compiled():
    model = tj.Decoder(CONFIG, key=jax.random.key(5))
    tokenizer, keys = TOKENIZERS["bpe"], jax.random.split(jax.random.key(1), 3)
    grammars = [GRAMMARS["json"](), None, GRAMMARS["regex"]()]
    options = dict(tokenizer=tokenizer, max_new_tokens=16)
    before = decode.num_programs, prefill._cache_size()
    together = tj.generate(model, ["a", "b", "c"], key=keys, grammar=grammars, **options)
    assert (decode.num_programs - before[0], prefill._cache_size() - before[1]) == (1, 1)
    other = [GRAMMARS["choice"](), GRAMMARS["json"](), None]
    tj.generate(model, ["x", "y", "z"], key=keys, grammar=other, **options)
    assert (decode.num_programs - before[0], prefill._cache_size() - before[1]) == (1, 1)
    for row, grammar in enumerate(grammars):
        prompt = "abc"[row]
        alone = tj.generate(model, prompt, key=keys[row:row + 1], grammar=grammar, **options)
        assert alone.texts == [together.texts[row]]
        pieces = tj.stream(model, prompt, key=keys[row:row + 1], grammar=grammar, **options)
        assert "".join(pieces) == together.texts[row]
    free = tj.generate(model, "b", key=keys[1:2], **options)
    assert free.tokens == [together.tokens[1]]


def test_every_text_that_the_grammar_allows_can_be_drawn():
    """The mask forbids nothing that is allowed: a model without preferences writes all choices."""
    model = tj.Decoder(CONFIG.replace(init_std=0.01), key=jax.random.key(0))
    result = tj.generate(model, "a", tokenizer=TOKENIZERS["char"], key=jax.random.key(0), num_samples=24,
                         max_new_tokens=48, grammar=tj.Grammar.choice(["yes", "no", "may", "maybe"]))
    assert set(result.texts) == {"yes", "no", "may", "maybe"}
    assert set(zip(result.texts, result.finish_reasons, strict=True)) == {
        ("yes", "grammar"), ("no", "grammar"), ("may", "eos"), ("maybe", "grammar")}


def test_a_space_that_the_tokenizer_leaves_out_is_not_counted_as_text():
    """At the start of a text, the decoder would turn " yes" into "yes", which the grammar forbids."""
    model = tj.Decoder(CONFIG.replace(init_std=0.01), key=jax.random.key(0))
    result = tj.generate(model, ["", "a"], tokenizer=metaspace_tokenizer(), key=jax.random.key(0), num_samples=12,
                         max_new_tokens=48, grammar=tj.Grammar.choice([" yes", "no"]))
    assert set(result.texts[:12]) == {"no"}
    assert set(result.texts[12:]) == {" yes", "no"}


def test_a_text_that_is_cut_says_so_and_one_that_just_fits_does_not():
    model = tj.Decoder(CONFIG, key=jax.random.key(0))
    options = dict(tokenizer=TOKENIZERS["char"], sampling=tj.Sampling(temperature=0), grammar=tj.Grammar.regex("n{4}"))
    assert tj.generate(model, ["a"], max_new_tokens=3, **options).finish_reasons == ["length"]
    fits = tj.generate(model, ["a"], max_new_tokens=4, **options)
    assert (fits.texts, fits.finish_reasons) == (["nnnn"], ["grammar"])


@pytest.mark.long
def test_the_grammar_outlives_the_context():
    """A text longer than the context continues its grammar after the model has read the context
    again."""
    model = tj.Decoder(CONFIG.replace(max_len=32), key=jax.random.key(0))
    result = tj.generate(model, "a", tokenizer=TOKENIZERS["char"], key=jax.random.key(2), max_new_tokens=40, slide=True,
                         grammar=tj.Grammar.regex("(yes no ){5}"))
    assert result.texts == ["yes no " * 5 + " "] or result.texts == ["yes no " * 5]


@pytest.mark.long
def test_encoder_decoders_follow_grammars():
    config = CONFIG.replace(family="encoder_decoder")
    model = tj.EncoderDecoder(config, key=jax.random.key(0))
    result = tj.generate(model, ["yes", "no"], tokenizer=TOKENIZERS["bpe"], key=jax.random.key(0), max_new_tokens=12,
                         grammar=GRAMMARS["choice"]())
    assert all(text in CHOICES for text in result.texts)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: tj.Grammar.regex("(?=a)b"), "look-around"),
    (lambda: tj.Grammar.regex(3), "not a regular expression"),
    (lambda: tj.Grammar.json_schema({"type": "objet"}), "Invalid type: objet"),
    (lambda: tj.Grammar.json_schema({"if": {}}), "Unimplemented keys"),
    (lambda: tj.Grammar.json_schema("{"), "is not JSON"),
    (lambda: tj.Grammar.json_schema("[]"), "pass a JSON object"),
    (lambda: tj.Grammar.choice("yes"), "must be a list of strings"),
    (lambda: tj.Grammar.choice(["a", ""]), "not empty"),
    (lambda: tj.Grammar.lark("begin: 'a'"), "cannot follow the grammar"),
    (lambda: tj.Grammar.regex("("), "unclosed group"),
    (lambda: tj.Grammar.regex("\ud800"), "half a surrogate pair"),
    (lambda: tj.Grammar.choice(["\ud800"]), "half a surrogate pair"),
    (lambda: tj.Grammar.json_schema({"const": "\ud800"}), "cannot read the schema"),
    (lambda: tj.Grammar.json_schema({"type": "integer", "minimum": 10**400}), "cannot read the schema"),
    (lambda: tj.Grammar.json_schema('{"not":' * 5000 + "1" + "}" * 5000), "nested too deep"),
    (lambda: tj.Grammar.json_schema(_nested(5000)), "nested too deep"),
])
def test_a_wrong_grammar_is_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def _nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


class Joins(tj.Tokenizer):
    """A tokenizer whose decoder puts a space between tokens."""

    def decode(self, ids):
        return " ".join(super(Joins, self).decode([token]) for token in ids)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(grammar="yes|no"), "not a tj.Grammar"),
    (dict(grammar=[]), "one tj.Grammar or None for each of 1 prompts"),
    (dict(grammar="choice", tokenizer=None, prompts=[[1]]), "grammar needs a tokenizer"),
    (dict(grammar="choice", tokenizer=Joins(TOKENIZERS["bpe"].to_bytes())), "decoder adds, removes or replaces"),
    (dict(grammar="choice", tokenizer=tj.Tokenizer.train(["bcd"], kind="char")), "no token for the characters"),
    (dict(grammar="json", tokenizer=tj.Tokenizer.train(["name Ann"], kind="char")), "no token for the characters"),
])
def test_wrong_arguments(arguments, message):
    arguments = {"prompts": "a", "tokenizer": TOKENIZERS["bpe"], **arguments}
    if str(arguments["grammar"]) in GRAMMARS:
        arguments["grammar"] = GRAMMARS[arguments["grammar"]]()
    with pytest.raises(ValueError, match=message):
        tj.generate(tj.Decoder(CONFIG, key=jax.random.key(0)), arguments.pop("prompts"), key=jax.random.key(0),
                    max_new_tokens=4, **arguments)


@pytest.mark.long
def test_a_rule_that_brings_forbidden_tokens_back_is_found():
    with pytest.raises(ValueError, match="a rule of processors"):
        tj.generate(tj.Decoder(CONFIG, key=jax.random.key(0)), "a", tokenizer=TOKENIZERS["bpe"], max_new_tokens=4,
                    sampling=tj.Sampling(temperature=0), grammar=GRAMMARS["choice"](),
                    processors=[lambda logits_BV, history: np.zeros(1, np.float32) + 0 * logits_BV.clip(-1, 1)])
