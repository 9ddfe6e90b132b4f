"""Damaged files of a run: a file that has a good copy is repaired, and every other one gives an
error of one line that names it."""

import concurrent.futures
import json
import os
import shutil
import threading

import jax.numpy as jnp
import pytest

import transformer_jax as tj
from transformer_jax.data.step_file import Appended
from transformer_jax.data.token_file import TokenFile
from transformer_jax.runs.workdir import Workdir, locked
from transformer_jax.settings import to_dict
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.loggers import JsonlLogger
from transformer_jax.training.metrics import read_metrics

CONFIG = tj.config.ExperimentConfig(steps=7)
TOKENIZER = tj.Tokenizer.train(["the king said to his men"], kind="char")
OTHER = tj.Tokenizer.train(["another text"], kind="char").to_bytes()


@pytest.fixture
def started(tmp_path):
    """A directory that belongs to a run, with two checkpoints of it."""
    Workdir(tmp_path, CONFIG).claim(["digest"], TOKENIZER)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.zeros(1)}, metadata={}, files={"tokenizer.model": TOKENIZER.to_bytes()})
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text[: len(text) // 2], r"run.json, line \d+ is not JSON: "),
    (lambda text: "\0" * len(text), "run.json, line 1 is not JSON: "),
    (lambda text: "[" * 100_000, "run.json has lists or objects nested more than 100 deep"),
    (lambda text: "[3]", "run.json is a list; expected a JSON object"),
    (lambda text: json.dumps({"contents": []}), "run.json has no 'config'"),
    (lambda text: text.replace('"digest"', "7"), r"run.json: contents\[0\] is 7; expected text"),
    (lambda text: text.replace('"steps": 7', '"steps": "7"'),
     "run.json: ExperimentConfig.steps='7': expected int, got str"),
    (lambda text: text.replace('"steps": 7', f'"steps": {10**30}'),
     "run.json: ExperimentConfig.steps is a whole number of 100 bits; expected one of 64 bits"),
    (lambda text: text.replace('"optim": {', '"optim": 3, "optin": {'),
     "run.json: ExperimentConfig has no field 'optin'; did you mean 'optim'"),
    (lambda text: json.dumps({"config": to_dict(CONFIG) | {"optim": 3}, "contents": []}),
     "run.json: ExperimentConfig.optim=3: expected OptimConfig, got int"),
])
def test_a_damaged_record_of_the_run(started, change, message):
    path = started / "run.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"^{started}/{message}.*; this file records the config") as raised:
        Workdir(started, CONFIG)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", OTHER, TOKENIZER.to_bytes()[:-1], b"\0" + TOKENIZER.to_bytes()[1:]])
@pytest.mark.parametrize("has_digest", [True, False])
def test_a_damaged_tokenizer_is_replaced_by_the_copy_in_a_checkpoint(started, content, has_digest):
    path, record = started / "tokenizer.model", json.loads((started / "run.json").read_text())
    path.unlink() if content is None else path.write_bytes(content)
    if not has_digest:  # as earlier versions wrote it
        del record["tokenizer"]
        (started / "run.json").write_text(json.dumps(record))
    (started / "checkpoints" / "2" / "files" / "tokenizer.model").write_bytes(OTHER)  # damaged too: passed over
    state = "missing" if content is None else "damaged"
    copy = started / "checkpoints" / "1" / "files" / "tokenizer.model"
    with pytest.warns(UserWarning, match=f"^{path} is {state}; it is replaced by the copy in {copy}$"):
        assert Workdir(started, CONFIG).tokenizer().digest == TOKENIZER.digest
    assert path.read_bytes() == TOKENIZER.to_bytes()


def test_a_damaged_tokenizer_without_a_copy(tmp_path):
    Workdir(tmp_path, CONFIG).claim([], TOKENIZER)
    (tmp_path / "tokenizer.model").write_bytes(OTHER)
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.model is damaged, and no checkpoint of this run has "
                                         "a copy; restore the file that this run started with"):
        Workdir(tmp_path, CONFIG).tokenizer()


@pytest.mark.filterwarnings("error")
def test_an_intact_tokenizer_is_read_without_warnings(started):
    record = json.loads((started / "run.json").read_text())
    assert Workdir(started, CONFIG).tokenizer().digest == TOKENIZER.digest
    del record["tokenizer"]
    (started / "run.json").write_text(json.dumps(record))
    assert Workdir(started, CONFIG).tokenizer().digest == TOKENIZER.digest


def test_a_damaged_line_of_metrics_does_not_stop_a_run_from_going_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.5}\n{"step": "2", "loss": 3.4}\n{"st\0p": 3}\n{"step": 4, "loss": 3.3}\n'
                    '{"step": 5, "lo')
    with pytest.warns(UserWarning, match=f"left out: {path}, line 2: step is .*; {path}, line 3 is not JSON"):
        logger = JsonlLogger(tmp_path, 4)
    logger.write(5, {"loss": 3.2})
    logger.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 4, 5]


def no_file(path, kind):
    """Puts a directory or a named pipe, which nobody writes to, in the place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "a named pipe" else path.mkdir()


@pytest.mark.parametrize("kind", ["a named pipe", "a directory"])
def test_no_plain_file_is_named_and_not_waited_for(started, kind):
    no_file(started / "run.json", kind)
    with pytest.raises(ValueError, match=f"run.json is {kind}; expected a file; this file records the config"):
        Workdir(started, CONFIG)
    no_file(started / "metrics.jsonl", kind)
    with pytest.raises(ValueError, match=f"metrics.jsonl is {kind}; expected a file"):
        read_metrics(started / "metrics.jsonl")
    no_file(started / "tokenizer.model", kind)
    with pytest.raises(ValueError, match=f"tokenizer.model is {kind}; expected a file"):
        tj.Tokenizer.load(started / "tokenizer.model")
    no_file(started / ".lock", kind)
    with pytest.raises(ValueError, match=r"\.lock is not a file, so .* cannot be locked; delete it"), locked(started):
        pass


@pytest.mark.parametrize("kind", ["a named pipe", "a directory"])
def test_no_plain_file_in_the_place_of_one_that_is_written(started, kind):
    for name in ("run.json.partial", "metrics.jsonl.partial", "step.bin.partial"):
        no_file(started / name, kind)
    expected = {"match": rf"\.partial is {kind}, but a file of this name is written; delete it"}
    with pytest.raises(ValueError, **expected):
        Workdir(started, CONFIG).claim(["digest"], TOKENIZER)
    with pytest.raises(ValueError, **expected):
        JsonlLogger(started)
    with pytest.raises(ValueError, **expected):
        Appended(started / "step.bin")


def test_a_named_pipe_in_the_place_of_stored_tokens(tmp_path):
    TokenFile.build(["the king"], TOKENIZER, tmp_path)
    path, = tmp_path.glob("*.bin")
    no_file(path, "a named pipe")
    assert TOKENIZER.decode(TokenFile.build(["the king"], TOKENIZER, tmp_path).tokens[1:]) == "the king"


def test_an_empty_directory_is_no_step(started):
    (started / "checkpoints" / "99").mkdir()
    (started / "checkpoints" / "100").touch()
    checkpoints = Checkpoints(started / "checkpoints")
    assert checkpoints.steps() == [1, 2] and checkpoints.restore({}).step == 2
    checkpoints.save(99, {"w": jnp.ones(1)}, metadata={})
    checkpoints.close()
    assert checkpoints.restore({}).step == 99


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "metadata.json", "files/tokenizer.model"])
def test_a_named_pipe_in_a_checkpoint_is_damage(started, name):
    no_file(started / "checkpoints" / "2" / name, "a named pipe")
    checkpoints = Checkpoints(started / "checkpoints", read_only=True)
    with pytest.raises(ValueError, match="2 is damaged"):
        checkpoints.restore({}, step=2)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.restore({}).step == 1


def test_of_runs_that_begin_at_the_same_moment_one_gets_the_workdir(tmp_path):
    together, ended = threading.Barrier(4), threading.Barrier(4)

    def begin(number):
        together.wait()
        try:
            with locked(tmp_path / str(number) / "run"):
                ended.wait()
            return "used"
        except ValueError as error:
            ended.wait()
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number in range(20):
            outcomes = sorted(pool.map(begin, [number] * 4))
            assert outcomes[3] == "used" and all(
                outcome == f"another run is using {tmp_path}/{number}/run; wait until it ends, or use another workdir"
                for outcome in outcomes[:3])


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe", "file/below"):
        with pytest.raises(ValueError, match="cannot be made, because it, or a part of its path, is a file"):
            with locked(tmp_path / name):
                pass
    shutil.rmtree(tmp_path)
