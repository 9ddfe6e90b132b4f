"""The programs from end to end, as a new user runs them."""

import json
import math
import os
import pathlib
import random
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig
from transformer_jax.settings import from_dict
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state

WORDS = ("the", "king", "said", "to", "his", "men", "that", "night", "we", "would", "come", "home", "over", "water")
SHAPE = ("--config.model.num_layers=1", "--config.model.num_heads=2", "--config.model.model_dim=16",
         "--config.model.max_len=16", "--config.model.unroll=1", "--config.batch_size=8")
STEPS = 300
TRAIN = ("--config=shakespeare_char", *SHAPE, f"--config.steps={STEPS}", "--config.model.dropout=0.2",
         "--config.optim.accumulation=2", "--config.optim.warmup_steps=10", "--config.optim.peak_lr=0.01",
         "--config.log_every=1", "--config.checkpoint.every=40", "--config.eval.every=90", "--config.sample.every=0")
SHORT = ("--config=shakespeare_char", *SHAPE, "--config.steps=2", "--config.optim.warmup_steps=1",
         "--config.eval.every=2", "--config.sample.every=0")


def verse(seed, num_lines):
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=8)) + "\n" for _ in range(num_lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "verse.txt"
    path.write_text(verse(0, 300))
    return path


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(start, corpus, tmp_path_factory):
    """An uninterrupted run in a process of its own: its workdir and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    status, out, err = finish(start("train", *TRAIN, f"--config.data.path={corpus}", f"--workdir={workdir}"))
    assert status == 0, err
    return workdir, out, err


def compiled(start):
    """The entries of the compilation cache, without the times at which they were read."""
    return {path.name for path in (start.home / "transformer_jax" / "compiled").glob("*-cache")}


def final_digest(workdir):
    """The digest of parameters, optimizer state, step and key."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    config = from_dict(ExperimentConfig, checkpoints.restore({}).metadata["config"])
    state = abstract_state(lambda key: tj.Decoder(config.model, key=key), make_optimizer(config.optim, config.steps))
    restored = checkpoints.restore(state)
    assert restored.step == int(restored.state.step) == STEPS
    return tree_digest(restored.state)


def losses(workdir):
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")}
            for line in read_metrics(workdir / "metrics.jsonl")]


def test_training_says_what_it_does(whole):
    workdir, out, err = whole
    assert "tokens to train on" in out and "1 cpu device(s)" in out
    assert f"step {STEPS}: validation loss " in out
    assert out.endswith(f'done; next: transformer-jax generate --workdir={workdir} --prompt="..."\n')
    assert "100%" in err and "tokens/s" in err and "Traceback" not in err and "Warning" not in err
    lines = [line for line in losses(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    logged = [line for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line]
    assert all(line["tokens_per_second"] > 0 and line["model_flops_per_second"] > 0 for line in logged[1:])
    assert "tokens_per_second" not in logged[0]  # the step that compiled
    assert list(workdir.glob("tensorboard/*events*"))


def test_the_compilation_cache_is_private(whole, start):
    directory = start.home / "transformer_jax" / "compiled"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert any(name.startswith("jit_train_step") for name in compiled(start))


@pytest.mark.long
def test_stopped_three_ways_and_resumed_it_ends_as_the_whole_run(whole, start, corpus, tmp_path):
    """Stops the run by Ctrl-C, SIGTERM and kill -9 at arbitrary steps, with dropout, accumulation
    and several epochs."""
    before = compiled(start)
    stops = []
    for signum, step in ((signal.SIGINT, 30), (signal.SIGTERM, 100), (signal.SIGKILL, 190)):
        process = start("train", *TRAIN, f"--config.data.path={corpus}", f"--workdir={tmp_path}/run")
        deadline = time.monotonic() + 200
        while not any(line["step"] >= step for line in read_metrics(tmp_path / "run" / "metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, finish(process)
            time.sleep(0.002)
        process.send_signal(signum)
        status, out, err = finish(process)
        stops.append(Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps()[-1])
        if signum == signal.SIGKILL:
            assert status == -9 and stops[-1] % 40 == 0
        else:
            assert status == 128 + signum and "Traceback" not in err
            assert err.endswith(f"{signum.name}: saved step {stops[-1]}; run the same command again to resume\n")
            assert stops[-1] == read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= step
        assert len(stops) == 1 or f"resuming from step {stops[-2]} of {STEPS}" in out
    assert stops[0] < stops[1] <= stops[2] < STEPS
    status, out, err = finish(start("train", *TRAIN, f"--config.data.path={corpus}", f"--workdir={tmp_path}/run"))
    assert status == 0 and f"resuming from step {stops[-1]} of {STEPS}" in out, err
    assert final_digest(tmp_path / "run") == final_digest(whole[0])
    assert losses(tmp_path / "run") == losses(whole[0])
    assert tj.load(tmp_path / "run", step="best").step == tj.load(whole[0], step="best").step
    # Four starts of a program that ran before: all programs that take long to compile are read from
    # the cache.
    assert compiled(start) == before


# With a trained model


def test_generate(program, whole):
    arguments = (f"--workdir={whole[0]}", "--prompt=the king ", "--max_new_tokens=40", "--temperature=0.9",
                 "--top_k=12", "--top_p=0.95", "--min_p=0.01")
    first, again, streamed, other = (program("generate", *arguments, *more) for more in
                                     ((), (), ("--stream",), ("--seed=1",)))
    assert first.status == 0 and first.out.startswith("the king ") and len(first.out.strip()) > len("the king ") + 5
    assert first.out == again.out == streamed.out != other.out
    assert first.err == streamed.err == ""
    from_code = tj.load(whole[0])
    sampling = tj.Sampling(temperature=0.9, top_k=12, top_p=0.95, min_p=0.01)
    result = tj.generate(from_code.model, "the king ", tokenizer=from_code.tokenizer, key=jax.random.key(0),
                         max_new_tokens=40, sampling=sampling, slide=True)
    assert first.out == f"the king {result.texts[0]}\n"


def test_generate_stops_and_repeats(program, whole):
    greedy = (f"--workdir={whole[0]}", "--prompt=the ", "--max_new_tokens=30", "--temperature=0")
    text = program("generate", *greedy).out.removesuffix("\n")
    stop = text[8:10]
    end = text.index(stop, 4)
    for more in ((), ("--stream",)):
        assert program("generate", *greedy, f"--stop={stop}", "--stop=@@", *more).out == f"{text[:end]}\n"
    samples = program("generate", f"--workdir={whole[0]}", "--num_samples=3", "--max_new_tokens=8").out
    assert len(set(samples.split("-" * 40 + "\n"))) == 3
    assert program("generate", *greedy, "--step=best").status == 0


def test_evaluate_is_the_mean_over_all_windows(program, whole, tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text(verse(1, 12) + "Ω!")  # two characters that the model has never seen
    ended = program("evaluate", f"--workdir={whole[0]}", f"--data={path}", "--batch_size=8")
    bundle = tj.load(whole[0])
    text = path.read_text()
    tokens = np.array([bundle.tokenizer.end_of_text_id, *bundle.tokenizer.encode(text)])
    total = 0.0
    for begin in range(0, len(tokens) - 1, 16):  # window by window, the last one shorter
        window = tokens[begin:begin + 17]
        padded = np.zeros((1, 16), int)
        padded[0, :len(window) - 1] = window[:-1]
        logits = np.asarray(tj.forward(bundle.model, jnp.asarray(padded)), np.float64)[0, :len(window) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(window) - 1), window[1:]].sum()
    loss = total / (len(tokens) - 1)
    num_bytes = len(text.encode())
    assert ended.status == 0
    assert "1 tokens replace characters that are not in the vocabulary" in ended.out
    assert f"step {STEPS}, {len(tokens) - 1:,} tokens, {num_bytes:,} bytes, windows of 16" in ended.out
    assert (f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}, {total / math.log(2) / num_bytes:.4f} "
            "bits per byte") in ended.out


def test_evaluate_agrees_with_the_validation_loss_of_training(program, whole, corpus, tmp_path):
    held_out = tmp_path / "tail.txt"
    text = corpus.read_text()
    held_out.write_text(text[int((len(text) + 1) * 0.9):])  # validation begins inside the text, this with <|endoftext|>
    logged = losses(whole[0])[-1]["validation_loss"]
    out = program("evaluate", f"--workdir={whole[0]}", f"--data={held_out}").out
    assert float(out.split("loss ")[1].split()[0]) == pytest.approx(logged, abs=0.02)


# The quickstart


@pytest.mark.long
def test_quickstart(program, tmp_path, monkeypatch):
    workdir = tmp_path / "quick"
    arguments = (*SHAPE, "--config.steps=6", "--config.eval.every=3", "--config.eval.max_batches=2",
                 "--config.checkpoint.every=3", "--config.sample.every=1", "--config.sample.max_new_tokens=12",
                 "--config.log_every=1", f"--workdir={workdir}")
    ended = program("quickstart", *arguments)
    assert ended.status == 0, ended
    sampled = [int(line.split()[2]) for line in ended.out.splitlines() if line.startswith("--- step ")]
    assert sampled == [0, 1, 2, 4, 6]  # before the first step, growing, and the last
    assert "tokens/s" in ended.err
    with Image.open(workdir / "loss.png") as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image.convert("L")))) > 50
    assert [line["step"] for line in losses(workdir) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert list(workdir.glob("tensorboard/*events*"))
    bundle = tj.load(workdir)
    assert bundle.step == 6 and bundle.experiment.steps == 6
    before = tree_digest(bundle.model), losses(workdir)

    # The commands that the program prints at its end work.
    commands = [line.split()[2:] for line in ended.out.splitlines() if line.startswith("  python -m experiments.")]
    assert [command[0] for command in commands] == [f"experiments.{name}" for name in (
        "generate", "generate", "evaluate", "train")]
    snippet = ended.out.split("In Python:\n")[1]
    scope = {}
    exec("\n".join(line.strip() for line in snippet.splitlines()), scope)
    assert scope["bundle"].step == 6
    assert program("generate", f"--workdir={workdir}", "--prompt=def ", "--top_p=0.9", "--num_samples=3").status == 0

    again = program("quickstart", *arguments)
    assert again.status == 0 and "resuming from step 6 of 6" in again.out and "--- step" not in again.out
    assert (tree_digest(tj.load(workdir).model), losses(workdir)) == before


# What to train on


@pytest.mark.long
def test_globs_and_jsonl(program, tmp_path):
    for part in range(3):
        (tmp_path / f"part{part}.txt").write_text(verse(part, 20))
    with (tmp_path / "all.jsonl").open("w") as file:
        for part in range(3):
            file.write(json.dumps({"body": verse(part, 20)}) + "\n")
    by_glob = program("train", *SHORT, f"--config.data.path={tmp_path}/part*.txt", f"--workdir={tmp_path}/glob")
    by_jsonl = program("train", *SHORT, f"--config.data.path={tmp_path}/all.jsonl", "--config.data.text_key=body",
                       f"--workdir={tmp_path}/jsonl")
    assert by_glob.status == by_jsonl.status == 0
    assert by_glob.out.splitlines()[0] == by_jsonl.out.splitlines()[0]
    assert losses(tmp_path / "glob") == losses(tmp_path / "jsonl")


@pytest.mark.long
def test_a_validation_file_of_its_own(program, tmp_path):
    (tmp_path / "train.txt").write_text(verse(0, 40))
    (tmp_path / "held_out.txt").write_text(verse(1, 10))
    ended = program("train", *SHORT, f"--config.data.path={tmp_path}/train.txt",
                    f"--config.data.validation_path={tmp_path}/held_out.txt", f"--workdir={tmp_path}/run")
    sizes = [len(verse(0, 40)) + 1, len(verse(1, 10)) + 1]
    assert ended.out.startswith(f"{sizes[0]:,} tokens to train on, {sizes[1]:,} held out")


@pytest.mark.long
def test_a_setting_is_switched_off_by_none(program, tmp_path, corpus):
    """Also accepts a value that looks like a number; a setting that must be a number stays one."""
    ended = program("train", *SHORT, "--config.optim.clip_norm=None", f"--config.data.path={corpus}",
                    f"--workdir={tmp_path}/run")
    assert ended.status == 0, ended
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["optim"]["clip_norm"] is None
    assert "'None'" in program("train", *SHORT, "--config.steps=None").error


@pytest.mark.long
def test_several_documents_do_not_attend_to_each_other(program, tmp_path, monkeypatch):
    """Several documents train with segment ids, one document without them."""
    from transformer_jax.models import decoder

    recorded = []
    original = decoder.Decoder.__call__

    def watched(self, *args, **kwargs):
        recorded.append(kwargs.get("segment_ids_BT") is not None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(decoder.Decoder, "__call__", watched)
    (tmp_path / "one.txt").write_text(verse(0, 40))
    (tmp_path / "two.txt").write_text(verse(0, 20) + "<|endoftext|>\n" + verse(1, 20))
    for name, segmented in (("one", False), ("two", True)):
        recorded.clear()
        assert program("train", *SHORT, f"--config.data.path={tmp_path}/{name}.txt",
                       f"--workdir={tmp_path}/{name}").status == 0
        assert recorded and set(recorded) == {segmented}


@pytest.mark.long
def test_a_tfds_data_set_by_name(start, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS data sets need: pip install tensorflow-datasets")

    class TinyVerseOfTheTest(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": ((part, {"text": verse(part, 20)}) for part in range(3))}

        def _generate_examples(self):
            raise NotImplementedError

    TinyVerseOfTheTest(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    arguments = (*SHORT, "--config.data.tfds=tiny_verse_of_the_test", f"--workdir={tmp_path}/run")
    status, out, err = finish(start("train", *arguments, TFDS_DATA_DIR=str(tmp_path / "tfds")))
    assert status == 0, err
    num_tokens = sum(len(verse(part, 20)) + 1 for part in range(3))
    assert out.startswith(f"{int(num_tokens * 0.9):,} tokens to train on")


def test_tfds_that_is_not_installed(program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    ended = program("train", *SHORT, "--config.data.tfds=tiny_shakespeare", f"--workdir={tmp_path}/run")
    assert ended.error == "error: reading a TFDS data set needs: pip install tensorflow-datasets"
    assert not os.path.exists(tmp_path / "run") and not list(pathlib.Path(tmp_path).iterdir())
