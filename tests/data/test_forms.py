"""Forms of demonstrations and comparisons as they are published: SQuAD, TRL, ShareGPT, Alpaca,
OpenAI."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data import (
    Comparison,
    Message,
    PackedConversations,
    Tokenizer,
    encode_conversation,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)

ASKED = (Message("user", "2 + 2?"),)
ANSWER = (Message("assistant", "4"),)
SYSTEM = (Message("system", "Be brief."),)
USER, SAYS, WRONG = ({"role": role, "content": content} for role, content in (
    ("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))
BRIEF = {"role": "system", "content": "Be brief."}
UNLEARNED = (Message("user", "1 + 1?"), Message("assistant", "2", is_learned=False))
EARLIER = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.mark.parametrize(("record", "expected"), [
    ({"context": "", "question": "2 + 2?", "answers": {"text": ["4", "four"], "answer_start": [0, 4]}}, ASKED + ANSWER),
    ({"question": "2 + 2?", "answers": [{"text": "4", "answer_start": 0}]}, ASKED + ANSWER),
    ({"question": "2 + 2?", "answer": "4"}, ASKED + ANSWER),
    ({"prompt": "2 + 2?", "completion": "4"}, ASKED + ANSWER),
    ({"prompt": [USER], "completion": [SAYS]}, ASKED + ANSWER),
    ({"prompt": [BRIEF, *EARLIER, USER], "completion": [SAYS]}, SYSTEM + UNLEARNED + ASKED + ANSWER),
    ({"prompt": [USER], "response": [SAYS]}, ASKED + ANSWER),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, ASKED + ANSWER),
    ({"system": "Be brief.", "conversations": [{"from": "user", "value": "2 + 2?"},
                                               {"from": "assistant", "value": "4"}]}, SYSTEM + ASKED + ANSWER),
    ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 2?"},
                        {"from": "gpt", "value": "4"}], "system": ""}, SYSTEM + ASKED + ANSWER),
    ({"conversations": [USER, SAYS]}, ASKED + ANSWER),
    ({"messages": [USER | {"content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}, SAYS]},
     ASKED + ANSWER),
    ({"instruction": "2 + 2?", "input": None, "output": "4"}, ASKED + ANSWER),
    ({"instruction": "2 + 2?", "input": "", "output": "4", "system": "Be brief."}, SYSTEM + ASKED + ANSWER),
    ({"instruction": "2 + 2?", "context": "", "response": "4"}, ASKED + ANSWER),
    ({"messages": None, "prompt": "2 + 2?", "completion": "4", "instruction": None}, ASKED + ANSWER),
    ({"question": "2 + 2?", "answer": {"text": "4", "answer_start": 0}}, ASKED + ANSWER),
    ({"question": "2 + 2?", "answers": {"text": "4"}}, ASKED + ANSWER),
    ({"question": "2 + 2?", "answers": "4"}, ASKED + ANSWER),
    ({"id": 1, "system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"}, SYSTEM + ASKED + ANSWER),
    ({"system_prompt": "", "question": "2 + 2?", "response": "4", "history": []}, ASKED + ANSWER),
    ({"instruction": "2 +", "input": "", "context": "2?", "response": "4"}, (Message("user", "2 +\n\n2?"), *ANSWER)),
    ({"conversations": [{"from": "Human", "value": "2 + 2?"}, {"from": "bing", "value": "4"}]}, ASKED + ANSWER),
    ({"messages": [{"role": "developer", "content": "Be brief."}, USER, SAYS | {"role": "model"}]},
     SYSTEM + ASKED + ANSWER),
    ({"messages": [BRIEF | {"content": ""}, USER, SAYS]}, ASKED + ANSWER),
    ({"messages": [EARLIER[0], EARLIER[1] | {"train": False}, USER, SAYS | {"train": True}]},
     UNLEARNED + ASKED + ANSWER),
])
def test_demonstrations_as_published(tmp_path, record, expected):
    assert read_demonstrations(write(tmp_path / "a.jsonl", record)) == [expected]
    assert read_prompts(tmp_path / "a.jsonl") == [expected[:-1]] or UNLEARNED[1] in expected


@pytest.mark.parametrize(("record", "expected"), [
    ({"prompt": [USER], "chosen": [SAYS], "rejected": [WRONG]}, ASKED),
    ({"chosen": [USER, SAYS], "rejected": [USER, WRONG]}, ASKED),
    ({"chosen": [BRIEF, USER, SAYS], "rejected": [BRIEF, USER, WRONG]}, SYSTEM + ASKED),
    ({"prompt": "2 + 2?", "chosen": [USER, SAYS], "rejected": [USER, WRONG]}, ASKED),
    ({"prompt": "2 + 2?", "chosen": [BRIEF, USER, SAYS], "rejected": [BRIEF, USER, WRONG]}, SYSTEM + ASKED),
    ({"prompt": [BRIEF, USER], "chosen": [BRIEF, USER, SAYS], "rejected": [BRIEF, USER, WRONG]}, SYSTEM + ASKED),
    ({"prompt": "2 + 2?", "chosen": [SAYS], "rejected": [WRONG]}, ASKED),
    ({"system": "Be brief.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, SYSTEM + ASKED),
    ({"system": "Be brief.", "prompt": "2 + 2?", "chosen": [USER, SAYS], "rejected": [USER, WRONG]}, SYSTEM + ASKED),
    ({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}, ASKED),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
      "rejected": {"from": "gpt", "value": "5"}}, ASKED),
])
def test_comparisons_as_published(tmp_path, record, expected):
    assert read_comparisons(write(tmp_path / "a.jsonl", record)) == [Comparison(expected, ("4", "5"))]
    assert read_prompts(tmp_path / "a.jsonl") == [expected]


@pytest.mark.parametrize(("record", "message"), [
    ({"question": "2 + 2?", "answers": {"text": [], "answer_start": []}}, "the question has no answer, as in SQuAD 2"),
    ({"question": "2 + 2?", "answer": {"answer_start": 0}}, "no list of texts under the key 'text'"),
    ({"messages": [BRIEF | {"content": " "}]}, "'messages' has nothing but an empty message of the system"),
    ({"instruction": "2 + 2?", "output": "4", "history": [["1 + 1?", "2"]]}, "'history' is not supported"),
    ({"system_prompt": "Be long.", "messages": [BRIEF, USER, SAYS]}, "a `system_prompt` text, but its messages begin"),
    ({"prompt": "2 + 2?", "completion": "4", "label": False}, "`label` marks answers as good or bad"),
    ({"prompt": "2 + 2?", "completion": "4", "response": "4"}, "'response' and 'completion' could both be the answer"),
    ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, r"no text under the key 'response'; found the keys \['cho"),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}]}, "the last message is the user's"),
    ({"conversations": [{"from": "tool", "value": "2 + 2?"}]}, "unknown role 'tool' under 'from'; expected one of use"),
    ({"conversations": [{"from": "human"}]}, "among the 'conversations' is not an object with 'role' and 'content'"),
    ({"messages": [USER, SAYS | {"tool_calls": [{"id": "1"}]}]}, "'tool_calls' is not supported"),
    ({"messages": [USER, SAYS], "tools": [{"name": "f"}]}, "'tools' is not supported"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "the assistant is a list"),
    ({"messages": [USER, SAYS | {"weight": 2}]}, r"has the weight 2; expected 0 \(not learned\) or 1"),
    ({"messages": [USER, SAYS | {"weight": "0"}]}, "has the weight '0'"),
    ({"messages": [USER | {"weight": 1}, SAYS]}, "a message of the user has weight 1, but only"),
    ({"messages": [USER, SAYS | {"weight": 0}]}, "every message of the assistant has weight 0"),
    ({"messages": [BRIEF, USER, SAYS], "system": "Be long."}, "a `system` text, but its messages begin with a diff"),
    ({"title": "sums", "paragraphs": []}, r"found the keys \['paragraphs', 'title'\]; expected `messages`"),
])
def test_errors_name_the_unreadable_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "completion": "4"}, record)
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
        read_demonstrations(path)


@pytest.mark.parametrize(("record", "message"), [
    ({"chosen": [USER, SAYS], "rejected": [USER, SAYS]}, "in 'chosen'.*other answer are none"),
    ({"chosen": [USER, SAYS, USER, SAYS], "rejected": [USER, WRONG]}, r"are \['assistant', 'user', 'assistant'\]"),
    ({"chosen": [USER, SAYS], "rejected": "5"}, "expected a prompt, or whole conversations"),
    ({"prompt": "2 + 2?", "chosen": [USER, SAYS], "rejected": "5"}, "no text under the key 'chosen'; it is a list"),
    ({"prompt": "3 + 3?", "chosen": [USER, SAYS], "rejected": [USER, WRONG]}, "the prompt is not what the messages of"),
    ({"chosen": [SAYS], "rejected": [WRONG]}, "a prompt must end with the user"),
    ({"prompt": "2 + 2?", "completion": "4", "label": True}, r"'responses'; found the keys \['completion', 'lab"),
])
def test_comparisons_that_are_not_read(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, record)
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
        read_comparisons(path)


def test_a_message_of_weight_0_is_read_and_not_learned(tmp_path):
    messages = [USER, WRONG | {"weight": 0}, USER, SAYS | {"weight": 1}, USER | {"weight": 0}, SAYS]
    (found,) = read_demonstrations(write(tmp_path / "a.jsonl", {"messages": messages}))
    assert [message.is_learned for message in found if message.role == "assistant"] == [False, True, True]
    tokenizer = Tokenizer.train(["2 + 2? 4 5"], kind="char", chat=True)
    ids, is_learned = encode_conversation(found, tokenizer)
    learned = [token for token, is_one in zip(ids, is_learned, strict=True) if is_one]
    assert tokenizer.pieces(learned) == ["4", "</s>", "4", "</s>"]
    rows = PackedConversations.build([found], tokenizer, 60)
    assert rows.is_learned.sum() == 4 and tokenizer.encode("5")[0] not in rows.targets[rows.is_learned]


def test_the_published_files_of_squad(tmp_path):
    """https://rajpurkar.github.io/SQuAD-explorer has articles, with paragraphs, with questions."""
    def question(text, *answers):
        return {"id": text, "question": text, "answers": [{"text": answer, "answer_start": 0} for answer in answers]}

    articles = [{"title": "A", "paragraphs": [{"context": "a b", "qas": [question("1?", "a", "a b"),
                                                                         question("2?", "b")]},
                                              {"context": "c", "qas": [question("3?", "c")]}]},
                {"title": "B", "paragraphs": [{"context": "d", "qas": [question("4?", "d")]}]}]
    expected = [(Message("user", asked), Message("assistant", answer)) for asked, answer in (
        ("a b\n\n1?", "a"), ("a b\n\n2?", "b"), ("c\n\n3?", "c"), ("d\n\n4?", "d"))]
    path = tmp_path / "train-v1.1.json"
    whole = {"version": "1.1", "data": articles}
    for text in (json.dumps(whole), json.dumps(whole, indent=1), json.dumps(articles),
                 "".join(f"{json.dumps(article)}\n" for article in articles)):
        path.write_text(text)
        assert read_demonstrations(path) == expected
        assert read_prompts(path) == [conversation[:1] for conversation in expected]
    articles[0]["paragraphs"][1]["qas"][0]["answers"] = []
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=rf"^{path}, line 1, data\[0\], paragraphs\[1\], qas\[0\]: the question has "
                                         "no answer, as in SQuAD 2.0"):
        read_demonstrations(path)


def test_any_record_is_read_or_refused_in_one_line(tmp_path):
    """Values of every type in every field either are read or raise a ValueError that names the
    place."""
    message = st.fixed_dictionaries({}, optional={
        "role": st.sampled_from(["user", "assistant", "system", "bot", ["user"], None, 3]), "content": st.just("a"),
        "from": st.sampled_from(["human", "gpt", ["human"], {}, None]), "value": st.sampled_from(["a", 3, None]),
        "weight": st.sampled_from([0, 1, 0.5, "1", [], {}, True])})
    value = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(message, max_size=3),
                      st.just({"text": ["a"]}), message, st.just([[]]), st.just(["a", 3]), st.just(float("1e308")))
    keys = ("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "context",
            "output",
            "question", "answers", "answer", "chosen", "rejected", "responses", "ranks", "system", "label", "tools")
    path = tmp_path / "a.jsonl"

    @settings(max_examples=100, deadline=None)
    @given(st.dictionaries(st.sampled_from(keys), value, max_size=5))
    def check(record):
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        for read in (read_demonstrations, read_comparisons, read_prompts):
            try:
                read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}, line 1: ") and "\n" not in str(error)

    check()
