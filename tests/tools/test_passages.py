"""Passages of documents: how texts are split, and which ones are found for a question."""

import collections
import math
import re

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.tools.passages import split_passages

pytest.importorskip("bm25s", reason='needs pip install "transformer_jax[documents]"')

FILES = {"cats.txt": "The cat sleeps on the warm roof.\n\nCats drink milk. They do not drink wine.",
         "more/dogs.md": "# Dogs\n\nThe dog barks at the moon.",
         "sea.jsonl": '{"text": "A água do mar é salgada."}\n{"text": "The moon moves the sea."}\n',
         "image.png": "not a text"}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def bm25(texts, question):
    """Scores by the formula of Lucene, with k1 = 1.5 and b = 0.75."""
    split = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = np.zeros(len(texts))
    for word in re.findall(r"\w+", question.lower()):
        having = sum(word in words for words in split)
        idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for place, words in enumerate(split):
            count = collections.Counter(words)[word]
            scores[place] += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
    return scores


def test_passages_are_ranked_by_bm25(folder):
    passages = tj.tools.Passages.read(folder, max_words=8)
    assert [(passage.source, passage.number) for passage in passages.passages] == [
        ("cats.txt", 1), ("cats.txt", 2), ("more/dogs.md", 1), ("sea.jsonl", 1), ("sea.jsonl", 2)]
    texts = [passage.text for passage in passages.passages]
    for question in ("Where is the moon?", "água", "drink drink", "zebra"):
        expected = bm25(texts, question)
        found = passages.find(question, top_k=5)
        assert len(found) == (expected > 0).sum()
        np.testing.assert_allclose([passage.score for passage in found], -np.sort(-expected)[:len(found)], rtol=1e-5)
    assert passages.find("the dog", top_k=1)[0].text == "# Dogs\n\nThe dog barks at the moon."
    assert passages.find("água")[0].describe() == f"sea.jsonl, passage 1 (score {bm25(texts, 'água').max():.2f}): " \
        "A água do mar é salgada."


def test_long_paragraphs_are_split_after_sentences_and_nothing_is_lost():
    text = "One two three. Four five!\n\nSix.\n\n" + "word " * 7 + "end. Last one."
    passages = list(split_passages(text, 5))
    assert passages == ["One two three. Four five!", "Six.", "word word word word word", "word word end. Last one."]
    assert " ".join(" ".join(passages).split()) == " ".join(text.split())
    assert list(split_passages(" \n\n ", 5)) == []


@pytest.mark.long
def test_embeddings_of_an_encoder_find_the_same_text_first(folder):
    tokenizer = tj.Tokenizer.train(list(FILES.values()), kind="char")
    config = tj.ModelConfig(family="encoder", vocab_size=tokenizer.vocab_size, max_len=128, num_layers=1, num_heads=1,
                            model_dim=16)
    encoder = tj.Bundle(model=tj.Encoder(config, key=jax.random.key(0)), tokenizer=tokenizer, config=config)
    passages = tj.tools.Passages.read(folder, encoder=encoder)
    for passage in passages.passages:
        [found, *_] = passages.find(passage.text, top_k=2)
        assert found.text == passage.text and found.score == pytest.approx(1, abs=1e-5)
    vectors_PD = tj.embed(encoder.model, [passage.text for passage in passages.passages], tokenizer=tokenizer)
    expected = np.asarray(tj.similarity(tj.embed(encoder.model, ["moon"], tokenizer=tokenizer)[0], vectors_PD))
    found = passages.find("moon", top_k=len(passages.passages))
    np.testing.assert_allclose([passage.score for passage in found], -np.sort(-expected), atol=1e-5)


def test_as_many_passages_as_fit_come_before_the_question():
    tokenizer = tj.Tokenizer.train(["abc ?\n"], kind="char", chat=True)
    passages = [tj.tools.Passage("aaa", "f", 1), tj.tools.Passage("bbbb", "f", 2)]
    prompt = (tj.Message("user", "b?"), tj.Message("assistant", "c"), tj.Message("user", "a?"))
    size = len(tj.data.encode_prompt(prompt, tokenizer))
    for room, used, text in ((size + 11, passages, "aaa\n\nbbbb\n\na?"), (size + 10, passages[:1], "aaa\n\na?"),
                             (size, [], "a?")):
        messages, kept = tj.tools.with_passages(prompt, passages, tokenizer, room)
        assert (messages[:2], messages[2].content, kept) == (prompt[:2], text, used)
    with pytest.raises(ValueError, match=f"has {size} tokens, but there is room for {size - 1}"):
        tj.tools.with_passages(prompt, passages, tokenizer, size - 1)
    with pytest.raises(ValueError, match="the last message is the system's"):
        tj.tools.with_passages([tj.Message("system", "a")], passages, tokenizer, 50)


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match=r"is not a directory with files named \.txt"):
        tj.tools.Passages.read(tmp_path / "none")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no passage|empty|no text"):
        tj.tools.Passages.read(tmp_path)
