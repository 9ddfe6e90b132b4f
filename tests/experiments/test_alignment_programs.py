"""The stages of an assistant as a user runs them: reward model, DPO, PPO, GRPO and the comparison;
and errors of the user."""

import gzip
import json
import random
import signal
import sys
import time

import jax
import numpy as np
import pytest

import transformer_jax as tj
from experiments import assistant_data
from transformer_jax.config import ModelConfig
from transformer_jax.data import Tokenizer
from transformer_jax.models.heads import RewardModel
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")

NOUNS, GOOD, BAD = ("film", "story", "cast", "plot"), ("great", "fine", "warm"), ("dull", "weak", "cold")
STEPS = 30
SMALL = ("--config.model.dropout=0", "--config.optim.warmup_steps=2", "--config.log_every=1",
         "--config.sample.max_new_tokens=8", "--config.data.validation_fraction=0.25")
PPO = (*SMALL, f"--config.steps={STEPS}", "--config.batch_size=8", "--config.rl.num_prompts=8",
       "--config.rl.max_new_tokens=8", "--config.rl.epochs=10", "--config.eval.every=15", "--config.checkpoint.every=7",
       "--config.sample.every=15")
REWARD_FUNCTIONS = """
import time

def vowels(texts):
    time.sleep(0.3)
    return [float(sum(map(text.count, "aeiou"))) for text in texts]

def nothing(texts):
    return [float("nan")] * len(texts)

def one(texts):
    return [1.0]
"""


def sentence(draw, words):
    return f"the {draw.choice(NOUNS)} is {draw.choice(words)} and {draw.choice(words)}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Comparisons of praise and blame, and prompts."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(64):
            file.write(json.dumps({"prompt": f"the {draw.choice(NOUNS)}", "chosen": sentence(draw, GOOD),
                                   "rejected": sentence(draw, BAD)}) + "\n")
    (folder / "prompts.txt").write_text("".join(f"{word} {noun}\n" for word in ("the", "a", "it") for noun in NOUNS))
    (folder / "rewards_of_the_test.py").write_text(REWARD_FUNCTIONS)
    return folder


def make_policy(folder, seed=0, chat=True):
    """A policy with random weights, from which a stage starts."""
    tokenizer = Tokenizer.train([" ".join((*NOUNS, *GOOD, *BAD, "the is and a it"))], kind="char", chat=chat)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_len=64, num_layers=1, num_heads=2, model_dim=32,
                         positions="rope", init_std=0.1)
    tj.save(folder, Bundle(tj.Decoder(config, key=jax.random.key(seed)), tokenizer, config))
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def importable(files):
    sys.path.insert(0, str(files))
    yield
    sys.path.remove(str(files))


@pytest.fixture(scope="module")
def whole(start, policy, files, tmp_path_factory):
    """An uninterrupted run of PPO in a process of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    process = start("ppo", *ppo_arguments(policy, files, workdir), PYTHONPATH=str(files))
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return workdir, out, err


def ppo_arguments(policy, files, workdir, reward="rewards_of_the_test:vowels"):
    return (*PPO, f"--model={policy}", f"--workdir={workdir}", f"--config.data.path={files}/prompts.txt",
            f"--config.rl.reward={reward}")


def deterministic(workdir):
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")}
            for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.long
def test_ppo_says_what_it_does(whole, policy):
    workdir, out, err = whole
    assert "9 prompts, 3 held out" in out and "step 30: validation loss -" in out and "validation kl" in out
    assert "--- step 0 ---" in out and "--- step 30 ---" in out and "100%" in err and "Traceback" not in err
    assert sorted(int(path.stem) for path in (workdir / "answers").iterdir()) == [0, 15, 30]
    drawn = [line for line in deterministic(workdir) if "explained_variance" in line]
    assert [line["step"] for line in drawn] == [0, 10, 20]
    loaded = tj.load(workdir)  # a policy like any other, with a value head
    assert loaded.config.use_value_head and loaded.step == STEPS
    assert tj.generate(loaded.model, ["it"], tokenizer=loaded.tokenizer, key=jax.random.key(0), max_new_tokens=4).texts


@pytest.mark.long
def test_ppo_stopped_in_a_rollout_ends_as_the_whole_run(whole, start, policy, files, tmp_path, final_digest):
    """Ctrl-C and kill -9 in the middle of rollouts, which last 10 updates; checkpoints come every
    7."""
    workdir = tmp_path / "run"
    for signum, step in ((signal.SIGINT, 4), (signal.SIGKILL, 16)):
        process = start("ppo", *ppo_arguments(policy, files, workdir), PYTHONPATH=str(files))
        deadline = time.monotonic() + 400
        while not any(line["step"] >= step for line in read_metrics(workdir / "metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        process.send_signal(signum)
        process.communicate(timeout=100)
        assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum)
        saved = Checkpoints(workdir / "checkpoints", read_only=True)
        last = saved.restore({})
        assert 0 < last.metadata["data"]["turn"] < 10 and last.step < STEPS
    process = start("ppo", *ppo_arguments(policy, files, workdir), PYTHONPATH=str(files))
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and f"resuming from step {last.step} of 30" in out, err
    assert final_digest(workdir) == final_digest(whole[0])
    assert deterministic(workdir) == deterministic(whole[0])
    assert tree_digest(tj.load(workdir).model) == tree_digest(tj.load(whole[0]).model)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "reward"


@pytest.mark.long
def test_reward_dpo_and_grpo(program, policy, files, reward, tmp_path):
    """Runs the stages one after the other, because each needs the one before it. A finished stage
    that is started again ends with the same result."""
    arguments = (*SMALL, f"--model={policy}", f"--config.data.path={files}/pairs.jsonl")
    for _ in range(2):
        ended = program("reward", *arguments, f"--workdir={reward}", "--config.steps=40", "--config.batch_size=8",
                        "--config.optim.peak_lr=3e-3", "--config.eval.every=20", "--config.sample.every=20")
        assert ended.status == 0, ended
        accuracy = float(ended.out.split("prefers the better answer in ")[1].split("%")[0])
        assert accuracy > 90 and "48 comparisons, 16 held out" in ended.out
    bundle = tj.load(reward, step="best")
    assert isinstance(bundle.model, RewardModel) and float(bundle.model.std[...]) != 1.0
    metrics = read_metrics(reward / "metrics.jsonl")
    assert {"accuracy", "margin", "loss"} <= set(metrics[0])
    assert any("validation_accuracy" in line for line in metrics)

    ended = program("dpo", *arguments, f"--workdir={tmp_path}/dpo", "--config.steps=10", "--config.batch_size=8",
                    "--config.optim.peak_lr=3e-3", "--config.eval.every=5", "--config.sample.every=10")
    assert ended.status == 0 and "--- step 0 ---" in ended.out and "--- step 10 ---" in ended.out, ended
    losses = [line["validation_loss"] for line in read_metrics(tmp_path / "dpo" / "metrics.jsonl")
              if "validation_loss" in line]
    assert losses[-1] < losses[0] < 0.694
    assert len(list((tmp_path / "dpo" / "data").glob("reference-*.bin"))) == 2  # measured once

    ended = program("ppo", "--config=grpo", *SMALL, f"--model={policy}", f"--workdir={tmp_path}/grpo",
                    f"--config.data.path={files}/prompts.txt", f"--config.rl.reward={reward}", "--config.steps=4",
                    "--config.batch_size=8", "--config.rl.num_prompts=4", "--config.rl.num_samples=4",
                    "--config.rl.max_new_tokens=8", "--config.eval.every=4", "--config.sample.every=0")
    assert ended.status == 0, ended
    assert "reference_kl" in read_metrics(tmp_path / "grpo" / "metrics.jsonl")[1]
    assert not tj.load(tmp_path / "grpo").config.use_value_head

    compared = program("evaluate", "--compare", policy, tmp_path / "dpo", tmp_path / "grpo", f"--judge={reward}",
                       f"--data={files}/prompts.txt", "--max_new_tokens=8")
    assert compared.status == 0, compared
    rows = [line.split("|")[1].strip() for line in compared.out.splitlines()[-3:]]
    assert rows == [str(policy), f"{tmp_path}/dpo", f"{tmp_path}/grpo"]
    assert compared.out.count("% to ") == 2 and "distinct-2" in compared.out
    joined = program("evaluate", f"--compare={policy},{tmp_path}/dpo,{tmp_path}/grpo", f"--judge={reward}",
                     f"--data={files}/prompts.txt", "--max_new_tokens=8")
    assert joined.out == compared.out


@pytest.mark.long
def test_a_reward_model_with_adapters(program, policy, files, tmp_path):
    """Trains adapters for the decoder and all weights of the new head."""
    ended = program("reward", *SMALL, f"--model={policy}", f"--config.data.path={files}/pairs.jsonl",
                    f"--workdir={tmp_path}/run", "--config.steps=4", "--config.batch_size=8", "--config.lora.rank=2",
                    "--config.lora.whole=^head", "--config.eval.every=4", "--config.sample.every=0")
    assert ended.status == 0, ended
    assert isinstance(tj.load(tmp_path / "run", step="best").model, RewardModel)


@pytest.mark.long
@pytest.mark.parametrize(("reward", "message"), [
    ("rewards_of_the_test:nothing", r"error: the reward of response 0, "),
    ("rewards_of_the_test:one", "error: the reward function returned the shape (1,) for 8 texts; expected one "
                                "number per text"),
    ("rewards_of_the_test:two", "error: rl.reward='rewards_of_the_test:two': the module rewards_of_the_test has no "),
    ("no_such_module:two", "error: No module named 'no_such_module'"),
    ("no_such_folder", "error: there is no directory no_such_folder")])
def test_rewards_that_are_none(program, policy, files, importable, tmp_path, reward, message):
    ended = program("ppo", *ppo_arguments(policy, files, tmp_path / "run", reward))
    assert ended.error.startswith(message), ended.error


def test_missing_flags_and_mismatched_files_end_with_one_line(program, policy, files, importable, tmp_path):
    def error(name, *arguments):
        return program(name, *arguments).error

    paths = (f"--workdir={tmp_path}/run", f"--config.data.path={files}/prompts.txt")
    for name in ("reward", "dpo", "ppo"):
        assert error(name, f"--workdir={tmp_path}/run") == "error: --model is missing; --help describes it"
        assert "no training data is given; set --config.data.path=FILE" in error(name, f"--model={policy}", paths[0])
    assert "no reward is given; set --config.rl.reward to the workdir of a reward model" in error(
        "ppo", f"--model={policy}", *paths)
    plain = make_policy(tmp_path / "plain", chat=False)
    assert "role" in error("ppo", f"--model={plain}", *paths, "--config.rl.reward=rewards_of_the_test:vowels")
    long = tmp_path / "long.txt"
    long.write_text("film " * 12 + "\n" + "film\n" * 20)
    assert "do not fit into the reference model's context of 64" in error(
        "ppo", *PPO, f"--model={policy}", paths[0], f"--config.data.path={long}",
        "--config.rl.reward=rewards_of_the_test:vowels")
    for record, message in (({"prompt": "a", "chosen": "b", "rejected": "b"}, "responses 1 and 2 are equal"),
                            ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty")):
        (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
        assert message in error("dpo", f"--model={policy}", paths[0], f"--config.data.path={tmp_path}/bad.jsonl")
    assert "--compare needs at least two workdirs" in error("evaluate", "--compare", policy, "--data=x", "--judge=y")
    assert error("evaluate", "--compare", policy, policy, f"--data={files}/prompts.txt") == (
        "error: --judge is missing; --help describes it")


@pytest.mark.long
def test_the_assistant_rehearses(program, files, tmp_path, monkeypatch):
    """Runs every stage on a folder of toy reviews, at a size that is too small to learn."""
    monkeypatch.setattr(assistant_data, "_HELD_OUT_PROMPTS", 16)
    data, draw = tmp_path / "data", random.Random(1)
    for folder in ("movie_reviews", "sentence_polarity", "english_novels"):
        (data / folder).mkdir(parents=True)
    with gzip.open(data / "movie_reviews" / "reviews.jsonl.gz", "wt") as file:
        for number in range(200):
            label, words = (("pos", GOOD), ("neg", BAD))[number // 2 % 2]
            text = " . ".join(sentence(draw, words) for _ in range(6))
            file.write(json.dumps({"label": label, "text": text}) + "\n")
    for kind, words in (("pos", GOOD), ("neg", BAD)):
        lines = {f"{sentence(draw, words)} {n}" for n in range(80)}
        (data / "sentence_polarity" / f"rt-polarity.{kind}.txt").write_text("\n".join(sorted(lines)) + "\n")
    (data / "english_novels" / "novel.txt").write_text("It was the best of films. " * 50)
    ended = program("assistant", f"--data={data}", f"--workdir={tmp_path}/run", "--quick")
    assert ended.status == 0, ended
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert {"ppo beats sft", "kl of ppo to sft, nats an answer", "minutes"} <= set(figures)
    assert figures["judge: held-out pairs in the right order"] == 1.0
    assert all(np.isfinite(value) for value in figures.values() if not isinstance(value, dict))
    assert (tmp_path / "run" / "ppo.png").stat().st_size > 5000
    assert "| ppo |" in (tmp_path / "run" / "report.md").read_text()
    assert "there is no file" in program("assistant", f"--data={tmp_path}", f"--workdir={tmp_path}/other").error
