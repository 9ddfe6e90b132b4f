"""The ladder of the speedrun: every entry is a valid config, and what the program does with entries."""

import datetime
import json

import pytest

from benchmarks.cpu import speedrun

LADDER = speedrun.read_ladder()


@pytest.mark.parametrize("entry", LADDER, ids=lambda entry: f"{entry['target']}, {entry['change'][:30]}")
def test_an_entry_is_a_config_with_no_or_five_losses(entry):
    config = speedrun.config_of(entry)
    assert config.sample.every == 0 and config.eval.every > config.steps
    assert len(entry["losses"]) in (0, len(speedrun.SEEDS)) and all(0.5 < loss < 4.5 for loss in entry["losses"])
    datetime.date.fromisoformat(entry["date"])
    assert entry["change"].endswith(".") and config.optim.warmup_steps < config.steps


def test_entries_are_in_the_order_of_their_dates():
    dates = [entry["date"] for entry in LADDER]
    assert dates == sorted(dates)


def test_settings_are_those_of_the_config():
    entry = {**LADDER[0], "settings": {"steps": 7, "model.model_dim": 64, "optim.name": "muon"}}
    config = speedrun.config_of(entry)
    assert (config.steps, config.model.mlp_dim, config.optim.name) == (7, 256, "muon")
    with pytest.raises(ValueError, match="OptimConfig has no field 'peak'"):
        speedrun.config_of({**entry, "settings": {"optim.peak": 1.0}})
    with pytest.raises(ValueError, match="there is no entry for the target 0.10; there are"):
        speedrun.speedrun("input.txt", 1, ["0.10"])


@pytest.mark.long
def test_a_new_entry_is_measured_and_the_best_one_is_run(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    small = {"steps": 4, "batch_size": 2, "model.max_len": 16, "model.model_dim": 16, "model.num_layers": 1,
             "optim.warmup_steps": 1}
    new = {"target": 5.0, "date": "2026-11-30", "change": "A test.", "settings": small, "losses": []}
    unreached = {**new, "target": 0.1, "losses": [2.0] * 5}
    monkeypatch.setattr(speedrun, "LADDER", tmp_path / "ladder.json")
    speedrun.LADDER.write_text(json.dumps([new, unreached]))
    monkeypatch.setattr(speedrun.importlib.util, "find_spec", lambda *names: None)  # the peer is measured elsewhere
    row, other = speedrun.speedrun(str(tmp_path / "input.txt"), 1)
    assert row["lowest"] <= row["mean loss"] <= row["highest"] and row["reached"] == "True"
    assert (row["steps"], row["tokens"]) == ("4", 128.0) and row["seconds"] > 0
    assert other == {"target": "0.10", "reached": "by no entry"}
    measured = speedrun.read_ladder()[0]
    assert len(measured["losses"]) == 5 and min(measured["losses"]) == pytest.approx(row["lowest"])
