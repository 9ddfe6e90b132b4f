"""Exact match, F1 and ROUGE of answers, against values computed by hand and by rouge-score."""

import json

import jax
import pytest

import transformer_jax as tj
from transformer_jax.data.conversations import answer_end_ids
from transformer_jax.data.forms import question_of
from transformer_jax.tasks.answer_scores import answer_scores, exact_match, f1, normalized_answer

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason='needs pip install "transformer_jax[eval]"')


@pytest.mark.parametrize(("text", "language", "expected"), [
    ("The  Cat, sat!", "en", "cat sat"), ("an apple a day", "en", "apple day"),
    ("«Os» requisitos.", "pt", "requisitos"), ("R$ 5,00", "pt", "r 500"), ("", "en", ""),
])
def test_normalization(text, language, expected):
    assert normalized_answer(text, language) == expected


def test_f1_and_exact_match_by_hand():
    assert exact_match("the Cat!", ["a dog", "cat"]) == 1 and exact_match("cats", ["cat"]) == 0
    # Two of three words of the answer are among the four of the reference: 2 * 2 / (3 + 4).
    assert f1("red red ball", ["red ball is here"]) == pytest.approx(4 / 7)
    assert f1("red ball", ["blue", "the red ball"]) == 1
    assert f1("", ["the"]) == 1 and f1("", ["x"]) == 0


def test_rouge_is_that_of_the_library_for_english_and_keeps_accents():
    answer, reference = "the quick brown fox jumps", "the brown quick fox sleeps today"
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, answer)
    ours = answer_scores([answer], [[reference]])
    for name, score in theirs.items():
        assert ours[name] == pytest.approx(100 * score.fmeasure)
    assert answer_scores(["avó"], [["av"]], language="pt")["rouge1"] == 0


def test_the_nearest_of_several_references_counts():
    scores = answer_scores(["requisitos", "nada"], [["os requisitos", "tudo"], ["algo"]], language="pt")
    assert scores["exact_match"] == 50 and scores["f1"] == 50 and scores["rouge1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(("answers", "references", "message"), [
    ([], [], "0 answers"), (["a"], [], "1 answers and 0"), (["a"], [[]], "no empty list")])
def test_wrong_arguments(answers, references, message):
    with pytest.raises(ValueError, match=message):
        answer_scores(answers, references)


@pytest.mark.parametrize("answers", [
    ["a", "b"], {"text": ["a", "b"], "answer_start": [0, 3]}, [{"text": "a"}, {"text": "b"}]])
def test_all_answers_of_the_published_forms_are_read(answers):
    prompt, right = question_of({"question": "q", "context": "c", "answers": answers})
    assert prompt[-1].content == "c\n\nq" and right == ("a", "b")
    assert question_of({"prompt": "q", "response": "r"})[1] == ("r",)


@pytest.mark.long
def test_evaluate_lets_an_assistant_answer(tmp_path):
    questions = [{"question": "a?", "answers": ["aa", "b"]}, {"question": "b?" * 30, "answers": ["b"]}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    tokenizer = tj.Tokenizer.train(["ab?\n"], kind="char", chat=True)
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=32, num_layers=1, num_heads=1, model_dim=16)
    model = tj.Decoder(config, key=jax.random.key(0))
    prompt = tj.data.encode_prompt("a?", tokenizer)
    answer = tj.generate(model, [prompt], tokenizer=tokenizer, max_new_tokens=8, sampling=tj.Sampling(temperature=0),
                         end_ids=answer_end_ids(tokenizer)).texts[0].strip()
    bundle = tj.Bundle(model=model, tokenizer=tokenizer, config=config)
    found = tj.evaluate(bundle, questions[:1], task="sft", answers=True, max_new_tokens=8, batch_size=2)
    assert found["f1"] == pytest.approx(100 * f1(answer, ["aa", "b"]))
    with pytest.raises(ValueError, match="language='de' is not one of en, pt"):
        tj.evaluate(bundle, questions[:1], task="sft", answers=True, language="de")
    measured = tj.evaluate(bundle, str(path), task="sft", answers=True, max_new_tokens=8, batch_size=2)
    assert measured["answered"] == 1 and measured["conversations"] == 2
    assert measured["f1"] == pytest.approx(100 * f1(answer, ["aa", "b"]))
