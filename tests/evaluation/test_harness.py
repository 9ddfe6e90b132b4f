"""lm-eval measures our models, and finds the scores that it finds for the same weights in
transformers."""

import importlib.util
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pytest

from transformer_jax.cli import lm_eval as program
from transformer_jax.evaluation.continuations import _scores

pytest.importorskip("lm_eval", reason='needs pip install "transformer_jax[lm-eval]"')
pytest.importorskip("tokenizers", reason='needs pip install "transformer_jax[hf]"')

import transformer_jax as tj
from tests.evaluation import harness_model, make_harness_scores
from transformer_jax.decoding.loop import decode
from transformer_jax.evaluation import HarnessModel


@pytest.fixture(scope="module")
def measured():
    before = _scores._cache_size(), decode.num_programs
    found = harness_model.measure(HarnessModel(bundle=harness_model.make_bundle(), batch_size=8))
    return found, (_scores._cache_size() - before[0], decode.num_programs - before[1])


def check_equal(found, expected):
    for name in harness_model.TASK_NAMES:
        for ours, theirs in zip(found["answers"][name], expected["answers"][name], strict=True):
            if isinstance(ours[0][0], str):
                assert ours == theirs, name
            else:
                np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=2e-4, err_msg=name)
        assert found["scores"][name] == pytest.approx(expected["scores"][name], rel=2e-3), name


@pytest.mark.long
def test_scores_are_those_of_transformers(measured):
    expected = json.loads(make_harness_scores.PATH.read_text("utf-8"))
    check_equal(measured[0], expected)
    assert any(answer[0][0] for answer in expected["answers"]["tj_arithmetic"])
    assert expected["scores"]["tj_text"]["bits_per_byte,none"] > 0


@pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "accelerate")),
                    reason="needs torch, transformers and accelerate; the test above compares with their stored scores")
def test_the_stored_scores_are_those_of_transformers_now(measured):
    check_equal(measured[0], make_harness_scores.measure_exported())


def test_few_programs_are_compiled(measured):
    """Rows of 16, 32, 64 and 128 tokens; and the two lengths of new text of the tasks."""
    assert measured[1][0] <= 4 and measured[1][1] <= 2


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.mark.long
def test_a_text_that_is_sampled_does_not_depend_on_its_batch():
    requests = [Request(text, {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}) for text in ("", "a", "the")]
    texts = [HarnessModel(bundle=harness_model.make_bundle(), batch_size=size).generate_until(requests, True)
             for size in (2, 8)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(), "name one model"),
    (dict(workdir="a", model="b"), "name one model"),
    (dict(bundle="no tokenizer"), "stored with its tokenizer"),
])
def test_wrong_models(arguments, message):
    if "bundle" in arguments:
        bundle = harness_model.make_bundle()
        arguments["bundle"] = tj.Bundle(model=bundle.model, tokenizer=None, config=bundle.config)
    with pytest.raises(ValueError, match=message):
        HarnessModel(**arguments)


@pytest.mark.parametrize(("settings", "message"), [
    ({"max_gen_toks": 128}, "128 new tokens, but the model reads 128"), ({"beams": 3}, "sets beams"),
])
def test_wrong_settings_of_a_task(settings, message):
    with pytest.raises(ValueError, match=message):
        HarnessModel(bundle=harness_model.make_bundle()).generate_until([Request("a", settings)], True)


def test_the_program_adds_its_defaults():
    assert program.with_defaults(["--tasks", "a", "-b", "4"]) == [
        "run", "--tasks", "a", "-b", "4", "--include_path", str(program.TASKS), "--model", "transformer_jax"]
    assert program.with_defaults(["ls", "tasks", "--include_path=x"]) == ["ls", "tasks", "--include_path=x"]


@pytest.mark.long  # the harness reads the names of all its tasks
def test_the_program_prints_one_line_for_a_wrong_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["transformer-jax lm-eval", "--model_args", f"model={tmp_path}/none", "--tasks",
                                      "tj_cloze"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: there is no directory {tmp_path}/none"
