"""Examples from Python: a wrong example is named by its number before training starts, and dicts
with the keys of JSON lines are accepted."""

import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import DataConfig, ExperimentConfig, ModelConfig
from transformer_jax.data import (
    Comparison,
    LineRows,
    Message,
    PackedConversations,
    PackedPairs,
    Pairs,
    Tokenizer,
    Windows,
    encode_conversation,
    encode_prompt,
)
from transformer_jax.data.text import check_texts

ASKED, ANSWER = Message("user", "why?"), Message("assistant", "so")
CONFIG = ExperimentConfig(model=ModelConfig(max_len=32), data=DataConfig(validation_fraction=0.5))


def task(name):
    return tj.tasks.get(name)(CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["why? so no"], kind="char", chat=True)


@pytest.mark.parametrize(("name", "examples", "expected"), [
    ("sft", [[ASKED, ANSWER], {"prompt": "why?", "completion": "so"},
             [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}],
             {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]}], (ASKED, ANSWER)),
    ("reward", [Comparison("why?", ["so", "no"]), {"prompt": "why?", "chosen": "so", "rejected": "no"}],
     Comparison("why?", ["so", "no"])),
    ("dpo", [Comparison("why?", ["so", "no"]), {"prompt": "why?", "responses": ["so", "no"]}],
     Comparison("why?", ["so", "no"])),
    ("policy", ["why?", [ASKED], {"prompt": "why?"}, [{"role": "user", "content": "why?"}]], (ASKED,)),
])
def test_examples_in_every_form(name, examples, expected):
    train, held_out = task(name).read(examples, examples[:1])
    assert train == [expected] * len(examples) and held_out == [expected]
    train, held_out = task(name).read(examples)
    assert train + held_out == [expected] * len(examples)


WRONG = (3, None, 2.5, ["why?", None], b"why?", [], np.zeros(3))


@pytest.mark.parametrize(("name", "what", "good"), [
    ("sft", "demonstration", [ASKED, ANSWER]), ("reward", "comparison", Comparison("why?", ["so", "no"])),
    ("dpo", "comparison", Comparison("why?", ["so", "no"])), ("policy", "prompt", "why?")])
def test_invalid_examples_are_named_by_their_number(name, what, good):
    for wrong in WRONG:
        with pytest.raises(ValueError, match=rf"^{what} 2 of 3: .* not a (conversation|comparison|prompt): expected"):
            task(name).read([good, wrong, good])
        with pytest.raises(ValueError, match=f"^{what} 1 of 1: "):
            task(name).read([good, good], [wrong])
    with pytest.raises(ValueError, match=rf"^{what} 2 of 2: .*found the keys \['a'\]"):
        task(name).read([good, {"a": 1}])
    with pytest.raises(ValueError, match=f"there is no {what}: the list is empty"):
        task(name).read([])
    for data in ("why?", {"prompt": "why?"}, 7, iter([good])):
        with pytest.raises(ValueError, match=f"expected a list of {what}s, not a"):
            task(name).read(data)
    with pytest.raises(ValueError, match=f"of 1 {what}s leaves a part empty"):
        task(name).read([good])


@pytest.mark.parametrize(("conversation", "message"), [
    ([ANSWER, ASKED], "end with the assistant"), ([ASKED], "end with the assistant"),
    ([ASKED, Message("assistant", "so", is_learned=False)], "have an answer to learn"),
    ("why?", "is not a conversation"), ([ASKED, {"role": "assistant", "content": "so"}], "not an object with 'role'"),
])
def test_conversations_that_teach_nothing(conversation, message):
    with pytest.raises(ValueError, match=f"demonstration 1 of 1: .*{message}"):
        task("sft").read([conversation], [conversation])


@pytest.mark.parametrize("texts", [[1, 2], ["a", None], [b"a"], [["a"]], [{"text": "a"}], [np.str_("a"), 3]])
def test_texts_that_are_none(texts, tokenizer):
    with pytest.raises(ValueError, match=r"^line of text \d of \d is of type (int|NoneType|bytes|list|dict); expected"):
        LineRows.build(texts, tokenizer, 8)
    for data in ("a text", {"text": "a"}, 3, []):
        with pytest.raises(ValueError, match=r"expected a list of texts, not a (str|dict|int)|the list is empty"):
            check_texts(data)


@pytest.mark.parametrize("pairs", [[("a", None)], ["ab"], [("a", "b", "c")], [{"source": "a", "target": "b"}], [3],
                                   [("a", b"b")]])
def test_pairs_that_are_none(pairs, tokenizer):
    for read in (lambda: list(Pairs([("a", "b"), *pairs])), lambda: PackedPairs.build([("a", "b"), *pairs], tokenizer,
                                                                                       8, 8)):
        with pytest.raises(ValueError, match="^pair 2 is .*; expected two strings, a source and a target"):
            read()
    for data in ("ab", {"a": "b"}, 3):
        with pytest.raises(ValueError, match="expected pairs of sentences, such as a list"):
            Pairs(data)


def test_messages_that_are_none(tokenizer):
    for messages in (["why?"], [None], [{"role": "user", "content": "why?"}], [3]):
        for encode in (encode_conversation, encode_prompt):
            with pytest.raises(ValueError, match=r"a conversation must be a list of tj.data.Message\(role, cont"):
                encode(messages, tokenizer)
        with pytest.raises(ValueError, match="^conversation 2: a conversation must be a list of"):
            PackedConversations.build([[ASKED, ANSWER], messages], tokenizer, 32)
    with pytest.raises(ValueError, match="a conversation must be a list of messages, not a int"):
        encode_prompt(3, tokenizer)
    with pytest.raises(ValueError, match="responses must be a list of texts, not a str"):
        Comparison("why?", "so")


@pytest.mark.parametrize("tokens", [["a", "b"], [[1, 2, 3]], [1.5, 2.5, 3.5], np.zeros((2, 3), int)])
def test_windows_refuse_arrays_that_are_not_token_ids(tokens):
    with pytest.raises(ValueError, match=r"tokens must be integers \[num_tokens\], got "):
        Windows(tokens, 1)
    assert len(Windows([1, 2, 3], 1)) == 2
