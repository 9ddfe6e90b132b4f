"""Whole roads with tiny models: all trainings, the pictures, and the same result when they are
repeated."""

import pytest

import transformer_jax as tj
from experiments import road_figures, road_pairs, road_plan, road_text
from transformer_jax import recipes

GET = recipes.get
WORDS = ("cat", "dog", "mat", "log", "sun", "sea", "hen", "owl")


def tiny(name):
    config = GET(name)
    sizes = {"num_heads": 2, "num_layers": 1} if isinstance(config.model, tj.ModelConfig) else {"num_layers": 1}
    return config.replace(batch_size=8, model=config.model.replace(model_dim=16, **sizes))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(road_text.recipes, "get", tiny)
    monkeypatch.setattr(road_plan, "_MEASURED", 2)
    monkeypatch.setattr(road_plan, "_LEAST_STEPS", 8)


@pytest.mark.long
def test_a_text_is_measured_and_drawn_and_a_repetition_trains_nothing(small, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {a} saw the {b}." for a in WORDS for b in WORDS) * 16)
    found = road_text.run(str(text), tmp_path, 0.001, "the")
    assert set(found["models"]) == {*(f"{order}-gram" for order in range(1, 6)), "rnn", "lstm", "gru", "gpt"}
    for name, model in found["models"].items():
        assert 0 < model["time"]["bits_per_byte"] < 10, name
        assert len(model["time"]["loss_by_position"]) == 128
    assert len(found["gradients"]["lstm"]) == 128
    road_figures.draw_text(found["models"], found["gradients"], tmp_path)
    monkeypatch.setattr(road_plan, "train", None)
    assert road_text.run(str(text), tmp_path, 0.001, "the") == found


@pytest.mark.long
def test_pairs_are_measured_by_length_and_aligned(small, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(f"the {a} and the {b}\t{b} {a}" for a in WORDS for b in WORDS for _ in range(20)))
    found = road_pairs.run(str(pairs), tmp_path, 0.001, None)
    assert set(found["models"]) == {"rnn", "attention", "transformer"}
    for model in found["models"].values():
        assert len(model["time"]["by_length"]) == 4 and 0 <= model["time"]["exact"] <= 1
        assert [loss for _, loss in model["time"]["curve"]] and len(model["time"]["scores"]) == 8
    road_figures.draw_pairs(found["models"], tmp_path)
    assert (tmp_path / "alignment_attention.png").exists() and (tmp_path / "alignment_transformer.png").exists()
    assert not (tmp_path / "alignment_rnn.png").exists()
