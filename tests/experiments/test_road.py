"""The road at a tiny size: the plan, measurements beside NumPy, tables, resume, errors."""

import json

import jax
import numpy as np
import pytest

import transformer_jax as tj
from experiments import road_figures, road_pairs, road_plan, road_text
from experiments.word_senses import senses
from transformer_jax.config import DataConfig, RecurrentConfig, TokenizerConfig
from transformer_jax.models.functional import make_model
from transformer_jax.training.bundle import Bundle

TEXT = "the cat sat on the mat. " * 60
TOKENIZER = tj.Tokenizer.train([TEXT], kind="char")
CONFIG = tj.ExperimentConfig(model=RecurrentConfig(max_len=16, model_dim=8), batch_size=8,
                             data=DataConfig(tokenizer=TokenizerConfig(kind="char")))


def test_windows_hold_every_token_once_as_a_target():
    windows = road_text.held_out_windows(TOKENIZER, TEXT[:400])
    ids = TOKENIZER.encode(TEXT[:400])
    assert windows.shape == (3, 129) and windows[:, 1:].reshape(-1).tolist() == ids[1:385]


@pytest.mark.long
def test_bits_per_byte_and_positions_are_those_of_the_logits():
    model = make_model(CONFIG.model.replace(vocab_size=TOKENIZER.vocab_size), key=jax.random.key(0))
    windows = road_text.held_out_windows(TOKENIZER, TEXT[:400])
    found = road_text.measure(Bundle(model, TOKENIZER, model.config), windows, "the")
    logits = np.asarray(tj.forward(model, windows[:, :-1]), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["loss_by_position"], losses.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["bits_per_byte"], losses.mean() / np.log(2), rtol=1e-4)  # a character is a byte
    assert found["sample"].startswith("the")


def test_more_context_helps_an_ngram_on_a_repeated_sentence():
    windows = road_text.held_out_windows(TOKENIZER, TEXT[:400])
    bits = [road_text.ngram(TEXT, order, TOKENIZER, windows, "t")["time"]["bits_per_byte"] for order in (1, 2, 4)]
    assert bits[0] > bits[1] > bits[2]


@pytest.mark.long
def test_a_plan_divides_the_time_and_is_used_again(tmp_path, monkeypatch):
    data = {"data": [TEXT], "held_out": [TEXT[:200]], "tokenizer": TOKENIZER}
    configs = {"small": CONFIG, "large": CONFIG.replace(model=CONFIG.model.replace(model_dim=16))}
    plan = road_plan.make_plan(tmp_path / "plan.json", configs, 0.5, **data)
    assert plan["small"]["token_steps"] == plan["large"]["token_steps"]
    times = [found["time_steps"] * found["step_seconds"] for found in plan.values()]
    if min(found["time_steps"] for found in plan.values()) > 60:  # no model is at the shortest training
        assert abs(times[0] - times[1]) < 0.1 * times[0]
    monkeypatch.setattr(road_plan, "train", None)  # the speed is not measured again
    assert road_plan.make_plan(tmp_path / "plan.json", configs, 0.5, **data) == plan
    with pytest.raises(ValueError, match="holds a plan of 0.5 minutes for small, large; use the same --minutes"):
        road_plan.make_plan(tmp_path / "plan.json", configs, 2.0, **data)
    configs["small"] = CONFIG.replace(batch_size=4)
    with pytest.raises(ValueError, match="was made with other settings of small"):
        road_plan.make_plan(tmp_path / "plan.json", configs, 0.5, **data)


def test_tables_and_pictures(tmp_path):
    measured = {"parameters": 1000, "bits_per_byte": 2.5, "seconds": 30.0, "steps": 100,
                "loss_by_position": [2.0, 1.5, 1.0], "exact": 0.5, "curve": [(1.0, 2.0), (2.0, 1.0)],
                "scores": [(1.0, 0.5), (2.0, 1.0)],
                "by_length": [{"longest": 10, "exact": 1.0}, {"longest": 20, "exact": 0.0}]}
    models = {"lstm": {"tokens": measured, "time": measured}}
    assert "| lstm | 1,000 | 2.500 | 100 steps, 30 s | 2.500 | 100 steps, 30 s |" in road_figures.text_table(models)
    assert "| lstm | 1,000 | 50.0% | 50.0% | exact to 10: 1, to 20: 0 | 2 |" in road_figures.pairs_table(models)
    road_figures.draw_text(models, {"lstm": [1.0, 0.1, 0.01]}, tmp_path)
    road_figures.draw_pairs(models, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"road.png", "positions.png", "gradients.png", "pairs.png"}
    json.dumps(models)


def test_the_time_to_an_equal_score_is_interpolated():
    curves = {"slow": [(10.0, 0.0), (20.0, 0.2), (30.0, 0.4)], "fast": [(10.0, 0.8), (20.0, 0.9)]}
    equal, seconds = road_pairs.seconds_to_equal_score(curves)
    assert equal == 0.4 and seconds == {"slow": 30.0, "fast": 5.0}
    assert road_pairs.seconds_to_equal_score({"a": [(10.0, 0.0), (20.0, 0.0)]}) == (0.0, {"a": 10.0})
    with_bad = road_pairs.seconds_to_equal_score({**curves, "bad": [(10.0, 0.0), (50.0, 0.1)]})
    assert with_bad == (equal, {**seconds, "bad": None})


def test_a_short_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="has 1,440 characters; the road needs at least 12,800"):
        road_text.run(str(tmp_path / "text.txt"), tmp_path, 1.0, "t")


def test_senses_are_measured_by_hand():
    vectors = np.asarray([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    found = senses(vectors, [0, 0, 1, 1])
    assert found["nearest"] == 1 and found["within"] > 0.99 and found["between"] < 0.2
    equal = senses(np.ones((4, 2)), [0, 0, 1, 1])
    np.testing.assert_allclose([equal["within"], equal["between"], equal["nearest"]], [1, 1, 1 / 3], atol=1e-6)
