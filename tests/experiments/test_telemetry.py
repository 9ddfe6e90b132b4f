"""Attention measured during training: the values equal those of NumPy in every family, one program
computes them, and they do not change the training."""

import math
import random
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import transformer_jax as tj
from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig, MetricsConfig
from transformer_jax.data import LineRows, PackedPairs, Pairs, Windows
from transformer_jax.inspection import plots
from transformer_jax.models.functional import make_model
from transformer_jax.runs.telemetry import WatchAttention
from transformer_jax.sharding import make_mesh
from transformer_jax.training.loggers import JsonlLogger, TensorBoardLogger
from transformer_jax.training.loop import Loop
from transformer_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
L, N, LENGTH = 2, 2, 12
SENTENCES = ["the cat sat", "a cat", "the old cat sat on the mat", "sat", "on a mat sat the cat"]
SUMMARIES = {"entropy", "sink", "distance", "previous_token", "diagonal", "duplicate_token", "induction"}
KINDS = {"decoder": ("self",), "encoder": ("self",), "encoder_decoder": ("self", "encoder", "cross")}


def held_out(family, tokenizer):
    if family == "decoder":
        ids = np.concatenate([[tokenizer.end_of_text_id, *tokenizer.encode(text)] for text in SENTENCES])
        return Windows(ids, LENGTH, end_of_text_id=tokenizer.end_of_text_id)
    if family == "encoder":
        return LineRows.build(SENTENCES, tokenizer, LENGTH)
    return PackedPairs.build(Pairs(list(zip(SENTENCES, SENTENCES[::-1], strict=True))), tokenizer, LENGTH, LENGTH)


def make(family):
    tokenizer = tj.Tokenizer.train(SENTENCES, kind="word")
    config = tj.ModelConfig(family=family, vocab_size=tokenizer.vocab_size, max_len=LENGTH, num_layers=L, num_heads=N,
                            model_dim=8, positions="sinusoidal", init_std=0.4)
    models = [make_model(config, key=jax.random.key(seed)) for seed in range(3)]
    return models, held_out(family, tokenizer)


def expected_summaries(model, batch, kind):
    """Entropy of every query that attends to something, and the weight on the token before where
    there is one."""
    if "source" in batch:
        trace = tj.trace(model, batch["source"], batch["tokens"], source_segment_ids_BS=batch["source_segment_ids"],
                         target_segment_ids_BT=batch["segment_ids"])
        trace = {"self": trace.decoder, "encoder": trace.encoder, "cross": trace.cross}[kind]
    else:
        trace = tj.trace(model, batch["tokens"], segment_ids_BT=batch["segment_ids"])
    maps = np.asarray(trace.attention(), np.float64)  # [L, B, N, T, S]
    ids = batch["source_segment_ids" if kind == "encoder" else "segment_ids"]
    entropies = -(maps * np.log(np.where(maps > 0, maps, 1))).sum(-1)
    found = {"entropy": entropies.transpose(1, 3, 0, 2)[ids != 0].mean(0)}
    if kind != "cross":
        follows = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
        before = np.diagonal(maps, -1, axis1=3, axis2=4)  # [L, B, N, T - 1]
        found["previous_token"] = before.transpose(1, 3, 0, 2)[follows].mean(0)
    return found


def board(workdir):
    values = []
    for path in sorted(workdir.glob("tensorboard/*events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12:12 + length])
            values += [(event.step, value) for value in event.summary.value]
            data = data[16 + length:]
    return values


def loop_at(step, model, loggers):
    """A training loop after a step, as a hook sees it."""
    config = ExperimentConfig(steps=20, model=model.config, metrics=MetricsConfig(attention_every=4))
    return Loop(config, state=types.SimpleNamespace(params=None), loggers=loggers,
                mesh=make_mesh(devices=jax.devices()[:1]), step=step,
                to_model=lambda params: model)


def watcher(family, source, workdir):
    return WatchAttention(tasks.make(ExperimentConfig(model=tj.ModelConfig(family=family))), source, workdir)


@pytest.mark.long
@pytest.mark.parametrize("family", KINDS)
def test_telemetry_is_written_for_every_family(family, tmp_path):
    models, source = make(family)
    watch, loggers = watcher(family, source, tmp_path), [JsonlLogger(tmp_path), TensorBoardLogger(tmp_path)]
    for step, model in zip((8, 16, 20), models, strict=True):
        watch(loop_at(step, model, loggers))
    watch(loop_at(17, models[0], loggers))  # not due
    assert watch._summaries._cache_size() == 1, "one program, whatever the weights"
    for logger in loggers:
        logger.close()

    batch = source[np.arange(min(8, len(source)))]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [step for step in (8, 16, 20) for _ in KINDS[family]]
    for step, model in zip((8, 16, 20), models, strict=True):
        for kind in KINDS[family]:
            line, = (line for line in lines if line["step"] == step and f"{kind}_attention/entropy" in line)
            names = {"entropy", "sink"} if kind == "cross" else SUMMARIES
            assert set(line) == {"step", *(f"{kind}_attention/{name}" for name in names)}
            for name, values_LN in expected_summaries(model, batch, kind).items():
                np.testing.assert_allclose(line[f"{kind}_attention/{name}"], values_LN, atol=2e-6)

    shown = board(tmp_path)
    curves = {(step, value.tag) for step, value in shown if value.HasField("simple_value")}
    pictures = {(step, value.tag): value.image for step, value in shown if value.HasField("image")}
    for kind in KINDS[family]:
        assert (8, f"{kind}_attention/entropy/layer_1_head_0") in curves
        picture = pictures[16, f"{kind}_attention/sink"]
        assert (picture.height, picture.width) == (24 * L, 24 * N)
        assert pictures[20, f"{kind}_attention/entropy_over_training"].width > 400
        assert (16, f"{kind}_attention/entropy_over_training") not in pictures
        means = [line.get_ydata() for line in plots.attention_over_training(tmp_path / "metrics.jsonl", kind=kind).axes[
            0].lines if line.get_label() == "layer 1"]
        np.testing.assert_allclose(means[0], [expected_summaries(model, batch, kind)["entropy"][1].mean()
                                              for model in models], atol=2e-6)


def test_pictures_are_brighter_where_values_are_larger():
    class Pictures:
        def __init__(self):
            self.heads, self.pictures = {}, {}

        def write(self, step, values):
            for name, value in values.items():
                (self.pictures if value.dtype == np.uint8 else self.heads)[name] = value

    (model, *_), source = make("decoder")
    pictures = Pictures()
    watcher("decoder", source, None)(loop_at(8, model, [pictures]))
    assert set(pictures.heads) == set(pictures.pictures)
    for name, pixels in pictures.pictures.items():
        most = {"entropy": math.log(LENGTH), "distance": LENGTH - 1}.get(name.partition("/")[2], 1)
        assert pixels.shape == (24 * L, 24 * N, 3) and pixels.dtype == np.uint8
        for layer, head in np.ndindex(L, N):
            cell = pixels[24 * layer:24 * (layer + 1), 24 * head:24 * (head + 1)]
            assert (cell == cell[0, 0, 0]).all()
            assert abs(cell[0, 0, 0] / 255 - math.sqrt(pictures.heads[name][layer, head] / most)) < 0.002


# In the programs

TRAIN = ("--config=shakespeare_char", "--config.model.num_layers=2", "--config.model.num_heads=2",
         "--config.model.model_dim=16", "--config.model.max_len=16", "--config.model.unroll=1", "--config.batch_size=8",
         "--config.steps=8", "--config.log_every=1", "--config.eval.every=8", "--config.sample.every=0",
         "--config.model.dropout=0.2", "--config.checkpoint.every=4", "--config.optim.warmup_steps=2")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{draw.choice(SENTENCES)}\n" for _ in range(200)))
    return path


def lines_of(workdir):
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")}
            for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.long
def test_a_watched_run_is_the_run_that_is_not(program, text, tmp_path, final_digest, stop_at):
    every = "--config.metrics.attention_every=3"
    for name, arguments in (("off", ()), ("on", (every,))):
        ended = program("train", *TRAIN, f"--config.data.path={text}", f"--workdir={tmp_path / name}", *arguments)
        assert ended.status == 0, ended.err
    assert final_digest(tmp_path / "on") == final_digest(tmp_path / "off")
    watched = [line for line in lines_of(tmp_path / "on") if "self_attention/entropy" in line]
    assert [line["step"] for line in watched] == [3, 6, 8]
    assert [line for line in lines_of(tmp_path / "on") if line not in watched] == lines_of(tmp_path / "off")
    assert np.shape(watched[0]["self_attention/induction"]) == (2, 2)
    assert watched[0] != watched[1] | {"step": 3}

    # A run that was started without it and stopped can be resumed with it, because it does not
    # change the result.
    stop_at(5)
    arguments = (*TRAIN, f"--config.data.path={text}", f"--workdir={tmp_path / 'stopped'}")
    assert program("train", *arguments).status == 143
    assert program("train", *arguments, every).status == 0
    assert final_digest(tmp_path / "stopped") == final_digest(tmp_path / "off")
    assert [line for line in lines_of(tmp_path / "stopped") if "self_attention/entropy" in line] == watched[1:]


@pytest.mark.long
@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_the_other_families_are_watched(program, text, tmp_path, family):
    if family == "encoder":
        config = ("--config=book_mlm", f"--config.data.path={text}", "--config.data.tokenizer.vocab_size=300")
    else:
        pairs = tmp_path / "pairs.tsv"
        pairs.write_text("".join(f"{line}\t{line.upper()}\n" for line in text.read_text().splitlines()))
        config = ("--config=multi30k_ende", f"--config.data.path={pairs}", "--config.data.tokenizer.vocab_size=300")
    ended = program("train", *config, *TRAIN[1:], f"--workdir={tmp_path / 'run'}",
                    "--config.metrics.attention_every=4", "--config.eval.batch_size=8")
    assert ended.status == 0, ended.err
    watched = [line for line in lines_of(tmp_path / "run") if any("_attention/" in name for name in line)]
    assert [line["step"] for line in watched] == [step for step in (4, 8) for _ in KINDS[family]]
    assert all(np.isfinite(values).all() and np.shape(values) == (2, 2)
               for line in watched for name, values in line.items() if name != "step")


def test_tasks_without_attention_to_watch_are_refused(program, text, gpt, tmp_path):
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text('{"prompt": "the", "response": "king"}\n' * 20)
    tokenizer = tj.Tokenizer.train(["the king"], kind="char", chat=True)
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=32, num_layers=1, num_heads=1, model_dim=8)
    tj.save(tmp_path / "base", tj.Bundle(model=tj.Decoder(config, key=jax.random.key(0)), tokenizer=tokenizer,
                                         config=config))
    ended = program("sft", f"--model={tmp_path / 'base'}", f"--config.data.path={conversations}",
                    f"--workdir={tmp_path / 'run'}", "--config.metrics.attention_every=2", "--config.sample.every=0",
                    "--config.batch_size=8")
    assert "metrics.attention_every needs a task with held-out examples that the model can read" in ended.error
