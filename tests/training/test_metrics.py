"""JSONL, TensorBoard events and the loss curve, read back by other means; model FLOPs against their
formula."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from transformer_jax.config import ModelConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import count_parameters, make_model
from transformer_jax.training.loggers import JsonlLogger, TensorBoardLogger
from transformer_jax.training.metrics import flops_per_token, plot_losses, read_metrics


class Writer:
    """Both loggers of a workdir."""

    def __init__(self, directory, start_step=0):
        self._loggers = JsonlLogger(directory, start_step), TensorBoardLogger(directory, start_step)

    def write(self, step, **values):
        for logger in self._loggers:
            logger.write(step, values)

    def close(self):
        for logger in self._loggers:
            logger.close()


def board(directory):
    """The events of all files, in order: the record format is length (8 bytes), checksum (4),
    event, checksum (4)."""
    events = []
    for path in sorted(directory.glob("tensorboard/*events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12:12 + length]))
            data = data[16 + length:]
    return events


def scalars(directory):
    return [(event.step, value.tag, value.simple_value) for event in board(directory) for value in event.summary.value]


def test_jsonl_and_tensorboard_say_the_same(tmp_path):
    writer = Writer(tmp_path)
    writer.write(1, loss=2.5, learning_rate=0.25)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "learning_rate": 0.25}\n'  # at once
    writer.write(2, validation_loss=1.5)
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "learning_rate": 0.25},
                                                        {"step": 2, "validation_loss": 1.5}]
    assert scalars(tmp_path) == [(1, "loss", 2.5), (1, "learning_rate", 0.25), (2, "validation_loss", 1.5)]


def test_heads_have_a_line_and_a_curve_each(tmp_path):
    writer = Writer(tmp_path)
    values_LN = np.array([[0.25, 1 / 3, 2.0], [0.0, 1e-7, np.float32(0.1)]], np.float32)
    picture = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    writer.write(7, **{"self_attention/entropy": values_LN, "self_attention/sink": values_LN[:, :1]})
    writer.write(7, **{"self_attention/entropy": picture})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 7, "self_attention/entropy": [[0.25, 0.333333, 2.0], [0.0, 0.0, 0.1]], '
        '"self_attention/sink": [[0.25], [0.0]]}\n')
    found = {(step, tag): value for step, tag, value in scalars(tmp_path) if tag.endswith(("0", "1", "2"))}
    expected = {(7, f"self_attention/entropy/layer_{layer}_head_{head}"): values_LN[layer, head]
                for layer, head in np.ndindex(2, 3)}
    expected |= {(7, f"self_attention/sink/layer_{layer}_head_0"): values_LN[layer, 0] for layer in (0, 1)}
    assert found == pytest.approx(expected, abs=6e-7)
    (tag, image), = ((value.tag, value.image) for event in board(tmp_path) for value in event.summary.value
                     if value.HasField("image"))
    assert tag == "self_attention/entropy"
    np.testing.assert_array_equal(Image.open(io.BytesIO(image.encoded_image_string)), picture)


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    for start, steps in ((0, range(1, 8)), (4, range(5, 10))):
        writer = Writer(tmp_path, start)
        for step in steps:
            writer.write(step, loss=float(step + 100 * start))
        writer.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "loss"')  # cut short by a crash
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [{"step": step, "loss": float(step + 400 * (step > 4))} for step in range(1, 10)]
    # TensorBoard drops what it read before at the step of a start marker and later.
    starts = [event.step for event in board(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 5


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("validates", [True, False])
def test_the_loss_curve_is_a_picture_of_both_losses(tmp_path, validates):
    lines = [{"step": step, "loss": 4 / step} for step in range(1, 50)]
    lines += [{"step": step, "validation_loss": 4 / step + 1} for step in (20, 40) if validates]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(path, tmp_path / "loss.png", "title")
    with Image.open(tmp_path / "loss.png") as image:
        image.verify()
    with Image.open(tmp_path / "loss.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert image.format == "PNG" and min(image.size) >= 400

    def num_like(colour):
        return (np.abs(pixels - np.array(colour)).sum(-1) < 20).sum()

    assert num_like((0x9E, 0xCA, 0xE1)) > 200  # the training curve
    assert (num_like((0x08, 0x51, 0x9C)) > 100) == validates


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_flops_are_six_a_matrix_weight_and_attention(tied, positions):
    config = ModelConfig(vocab_size=50, max_len=32, num_layers=3, num_heads=2, model_dim=16, tie_embeddings=tied,
                         positions=positions, use_bias=False, norm="rmsnorm")
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 50 * 16  # and the unembedding
    norms = (2 * 3 + 1) * 16
    expected = 6 * (matrices + norms) + 12 * 3 * 2 * 8 * 32
    assert flops_per_token(config, count_parameters(config)) == expected


def test_flops_of_the_matrix_products_are_what_xla_counts():
    """Forward and backward of the compiled program, whose attention is not halved by causality
    either."""
    config = ModelConfig(vocab_size=256, max_len=64, num_layers=2, num_heads=4, model_dim=128, positions="none",
                         use_bias=False, unroll=2)
    model = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 64), "int32")
    gradient = jax.jit(jax.grad(lambda model, tokens: model(tokens).logits.sum()))
    counted = gradient.lower(model, tokens).compile().cost_analysis()["flops"] / (4 * 64)
    assert counted == pytest.approx(flops_per_token(config, count_parameters(config)), rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_an_encoder(tied):
    config = ModelConfig(family="encoder", vocab_size=50, max_len=32, num_layers=3, num_heads=2, model_dim=16,
                         tie_embeddings=tied, use_bias=False, norm="rmsnorm", norm_position="post")
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 16  # the head's transform; the unembedding reads few positions
    vectors = (2 * 3 + 1) * 16 + 50  # norms, and the head's bias
    expected = 6 * (matrices + vectors) + 12 * 3 * 2 * 8 * 32
    assert flops_per_token(config, count_parameters(config)) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_an_encoder_decoder_are_those_of_a_source_token_and_a_target_token(tied):
    config = ModelConfig(family="encoder_decoder", vocab_size=50, max_len=32, num_layers=2, num_decoder_layers=3,
                         num_heads=2, model_dim=16, tie_embeddings=tied, use_bias=False, norm="rmsnorm",
                         positions="sinusoidal")
    encoder, decoder = 2 * (4 * 16 * 16 + 2 * 16 * 64), 3 * (8 * 16 * 16 + 2 * 16 * 64)
    norms = (2 * 2 + 1 + 3 * 3 + 1) * 16
    expected = 6 * (encoder + decoder + norms + 50 * 16) + 12 * (2 + 3 + 3) * 2 * 8 * 32
    assert flops_per_token(config, count_parameters(config)) == expected


@pytest.mark.long
@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_flops_of_the_other_families_are_what_xla_counts(family):
    config = ModelConfig(family=family, vocab_size=64, max_len=64, num_layers=2, num_heads=4, model_dim=128,
                         positions="none", use_bias=False, unroll=2)
    model = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    tokens = [jax.ShapeDtypeStruct((4, 64), "int32")] * (2 if family == "encoder_decoder" else 1)

    def output(model, *tokens):
        out = model(*tokens)
        return (out.logits if family == "encoder_decoder" else out.hidden).sum()

    counted = jax.jit(jax.grad(output)).lower(model, *tokens).compile().cost_analysis()["flops"] / (4 * 64)
    if family == "encoder":
        counted += 6 * 128 * 128  # the head's transform, which is not part of `hidden`
    assert counted == pytest.approx(flops_per_token(config, count_parameters(config)), rel=0.1)
