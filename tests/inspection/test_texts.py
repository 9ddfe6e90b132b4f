"""Several texts in one inspection: each equals the same text read alone, without padding."""

import json
import re

import jax
import numpy as np
import pytest
from test_inspection import BASE, assert_same, inspect, make, tokenizer

import transformer_jax as tj
from transformer_jax.inspection.texts import cut, places_of_texts

TEXTS = ["the cat", "o"]
TARGETS = ["o gato", "a"]


def read(family, **options):
    return tj.inspect_text(make(family), TEXTS, tokenizer(), **options)


@pytest.mark.long
@pytest.mark.parametrize("family", ["alibi", "encoder"])
def test_each_text_is_what_it_is_alone(family):
    inspected = read(family)
    assert inspected.ids.ndim == 2 and inspected.ids.shape == inspected.segment_ids.shape and len(inspected.texts) == 2
    for text, alone in zip(inspected.texts, TEXTS, strict=True):
        assert_same(text, inspect(family, alone))


def test_a_bias_that_an_intervention_changed_is_cut_to_each_text():
    model, tokens_BT = make("alibi"), np.asarray([[3, 4, 5, 6, 3], [4, 3, 5, 0, 0]])
    segment_ids_BT = np.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])

    def halve(site, layer, value):
        return value / 2 if site == "attention_bias" else value

    trace = tj.trace(model, tokens_BT, segment_ids_BT=segment_ids_BT, intervene=halve)
    for (own, _), (row, columns) in zip(places_of_texts(segment_ids_BT, None), [
            (0, slice(0, 2)), (0, slice(2, 5)), (1, slice(0, 3))], strict=True):
        alone = cut(trace, own, None)
        np.testing.assert_allclose(alone.attention(), trace.attention()[:, row:row + 1, :, columns, columns], atol=1e-6)


@pytest.mark.long
def test_each_pair_is_what_it_is_alone():
    inspected = read("encoder_decoder", target=TARGETS)
    for text, source, target in zip(inspected.texts, TEXTS, TARGETS, strict=True):
        assert_same(text, inspect("encoder_decoder", source, target))


@pytest.mark.long
def test_continuations_and_own_translations():
    inspected = read("decoder", target=TARGETS)
    assert [text.tokens for text in inspected.texts] == [list(a + b) for a, b in zip(TEXTS, TARGETS, strict=True)]
    sources = ["the cat", "the cat sat"]
    inspected = tj.inspect_text(make("encoder_decoder"), sources, tokenizer())
    expected = tj.generate(make("encoder_decoder"), sources, tokenizer=tokenizer(), max_new_tokens=BASE.max_len - 1,
                           sampling=tj.Sampling(temperature=0)).tokens
    ends = (tokenizer().eos_id, tokenizer().end_of_text_id)
    assert [text.ids.tolist() for text in inspected.texts] == [
        [tokenizer().bos_id, *(token for token in tokens if token not in ends)] for tokens in expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_ids(side):
    rows = [inspect("decoder", text).ids for text in TEXTS]
    width = max(map(len, rows))
    starts = [width - len(row) if side == "left" else 0 for row in rows]
    ids_BT, segments_BT = np.zeros((2, len(rows), width), np.int32)
    for row, (start, ids) in enumerate(zip(starts, rows, strict=True)):
        ids_BT[row, start:start + len(ids)] = ids
        segments_BT[row, start:start + len(ids)] = 1
    inspected = tj.inspect_text(make("decoder"), ids_BT, tokenizer(), segment_ids=segments_BT)
    for text, alone in zip(inspected.texts, TEXTS, strict=True):
        np.testing.assert_allclose(text.trace.residual, inspect("decoder", alone).trace.residual, atol=2e-5)
        assert text.tokens == inspect("decoder", alone).tokens


def test_a_batch_of_packed_rows():
    first, second = inspect("encoder", TEXTS[0]).ids, inspect("encoder", TEXTS[1]).ids
    row = np.concatenate([first, second])
    inspected = tj.inspect_text(make("encoder"), np.stack([row, np.concatenate([second, first])]), tokenizer(),
                           segment_ids=[[1] * len(first) + [2] * len(second), [1] * len(second) + [2] * len(first)])
    assert [len(text.ids) for text in inspected.documents()] == [len(first), len(second), len(second), len(first)]
    for text, alone in zip(inspected.texts, (TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[0]), strict=True):
        assert text.tokens == inspect("encoder", alone).tokens
        np.testing.assert_allclose(text.trace.residual, inspect("encoder", alone).trace.residual, atol=2e-5)


def test_one_text_is_its_own_only_one():
    inspected = inspect("decoder")
    assert inspected.texts == [inspected]


def test_summaries_are_over_the_tokens_of_all():
    inspected = read("encoder")
    lengths = [len(text.ids) for text in inspected.texts]
    for name in ("entropy", "sink", "distance", "diagonal"):
        each = np.stack([text.summaries()[name] for text in inspected.texts])
        np.testing.assert_allclose(inspected.summaries()[name], np.average(each, axis=0, weights=lengths), atol=1e-5)


def test_the_page_shows_every_text_without_padding():
    inspected = read("decoder")
    data = json.loads(re.search(r'id="data">(.*?)</script>', inspected.to_html(layer=-1))[1])
    assert [text["kinds"][0]["queries"] for text in data["texts"]] == [list(t.replace(" ", "·")) for t in TEXTS]
    assert [text["name"] for text in data["texts"]] == ["0: the cat", "1: o"]
    assert data["layer"] == 2 and "<iframe" in inspected._repr_html_()
    assert data["texts"][1] | {"name": ""} == json.loads(re.search(
        r'id="data">(.*?)</script>', inspected.texts[1].to_html())[1])["texts"][0] | {"name": ""}


def test_the_printed_form_is_readable():
    assert repr(inspect("decoder")) == """\
Inspection of Decoder: 3 layers, 4 heads
  text (22 tokens): t|h|e|·|c|a|t|·|s|a|t|·|o|n|·|t|h|e|·|m|a|t
  attention('self'): [3 layers, 4 heads, 22 queries, 22 keys]"""
    assert repr(read("encoder_decoder", target=TARGETS)) == """\
Inspection of EncoderDecoder: 3 layers, 4 heads
  texts[0] source (8 tokens): t|h|e|·|c|a|t|</s>
  texts[0] target (7 tokens): <s>|o|·|g|a|t|o
  texts[1] source (2 tokens): o|</s>
  texts[1] target (2 tokens): <s>|a
  texts[0].attention('self'): [3 layers, 4 heads, 7 queries, 7 keys]
  texts[0].attention('encoder'): [2 layers, 4 heads, 8 queries, 8 keys]
  texts[0].attention('cross'): [3 layers, 4 heads, 7 queries, 8 keys]"""
    many = tj.inspect_text(make("decoder"), ["a" * 48] * 7, tokenizer())
    assert "\n  and 2 more in .texts\n" in repr(many) and max(map(len, repr(many).splitlines())) <= 100


@pytest.mark.parametrize(("call", "words"), [
    (lambda: read("decoder").attention(),
     r"attention\(\) works on one text, and this inspection holds 2: .*texts\[0\]"),
    (lambda: read("decoder").tokens, "tokens works on one text"),
    (lambda: read("decoder").labels(), r"labels\(\) works on one text"),
    (lambda: read("decoder").plot(), r"plot\(\) works on one text"),
    (lambda: read("decoder").logit_lens(), r"logit_lens\(\) works on one text"),
    (lambda: read("decoder").attribution(), r"attribution\(\) works on one text"),
    (lambda: read("decoder").rollout(), r"attention\(\) works on one text"),
    (lambda: read("decoder").value_weighted(), r"value_weighted\(\) works on one text"),
    (lambda: read("decoder", target="a"), "target for 2 texts must be a list of 2; got a string"),
    (lambda: read("decoder", target=["a"]), "target for 2 texts must be a list of 2; got 1 of them"),
    (lambda: tj.inspect_text(make("decoder"), [[1, 2], [3]], segment_ids=[[1, 1]]), "for 2 texts must be a list"),
    (lambda: tj.inspect_text(make("decoder"), [[1, 2], [3]], segment_ids=[[1, 1], [1, 1]]),
     r"has shape \(2,\); expected \(1,\)"),
    (lambda: tj.inspect_text(make("decoder"), [[1, 2], []]), "a prompt of token ids is empty"),
    (lambda: tj.inspect_text(make("decoder"), [[1] * 49, [1]]), "49 tokens is longer than the model's context of 48"),
])
def test_methods_for_one_text_raise_for_several(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_reward_model_is_sent_to_its_decoder():
    reward = tj.RewardModel.of(make("decoder"), key=jax.random.key(0))
    with pytest.raises(ValueError, match="look inside its decoder, model.trunk"):
        tj.inspect_text(reward, [1, 2])
    assert tj.inspect_text(reward.trunk, [1, 2]).attention().shape == (3, 4, 2, 2)
    with pytest.raises(ValueError, match="str is not a model"):
        tj.inspect_text("runs/x", [1, 2])
