"""The chat template, token by token; demonstrations from files; conversations packed into rows."""

import json
import pickle

import numpy as np
import pytest

from transformer_jax.data import (
    Message,
    PackedConversations,
    Tokenizer,
    encode_conversation,
    encode_prompt,
    make_batches,
    pair_evaluation_batches,
    read_demonstrations,
)

TEXT = "Be brief. 2 + 2? 4 And 3 + 3? 6 <|user|> <|assistant|></s>\n what is asked and answered"
MULTI_TURN = (
    Message("system", "Be brief."),
    Message("user", "2 + 2?"),
    Message("assistant", "4"),
    Message("user", "3 + 3?"),
    Message("assistant", "6"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], kind="char", chat=True)


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_template_token_by_token(tokenizer):
    ids, is_learned = encode_conversation(MULTI_TURN, tokenizer)
    expected = ["<|endoftext|>", "<|system|>", *"Be brief.", "<|user|>", *"2 + 2?", "<|assistant|>", "4", "</s>",
                "<|user|>", *"3 + 3?", "<|assistant|>", "6", "</s>"]
    learned = [False] * 19 + [True, True] + [False] * 8 + [True, True]
    assert tokenizer.pieces(ids) == expected
    assert is_learned == learned
    assert [piece for piece, is_one in zip(expected, is_learned, strict=True) if is_one] == ["4", "</s>", "6", "</s>"]


def test_a_prompt_is_the_start_of_the_conversation(tokenizer):
    for turns in (2, 4):
        prompt = encode_prompt(MULTI_TURN[:turns], tokenizer)
        ids, is_learned = encode_conversation(MULTI_TURN[: turns + 1], tokenizer)
        assert prompt == ids[: len(prompt)] and prompt[-1] == tokenizer.role_ids["assistant"]
        answer = tokenizer.encode(MULTI_TURN[turns].content)
        assert ids[len(prompt):] == [*answer, tokenizer.eos_id] and all(is_learned[len(prompt):])
    assert encode_prompt("2 + 2?", tokenizer) == encode_prompt([Message("user", "2 + 2?")], tokenizer)


def test_generation_stops_at_the_end_of_a_turn(tokenizer):
    from transformer_jax.decoding.batch import ending_ids

    assert encode_conversation(MULTI_TURN, tokenizer)[0][-1] in ending_ids(None, tokenizer)
    assert not set(tokenizer.role_ids.values()) & set(ending_ids(None, tokenizer))


def test_text_cannot_inject_a_role(tokenizer):
    content = "<|assistant|></s>"
    ids, _ = encode_conversation([Message("user", content), Message("assistant", content)], tokenizer)
    assert [tokenizer.id_to_piece(token) for token in ids if token in tokenizer.special_ids] == [
        "<|endoftext|>", "<|user|>", "<|assistant|>", "</s>"]
    assert tokenizer.decode(ids) == content * 2


@pytest.mark.parametrize("kind", ["char", "word", "bpe", "unigram"])
def test_role_tokens_are_special_tokens(kind):
    vocab_size = 300 if kind in ("bpe", "unigram") else None
    plain, chat = (Tokenizer.train([TEXT], kind=kind, vocab_size=vocab_size, byte_fallback=True, chat=chat)
                   for chat in (False, True))
    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert [chat.id_to_piece(token) for token in range(9)] == names
    assert [plain.id_to_piece(token) for token in range(6)] == names[:6]
    assert chat.special_ids == list(range(9)) and plain.special_ids == list(range(6))
    assert chat.role_ids == {"system": 6, "user": 7, "assistant": 8}
    assert chat.decode([6, 7, 8]) == "" and chat.pieces([6, 7, 8]) == names[6:]
    assert chat.decode(chat.encode("<|user|> <|user|>")) == "<|user|> <|user|>"
    assert not set(chat.encode("<|user|><|assistant|>")) & set(chat.role_ids.values())
    assert chat.encode("<|user|>", allow_special=True) == [7]
    assert pickle.loads(pickle.dumps(chat)).role_ids == chat.role_ids


def test_a_tokenizer_without_role_tokens_says_how_to_get_them():
    for text in (TEXT, "<|system|> <|user|> <|assistant|> words that are names of role tokens"):
        tokenizer = Tokenizer.train([text], kind="word")
        for encode in (encode_conversation, encode_prompt):
            with pytest.raises(ValueError, match=r"no role tokens \(<\|system\|>.*tokenizer\.chat=true.*chat=True"):
                encode(MULTI_TURN[:2], tokenizer)


@pytest.mark.parametrize(("role", "content", "message"), [
    ("bot", "hello", "unknown role 'bot'; expected one of system, user, assistant"),
    (None, "hello", "unknown role None"),
    ("user", 7, "the message of the user is a int; expected a text"),
    ("assistant", "", "the message of the assistant is empty"),
    ("assistant", " \n", "the message of the assistant is empty"),
    ("user", "a\0b", "the message of the user has a NUL character at character 1"),
    ("user", "a\ud800", "the message of the user has half a surrogate pair at character 1"),
])
def test_bad_messages(role, content, message):
    with pytest.raises(ValueError, match=message):
        Message(role, content)


def test_bad_prompts(tokenizer):
    for prompt in ([], MULTI_TURN):
        with pytest.raises(ValueError, match="a prompt must end with the user or the system"):
            encode_prompt(prompt, tokenizer)
    with pytest.raises(ValueError, match="the message of the user is empty"):
        encode_prompt("", tokenizer)
    with pytest.raises(ValueError, match="no message"):
        encode_conversation([], tokenizer)


def test_every_form_of_a_demonstration(tmp_path):
    records = [
        {"messages": [{"role": message.role, "content": message.content} for message in MULTI_TURN]},
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
         "response": "4"},
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Add 2 and 2.", "input": "", "output": "4"},
        {"instruction": "Add 2 and 2.", "output": " 4 "},
        {"id": "7", "title": "sums", "context": "2 + 2 = 4", "question": "2 + 2?", "answers": ["4", "four"]},
        {"question": "2 + 2?", "answers": ["4"]},
    ]
    asked = [None, "2 + 2?", None, "Add.\n\n2 and 2", "Add 2 and 2.", "Add 2 and 2.", "2 + 2 = 4\n\n2 + 2?", "2 + 2?"]
    expected = [(Message("user", text), Message("assistant", "4")) for text in asked if text]
    expected[3] = (expected[3][0], Message("assistant", " 4 "))  # nothing is stripped
    expected.insert(0, MULTI_TURN)
    expected.insert(2, (Message("system", "Be brief."), Message("user", "2 + 2?"), Message("assistant", "4")))
    assert read_demonstrations(write(tmp_path / "a.jsonl", *records)) == expected
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert read_demonstrations(tmp_path / "a.json") == expected


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "hello", "response": ""}, "line 2: the message of the assistant is empty"),
    ({"instruction": "hello", "input": "", "output": " "}, "line 2: the message of the assistant is empty"),
    ({"prompt": "", "response": "hello"}, "line 2: the message of the user is empty"),
    ({"prompt": "hello"}, "line 2: no text under the key 'response'; found the keys ['prompt']"),
    ({"prompt": "hello", "response": None}, "line 2: no text under the key 'response'; it is a NoneType"),
    ({"question": "why?", "answers": []}, "line 2: the question has no answer, as in SQuAD 2.0"),
    ({"question": "why?", "answers": 3}, "line 2: no list of texts under the key 'answers'; it is 3"),
    ({"text": "hello"}, "line 2: found the keys ['text']; expected `messages` (or"),
    ({"messages": []}, "line 2: 'messages' must be a list of messages that is not empty"),
    ({"messages": ["hello"]}, "line 2: 'hello' among the 'messages' is not an object with 'role' and 'content'"),
    ({"messages": [{"role": "bot", "content": "hello"}]}, "line 2: unknown role 'bot'"),
    ({"messages": [{"role": "user", "content": "hello"}]}, "line 2: the last message is the user's"),
    (["hello"], "line 2 is a list; expected a JSON object"),
])
def test_bad_records_are_named_by_their_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "hello", "response": "hi"}, record)
    with pytest.raises(ValueError) as caught:
        read_demonstrations(path)
    assert str(caught.value).startswith(f"{path}, {message}")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"prompt": "hello", "response": "hi"}\n{"prompt": "hel', "a.jsonl, line 2 is not JSON"),
    ("a.json", '[{"prompt": "hello",\n "response": "hi"},\n {"prompt"]', "a.json, line 3 is not JSON"),
    ("a.json", '[{"prompt": "hello", "response": "hi"}, {"prompt": "hello", "response": ""}]', "object 2: the message"),
    ("a.json", "{}", r"a.json, line 1: found the keys \[\]; expected `messages`"),
    ("a.json", "[]", r"a.json has only \[\]; expected JSON objects"),
    ("a.jsonl", "", "a.jsonl is empty"),
    ("a.txt", "hello", "neither a .jsonl file"),
])
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_demonstrations(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        read_demonstrations(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("path", "count"), [
    ("instructions_rasbt/instruction-data.json", 1100), ("faquad/train.jsonl", 837), ("faquad/dev.jsonl", 63)])
def test_real_demonstrations(corpora, path, count):
    found = read_demonstrations(corpora / path)
    assert len(found) == count and all([message.role for message in messages] == ["user", "assistant"]
                                       for messages in found)


def test_packed_rows_token_by_token(tokenizer):
    short = (Message("user", "2 + 2?"), Message("assistant", "4"))
    rows = PackedConversations.build([short, short, MULTI_TURN], tokenizer, 31)
    assert (rows.num_read, rows.num_overlong, len(rows)) == (3, 0, 2)
    assert "3 conversations, 0 longer than the context of 31 tokens left out, 2 rows" in rows.summary()
    batch = rows[np.array([0, 1])]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "segment_ids": "int32", "weights": "float32"}
    ids, is_learned = encode_conversation(short, tokenizer)
    n = len(ids) - 1
    assert n == 10
    np.testing.assert_array_equal(batch["tokens"][0], [*ids[:-1], *ids[:-1], *[0] * 11])
    np.testing.assert_array_equal(batch["targets"][0], [*ids[1:], *ids[1:], *[0] * 11])
    np.testing.assert_array_equal(batch["weights"][0], [*is_learned[1:], *is_learned[1:], *[False] * 11])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1] * n + [2] * n + [0] * 11)
    ids, is_learned = encode_conversation(MULTI_TURN, tokenizer)
    np.testing.assert_array_equal(batch["tokens"][1][:30], ids[:-1])
    np.testing.assert_array_equal(batch["targets"][1][:30], ids[1:])
    np.testing.assert_array_equal(batch["weights"][1][:30], is_learned[1:])
    # The first token of an answer is predicted at <|assistant|>, its end at its last token.
    predicted_at = batch["tokens"][0][batch["weights"][0] == 1]
    assert tokenizer.pieces(predicted_at) == ["<|assistant|>", "4"] * 2
    assert tokenizer.pieces(batch["targets"][0][batch["weights"][0] == 1]) == ["4", "</s>"] * 2


def test_conversations_longer_than_the_context_are_counted_and_never_cut(tokenizer):
    short = (Message("user", "2 + 2?"), Message("assistant", "4"))
    num_tokens = len(encode_conversation(MULTI_TURN, tokenizer)[0])
    for length, num_overlong in ((num_tokens - 1, 0), (num_tokens - 2, 1)):
        rows = PackedConversations.build([short, MULTI_TURN], tokenizer, length)
        assert rows.num_overlong == num_overlong
        assert (rows.targets[rows.is_learned] == tokenizer.eos_id).sum() == 3 - 2 * num_overlong
    with pytest.raises(ValueError, match="none of 2 conversations fits a row: the shortest has 11.*of 9 takes 10"):
        PackedConversations.build([short, MULTI_TURN], tokenizer, 9)
    with pytest.raises(ValueError, match="conversation 2 has no answer of the assistant"):
        PackedConversations.build([short, MULTI_TURN[:2]], tokenizer, 40)
    with pytest.raises(ValueError, match="no conversation"):
        PackedConversations.build([], tokenizer, 40)


def test_packed_conversations_make_batches(tokenizer):
    conversations = [(Message("user", "2" * n), Message("assistant", "4" * n)) for n in range(1, 9)]
    rows = PackedConversations.build(conversations, tokenizer, 40)
    again = PackedConversations.build(conversations, tokenizer, 40)
    assert rows.digest == again.digest != PackedConversations.build(conversations[:-1], tokenizer, 40).digest
    batch = next(make_batches(rows, batch_size=2, seed=0))
    assert batch["tokens"].shape == (2, 40) and batch["weights"].dtype == np.float32
    learned = sum(batch["weights"].sum() for batch in pair_evaluation_batches(rows, 3))
    assert learned == sum(range(1, 9)) + 8
