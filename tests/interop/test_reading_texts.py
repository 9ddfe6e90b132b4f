"""Every function that reads a text uses the ids that ``AutoTokenizer`` gives, with each kind of
tokenizer."""

import functools

import jax
import numpy as np
import pytest
from test_tokenizer_classes import EXPECTED, TEXTS, directory_of, read

import transformer_jax as tj
from transformer_jax.data import LineRows, Masking, PackedPairs
from transformer_jax.data.token_file import TokenFile
from transformer_jax.decoding.batch import encode_prompts, encode_sources
from transformer_jax.models.functional import make_model
from transformer_jax.models.texts import as_arrays, read_target, read_text
from transformer_jax.training.bundle import Bundle

KINDS = {"decoder": ["llama", "gpt2", "llama-legacy", "opt", "gemma"],
         "encoder": ["bert", "roberta", "xlm-roberta", "albert", "mpnet"],
         "encoder_decoder": ["t5", "bart", "marian", "mbart", "pegasus", "nllb", "m2m_100"]}
EACH = [(family, name) for family, names in KINDS.items() for name in names]
TEXT, LAST = 2, 3  # of TEXTS: "The little robot", and one with accents


@functools.cache
def model_of(family):
    config = tj.ModelConfig(family=family, vocab_size=512, max_len=32, num_layers=1, num_heads=2, model_dim=8,
                            start_ids=(2,) if family == "encoder_decoder" else ())
    return make_model(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    return functools.cache(lambda name: read(directory_of(name, tmp_path_factory.mktemp(name))))


@pytest.mark.parametrize(("family", "name"), EACH)
def test_one_reading(family, name, tokenizer_of):
    """By calls with strings, generation, beam search and inspection, for all texts."""
    model, tokenizer = model_of(family), tokenizer_of(name)
    encode = encode_sources if family == "encoder_decoder" else encode_prompts
    for text, row in zip(TEXTS, EXPECTED[name]["rows"], strict=True):
        if row["ids"]:
            assert read_text(model, text, tokenizer) == row["ids"]
            arrays, _ = as_arrays(model, (text,), tokenizer)
            assert arrays[0].tolist() == [row["ids"]]
            if family != "encoder":
                assert encode(text, tokenizer, 512) == [row["ids"]]
    assert read_text(model, "", tokenizer)  # if transformers reads no token, a decoder needs a start token


@pytest.mark.parametrize(("family", "name"), [("decoder", "llama"), ("encoder", "xlm-roberta"),
                                              ("encoder_decoder", "mbart")])
def test_inspection_and_embeddings_read_the_same(family, name, tokenizer_of):
    model, tokenizer, row = model_of(family), tokenizer_of(name), EXPECTED[name]["rows"][TEXT]
    bundle = Bundle(model=model, tokenizer=tokenizer, config=model.config)
    inspected = tj.inspect_text(bundle, TEXTS[TEXT], **({"target": [5]} if family == "encoder_decoder" else {}))
    assert (inspected.ids if inspected.source_ids is None else inspected.source_ids).tolist() == row["ids"]
    if family != "encoder_decoder":
        vectors = tj.embed(model, TEXTS[TEXT], tokenizer=tokenizer, pooling="none")
        np.testing.assert_array_equal(vectors[0], tj.embed(model, [row["ids"]], pooling="none")[0])


@pytest.mark.parametrize("name", KINDS["decoder"])
def test_scores_begin_after_the_tokens_before_a_text(name, tokenizer_of):
    model, tokenizer, row = model_of("decoder"), tokenizer_of(name), EXPECTED[name]["rows"][TEXT]
    found = tj.score(model, TEXTS[TEXT], tokenizer=tokenizer)
    ids = row["ids"] if row["ids"] != row["bare"] else [tokenizer.start_id, *row["ids"]]
    assert ids[0] == tokenizer.start_id and found.tokens == [ids[1:]]
    logits_TV = np.asarray(tj.forward(model, ids)[0], np.float64)
    wanted = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs[0], wanted[range(len(ids) - 1), ids[1:]], atol=1e-5)


@pytest.mark.parametrize(("family", "name"), [each for each in EACH if each[0] != "encoder_decoder"])
def test_the_tokens_of_a_word(family, name, tokenizer_of):
    """The expected tokens are those whose offsets in transformers lie in the word, also where the
    tokenizer changes the text."""
    model, tokenizer = model_of(family), tokenizer_of(name)
    for number, word in ((2, "robot"), (2, "The"), (3, "CAFÉ"), (4, "の"), (5, "emoji"), (6, "three"), (7, "bridge"),
                         (3, "Größe,"), (18, "BRIDGE")):
        row = EXPECTED[name]["rows"][number]
        start = TEXTS[number].index(word)
        spans = list(zip(row["offsets"][::2], row["offsets"][1::2], strict=True))
        held = [place for place, (begin, end) in enumerate(spans) if begin < start + len(word) and end > start]
        vectors = tj.embed(model, [row["ids"]], pooling="none")[0]
        found = tj.embed(model, TEXTS[number], tokenizer=tokenizer, pooling="none", word=word)[0]
        assert held and held == list(range(held[0], held[-1] + 1))
        np.testing.assert_array_equal(found, vectors[held])


def test_a_word_that_is_left_out(tokenizer_of):
    with pytest.raises(ValueError, match="no token of .* stands for the word '\\\\u200b'"):
        tj.embed(model_of("encoder"), TEXTS[17], tokenizer=tokenizer_of("bert"), word="\u200b")


@pytest.mark.parametrize("name", KINDS["encoder"])
def test_lines_to_learn_are_read_as_texts_are(name, tokenizer_of):
    tokenizer, rows = tokenizer_of(name), EXPECTED[name]["rows"]
    longest = max(len(rows[number]["ids"]) for number in (TEXT, 4))
    found = LineRows.build([TEXTS[TEXT], TEXTS[4]], tokenizer, longest)
    lines = [row[segments == number].tolist() for row, segments in zip(found.tokens, found.segment_ids, strict=True)
             for number in range(1, segments.max() + 1)]
    assert sorted(lines) == sorted(rows[number]["ids"] for number in (TEXT, 4))


@pytest.mark.parametrize("name", KINDS["encoder_decoder"])
@pytest.mark.parametrize("start_ids", [(2,), (2, 5)])
def test_pairs_to_learn_are_read_as_texts_are(name, start_ids, tokenizer_of):
    tokenizer, rows = tokenizer_of(name), EXPECTED[name]["rows"]
    found = PackedPairs.build([(TEXTS[TEXT], TEXTS[LAST])], tokenizer, 32, 32, start_ids=start_ids)
    row = {key: value[0] for key, value in found[np.arange(1)].items()}
    assert row["source"][row["source_segment_ids"] == 1].tolist() == rows[TEXT]["ids"]
    if name == "marian":  # whose targets have their own SentencePiece model
        learned = rows[LAST]["target"]
    else:
        first = [tokenizer.bos_id] if rows[LAST]["ids"][0] == tokenizer.bos_id else []
        learned = [*first, *rows[LAST]["bare"], tokenizer.eos_id]
    assert learned != rows[LAST]["ids"] or name in ("t5", "pegasus", "bart"), name
    learned = [*start_ids[1:], *learned]
    assert row["targets"][row["segment_ids"] == 1].tolist() == learned
    assert row["tokens"][row["segment_ids"] == 1].tolist() == [start_ids[0], *learned[:-1]]


def test_a_target_and_what_starts_it(tokenizer_of):
    """BART's texts begin with <s>, which the tokens that start a target may hold already."""
    bart, model = tokenizer_of("bart"), model_of("encoder_decoder")
    bare = EXPECTED["bart"]["rows"][TEXT]["bare"]
    assert read_target(model, TEXTS[TEXT], bart, (2,)) == [0, *bare]
    assert read_target(model, TEXTS[TEXT], bart, (2, 0)) == bare
    for start, held in (((2,), [2, 0, *bare]), ((2, 0), [2, 0, *bare]), ((0,), [0, *bare])):
        pair = make_model(model.config.replace(start_ids=start), key=jax.random.key(0))
        inspected = tj.inspect_text(Bundle(model=pair, tokenizer=bart, config=pair.config), "a", target=TEXTS[TEXT])
        assert inspected.ids.tolist() == held
        arrays, _ = as_arrays(pair, ("a", TEXTS[TEXT]), bart)
        assert arrays[1].tolist() == [held]


def test_a_continuation_has_no_token_before_it(tokenizer_of):
    llama, row = tokenizer_of("llama"), EXPECTED["llama"]["rows"][TEXT]
    inspected = tj.inspect_text(model_of("decoder"), TEXTS[TEXT], llama, target="robot")
    assert inspected.ids.tolist() == [*row["ids"], *llama.encode("robot")]
    assert inspected.ids.tolist().count(llama.bos_id) == 1


def test_documents_to_learn_are_read_as_prompts_are(tokenizer_of, tmp_path):
    for name in ("llama", "gpt2"):
        tokenizer, rows = tokenizer_of(name), EXPECTED[name]["rows"]
        found = TokenFile.build([TEXTS[TEXT], TEXTS[4]], tokenizer, tmp_path)
        end = tokenizer.end_of_text_id
        assert found.tokens.tolist() == [end, *rows[TEXT]["ids"], end, *rows[4]["ids"]]


def test_whole_words_of_imported_pieces(tokenizer_of):
    """A word opens where its first piece has the mark of a space, or is no continuation of
    BERT's."""
    for name, opening, going_on in (("bert", "robot", "##s"), ("roberta", "Ġrobot", "ing"),
                                    ("xlm-roberta", "▁robot", "s")):
        tokenizer = tokenizer_of(name)
        masking = Masking.of(tokenizer, whole_words=True)
        assert masking.opens_word_V[tokenizer.piece_to_id(opening)]
        assert not masking.opens_word_V[tokenizer.piece_to_id(going_on)]
