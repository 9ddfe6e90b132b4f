"""The program that cleans corpora: its errors, signals, and the same bytes after them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("datasketch", reason="near duplicates need the extra 'corpus'")
pytest.importorskip("sklearn", reason="the quality filter needs the extra 'corpus'")

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_it_prints_the_report_and_refuses_wrong_arguments(program, tmp_path):
    write(tmp_path / "a.jsonl", ["one fine day in the old town", "One fine  day in the old town", "another text"])
    ended = program("clean_corpus", f"--data={tmp_path}/*.jsonl", f"--output={tmp_path}/clean")
    assert ended.status == 0 and "exact duplicates            1   33.33%" in ended.out, ended
    assert ended.out.rstrip().endswith(f"--config.data.path={tmp_path}/clean/corpus.jsonl --workdir=...")
    for arguments, message in [
        ([f"--output={tmp_path}/x"], "--data is missing"), ([f"--data={tmp_path}/a.jsonl"], "--output is missing"),
        ([f"--data={tmp_path}/none.txt", f"--output={tmp_path}/x"], "no text file at"),
        ([f"--data={tmp_path}/a.jsonl", f"--output={tmp_path}/x", "--good=a"], "needs both good and bad examples"),
        ([f"--data={tmp_path}/a.jsonl", f"--output={tmp_path}/x", "--threshold=2"], "threshold=2.0 must be in (0, 1]"),
        ([f"--data={tmp_path}/*.jsonl", f"--output={tmp_path}/clean", "--seed=1"], "other settings: seed: 0 -> 1"),
    ]:
        assert message in program("clean_corpus", *arguments).error
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_sigterm_and_ctrl_c_keep_the_work(tmp_path):
    """The program runs in a separate process, which receives one signal in the first step that it
    reaches, and then another."""
    words = [f"word{number}" for number in range(997)]
    write(tmp_path / "a.jsonl", [" ".join(words[(i * 7 + j * j) % 997] for j in range(150)) for i in range(12000)])
    write(tmp_path / "good.jsonl", [" ".join(words[:500])] * 3)
    write(tmp_path / "bad.jsonl", [" ".join(words[500:])] * 3)

    def start(output):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.clean_corpus", f"--data={tmp_path}/a.jsonl", f"--output={output}",
             f"--good={tmp_path}/good.jsonl", f"--bad={tmp_path}/bad.jsonl"], cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    for signum, name in ((signal.SIGTERM, "2_quality.bin.partial"), (signal.SIGINT, "3_near.bin.partial")):
        process = start(tmp_path / "stopped")
        partial = tmp_path / "stopped" / name
        while process.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 128 + signum, errors
        assert errors.rstrip().endswith("run the same command again to resume") and "Traceback" not in errors
        assert partial.exists()
    assert start(tmp_path / "stopped").wait() == start(tmp_path / "whole").wait() == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "stopped").iterdir()) and "corpus.jsonl" in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
