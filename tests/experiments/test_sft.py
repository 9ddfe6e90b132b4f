"""Supervised fine-tuning from end to end: the program, its losses, its adapters, resuming, and what
it refuses."""

import itertools
import json

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax import recipes
from transformer_jax.config import ExperimentConfig, LoraConfig
from transformer_jax.data import (
    PackedConversations,
    Tokenizer,
    encode_conversation,
    make_batches,
    read_demonstrations,
)
from transformer_jax.nn.lora import adapted_loss, make_adapters, merge_adapters
from transformer_jax.tasks.sft import SupervisedFineTuning
from transformer_jax.training.adapters import load_adapters
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state, init_state
from transformer_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = 12
COMMON = ("--config.batch_size=8", f"--config.steps={STEPS}", "--config.log_every=1", "--config.eval.every=4",
          "--config.checkpoint.every=5", "--config.optim.peak_lr=0.01", "--config.optim.warmup_steps=2",
          "--config.sample.every=0")
LORA = ("--config.lora.rank=2", "--config.lora.dropout=0.1")
SUMS = [(f"{a} + {b}?", f"It is {a + b}.") for a, b in itertools.product(range(1, 7), repeat=2)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text for pair in SUMS for text in pair], kind="char", chat=True)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """Trains a base model. Returns its workdir and the model."""
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=48, num_layers=2, num_heads=2, model_dim=16)
    model = tj.Decoder(config, key=jax.random.key(3))
    workdir = tmp_path_factory.mktemp("base")
    tj.save(workdir, tj.Bundle(model=model, tokenizer=tokenizer, config=config, step=1))
    return workdir, model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in SUMS))
    return path


@pytest.fixture(params=[pytest.param("full", marks=pytest.mark.long), "lora"])
def extra(request):
    return LORA if request.param == "lora" else ()


def state_digest(workdir, base_model):
    """The digest of the last step's weights, optimizer state, step and key."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    config = tj.load(workdir).experiment
    make_params = ((lambda key: make_adapters(base_model, config.lora, key=key)) if config.lora.rank
                   else (lambda key: tj.Decoder(config.model, key=key)))
    optimizer = make_optimizer(config.optim, config.steps)
    return tree_digest(checkpoints.restore(abstract_state(make_params, optimizer)).state)


@pytest.fixture
def uninterrupted(program, base, data, extra, runs):
    """The workdir of an uninterrupted run, trained when first asked for, and how it ended."""
    folder, ended = runs
    name = "lora" if extra else "full"
    if name not in ended:
        ended[name] = program("sft", f"--model={base[0]}", f"--config.data.path={data}", *COMMON, *extra,
                              f"--workdir={folder / name}", "--config.sample.every=12",
                              "--config.sample.max_new_tokens=4")
    assert ended[name].status == 0, ended[name]
    return folder / name, ended[name]


@pytest.mark.long
def test_a_run_learns_reports_and_resumes_exactly(uninterrupted, program, stop_at, base, data, extra, tmp_path):
    workdir, model = base
    before = tree_digest(model)
    whole_workdir, whole = uninterrupted
    arguments = ("sft", f"--model={workdir}", f"--config.data.path={data}", *COMMON, *extra)
    assert "32 conversations, 0 longer than the context of 48 tokens left out" in whole.out
    assert "; held out: 4 conversations" in whole.out
    assert ("loss was still falling at the last step" in whole.out) or ("this checkpoint is stored in" in whole.out)
    assert "--- step 12 ---\n6 + 3?\n  -> " in whole.out + whole.err
    assert (whole_workdir / "answers" / "12.txt").read_text().startswith("6 + 3?\n  -> ")
    losses = [line["loss"] for line in read_metrics(whole_workdir / "metrics.jsonl") if "loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1

    stop_at(7)
    stopped = program(*arguments, f"--workdir={tmp_path / 'parts'}")
    assert stopped.status == 128 + 15 and "run the same command again to resume" in stopped.err
    resumed = program(*arguments, f"--workdir={tmp_path / 'parts'}")
    assert resumed.status == 0 and "resuming from step 7 of 12" in resumed.out
    assert state_digest(tmp_path / "parts", model) == state_digest(whole_workdir, model)
    assert tree_digest(tj.load(workdir).model) == before

    answered = program("generate", f"--workdir={whole_workdir}", "--step=best", "--chat", "--prompt=2 + 2?",
                       "--max_new_tokens=5")
    assert answered.status == 0 and answered.out.startswith("2 + 2?\n")


def test_held_out_loss_is_that_of_the_answers_alone_one_conversation_at_a_time(uninterrupted, data):
    workdir, _ = uninterrupted
    bundle, total, count = tj.load(workdir), 0.0, 0
    for messages in read_demonstrations(data)[32:]:
        ids, is_learned = encode_conversation(messages, bundle.tokenizer)
        logits = np.asarray(tj.forward(bundle.model, np.array([ids])), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in np.flatnonzero(is_learned):
            total, count = total - log_p[place - 1, ids[place]], count + 1
    recorded = [line["validation_loss"] for line in read_metrics(workdir / "metrics.jsonl")
                if "validation_loss" in line]
    assert count == sum(len(answer) + 1 for _, answer in SUMS[32:])
    assert recorded[-1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.long
def test_eight_devices_give_the_losses_of_one(program, base, tokenizer, data, tmp_path, extra):
    workdir, model = base
    assert jax.device_count() == 8
    arguments = (f"--model={workdir}", f"--config.data.path={data}", *COMMON, *extra, "--config.model.dropout=0.0",
                 "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert program("sft", *arguments, f"--workdir={tmp_path}").status == 0
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    # Computes the same with plain code on one device.
    config = tj.load(tmp_path).experiment
    rows = PackedConversations.build(read_demonstrations(data)[:32], tokenizer, 48)
    batches = make_batches(rows, batch_size=8, seed=config.seed)
    optimizer = make_optimizer(config.optim, config.steps)
    loss_fn, make_params = next_token_loss(), jax.tree_util.Partial(lambda model, key: model, model)
    if config.lora.rank:
        loss_fn = adapted_loss(loss_fn, model)
        make_params = lambda key: make_adapters(model, config.lora, key=key)
    state = init_state(make_params, optimizer, jax.random.key(config.seed))
    step, by_hand = make_train_step(loss_fn, optimizer), []
    for _ in range(STEPS):
        state, metrics = step(state, next(batches))
        by_hand.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, by_hand, rtol=2e-5)


@pytest.mark.long
def test_checkpoints_of_a_run_with_adapters_hold_adapters_alone(program, base, data, tmp_path):
    workdir, model = base
    ended = program("sft", f"--model={workdir}", f"--config.data.path={data}", f"--workdir={tmp_path}", *COMMON, *LORA,
                    "--config.lora.weights=attention.(query|value)")
    assert ended.status == 0 and "256 of 7,792 parameters" in ended.out, ended.out
    step = tmp_path / "checkpoints" / str(STEPS)
    arrays = json.loads((step / "manifest.json").read_bytes())["arrays"]
    weights = {name for name in arrays if name.startswith("params/")}
    assert weights == {f"params/stack.blocks.attention.{kernel}/{factor}/value"
                       for kernel in ("query", "value") for factor in "ab"}
    assert not [name for name in arrays if "embeddings" in name]
    assert tree_digest(tj.load(tmp_path / "base").model) == tree_digest(model)
    adapters = load_adapters(tmp_path, model)
    assert tree_digest(tj.load(tmp_path).model) == tree_digest(merge_adapters(model, adapters))
    assert tree_digest(tj.load(tmp_path).model) != tree_digest(model)


def test_the_overfit_point(tmp_path):
    def write(*losses):
        (tmp_path / "metrics.jsonl").write_text("".join(
            json.dumps({"step": 10 * number, "validation_loss": loss}) + "\n" for number, loss in enumerate(losses, 1)))

    write(3.0, 2.5, 2.4, 2.6, 2.9)
    assert SupervisedFineTuning(ExperimentConfig(), workdir=tmp_path).finish() == (
        f"the held-out loss was lowest at step 30: 2.4000; this checkpoint is stored in {tmp_path}/best (load it with "
        "step='best'); after that the model overfits: 2.9000 at step 50")
    write(3.0, 2.5)
    text = SupervisedFineTuning(ExperimentConfig(), workdir=tmp_path).finish()
    assert "still falling at the last step: 2.5000" in text


@pytest.mark.long
def test_a_workdir_keeps_to_its_base_and_data(program, base, data, tokenizer, tmp_path):
    arguments = (f"--config.data.path={data}", f"--workdir={tmp_path / 'run'}", *COMMON, "--config.steps=2")
    assert program("sft", f"--model={base[0]}", *arguments).status == 0
    other = tj.Decoder(base[1].config, key=jax.random.key(4))
    tj.save(tmp_path / "other", tj.Bundle(model=other, tokenizer=tokenizer, config=other.config))
    refused = program("sft", f"--model={tmp_path / 'other'}", *arguments)
    assert f"the model to start from is not the same as when the run in {tmp_path / 'run'} started" in refused.error
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(data.read_text().splitlines(keepends=True)[:-4]))
    refused = program("sft", f"--model={base[0]}", f"--config.data.path={shorter}", *arguments[1:])
    assert "holds a run with another config (data.path" in refused.error
    data_then = data.read_text()
    try:
        data.write_text(shorter.read_text())
        refused = program("sft", f"--model={base[0]}", *arguments)
    finally:
        data.write_text(data_then)
    assert "the training data is not the same as when the run in" in refused.error
    refused = program("sft", f"--model={base[0]}", *arguments, "--config.lora.rank=2")
    assert "lora.rank: 0 -> 2" in refused.error


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "no training data is given; set --config.data.path=FILE, where the file holds demonstrations"),
    (("--config.data.path=missing.jsonl",), "no file at 'missing.jsonl'"),
    (("--config.data.path={data}", "--config.model.num_layers=3"),
     "of their settings you may only change dropout, attention_dropout, not model.num_layers: 12 -> 3"),
    (("--config.data.path={data}", "--config.data.tokenizer.chat=true"), "not data.tokenizer.chat: False -> True"),
    (("--config.data.path={data}", "--config.lora.rank=2", "--config.lora.weights=atention"),
     "lora.weights='atention' matches none of stack.blocks.attention.key, "),
    (("--config.data.path={data}", "--config.data.validation_fraction=0.99"), "leaves a part empty"),
    (("--config.data.path={data}", "--config.batch_size=7", "--config.mesh.data=8"),
     "batch_size=7 cannot be split evenly over the 8 devices"),
])
def test_bad_settings(program, base, data, tmp_path, arguments, message):
    workdir = tmp_path / "run"
    ended = program("sft", f"--model={base[0]}", f"--workdir={workdir}", "--config.batch_size=8",
                    *(argument.format(data=data) for argument in arguments))
    assert message in ended.error
    assert not (workdir / "run.json").exists()


@pytest.mark.parametrize(("content", "message"), [
    ('{"prompt": "1 + 1?", "response": "It is 2."}\n{"prompt": ', "line 2 is not JSON"),
    ('{"prompt": "1 + 1?", "response": ""}\n', "line 1: the message of the assistant is empty"),
    ('{"messages": [{"role": "robot", "content": "hi"}]}\n', "line 1: unknown role 'robot'"),
    ('{"prompt": "%s", "response": "2."}\n' % ("1 + " * 20) * 4, "none of 3 conversations fits a row"),
])
def test_bad_demonstrations(program, base, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    ended = program("sft", f"--model={base[0]}", f"--workdir={tmp_path / 'run'}", "--config.batch_size=8",
                    f"--config.data.path={tmp_path / 'a.jsonl'}")
    assert message in ended.error


def test_bad_bases(program, base, tokenizer, data, tmp_path):
    arguments = ("sft", f"--config.data.path={data}", f"--workdir={tmp_path / 'run'}")
    assert "--model is missing" in program(*arguments).error
    assert "--workdir is missing" in program("sft", f"--model={base[0]}").error
    assert f"there is no directory {tmp_path / 'x'}" in program(*arguments, f"--model={tmp_path / 'x'}").error
    plain = Tokenizer.train([text for pair in SUMS for text in pair], kind="char")
    model = tj.Decoder(base[1].config.replace(vocab_size=plain.vocab_size), key=jax.random.key(0))
    tj.save(tmp_path / "plain", tj.Bundle(model=model, tokenizer=plain, config=model.config))
    error = program(*arguments, f"--model={tmp_path / 'plain'}").error
    assert "no role tokens (<|system|>, <|user|>, <|assistant|>)" in error
    assert "--config.data.tokenizer.chat=true" in error
    tj.save(tmp_path / "mute", tj.Bundle(model=base[1], tokenizer=None, config=base[1].config))
    assert "the model to start from has no tokenizer" in program(*arguments, f"--model={tmp_path / 'mute'}").error
    encoder = tj.Encoder(base[1].config.replace(family="encoder"), key=jax.random.key(0))
    tj.save(tmp_path / "encoder", tj.Bundle(model=encoder, tokenizer=tokenizer, config=encoder.config))
    error = program(*arguments, f"--model={tmp_path / 'encoder'}").error
    assert "is for models of family decoder, not encoder" in error


def test_adapters_need_a_trained_model(program, tmp_path):
    (tmp_path / "a.txt").write_text("some words to learn from, again and again\n" * 50)
    ended = program("train", "--config=shakespeare_char", f"--config.data.path={tmp_path / 'a.txt'}",
                    f"--workdir={tmp_path / 'run'}", "--config.batch_size=8", "--config.lora.rank=4")
    assert "lora.rank=4 adapts a trained model, but no model to start from was given" in ended.error


@pytest.mark.parametrize("name", ["chat_base", "sft_instructions", "sft_faquad"])
def test_named_configs(name):
    config = recipes.get(name)
    assert isinstance(config, ExperimentConfig) and config.lora == LoraConfig()
    assert config.data.tokenizer.chat == (name == "chat_base")
