"""The data of the studies of circuits is what they say, and its batches can be resumed."""

import numpy as np

from experiments import circuit_data
from experiments.study_training import DrawnBatches


def test_batches_continue_where_they_were_stopped():
    batches = DrawnBatches(circuit_data.draw_repeating, 4, 0)
    drawn = [next(batches) for _ in range(3)]
    again = DrawnBatches(circuit_data.draw_repeating, 4, 0)
    again.set_state(2)
    np.testing.assert_array_equal(next(again)["tokens"], drawn[2]["tokens"])
    assert again.get_state() == 3 and (drawn[0]["tokens"][:, 1:] == drawn[0]["targets"][:, :-1]).all()


def test_sequences_repeat_with_their_period():
    rows = circuit_data.draw_repeating(np.random.default_rng(0), 50)
    periods = {next(p for p in range(1, 65) if (row[p:] == row[:-p]).all()) for row in rows}
    assert min(periods) >= circuit_data.SHORTEST and max(periods) <= circuit_data.LONGEST and len(periods) > 10


def test_the_answer_is_the_name_that_does_not_give():
    questions = circuit_data.Questions(0, 20)
    for row, other, (answer, subject, third) in zip(questions.clean, questions.corrupted, questions.names, strict=True):
        words = [circuit_data.WORDS[token] for token in row]
        assert words[-4:-2] == ["gave", "a"] and words[-1] == "to" and row[9] == subject and other[9] == third
        assert {row[1], row[3]} == {answer, subject} and len({answer, subject, third}) == 3
    logits = np.zeros((20, 14, len(circuit_data.WORDS)))
    logits[np.arange(20), -1, questions.names[:, 0]] = 2.0
    assert questions.difference(logits) == 2.0
