"""The programs of training and decoding compiled for TPUs by libtpu, with no TPU here."""

import dataclasses
import re

import pytest

pytest.importorskip("libtpu", reason="compiling for TPUs needs the extra tpu-aot")

import transformer_jax as tj
from benchmarks.tpu.programs import PROGRAMS, compile_for, tpu
from transformer_jax.config import ExperimentConfig, MeshConfig, OptimConfig
from transformer_jax.runs.preflight import batch_shapes, lower_train_step
from transformer_jax.sharding import make_mesh
from transformer_jax.training.chips import get_chip
from transformer_jax.training.topologies import devices_of

pytestmark = pytest.mark.long
# Depth makes no program of scanned layers larger; decoding holds its layers side by side.
DECODE = dataclasses.replace(PROGRAMS["gpt2-small decode"],
                             config=PROGRAMS["gpt2-small decode"].config.replace(num_layers=2))


def memory_of(topology):
    return get_chip(topology.partition(":")[0]).memory


def products(text):
    """The types of both operands of every matrix product; on TPUs these are convolutions."""
    types = {}
    for name, kind in re.findall(r"%([\w.\-]+) = (\w+)\[", text):
        types[name] = kind
    return [tuple(types.get(name, "?") for name in re.findall(r"%([\w.\-]+)", operands)[:2])
            for operands in re.findall(r" (?:convolution|dot)\(([^)]*)\)", text)]


def check_training(name, topology):
    compiled = compile_for(PROGRAMS[name], topology)
    assert compiled.peak < memory_of(topology)
    for kernel in ("fwd", "dq", "dkv"):
        assert re.search(rf"splash_mha_{kernel}[\w.]* = .*custom-call", compiled.text), kernel
    # The weights and the optimizer's state are written over: what is donated comes back in place.
    assert compiled.aliased > 0.9 * state_bytes(name)
    found = products(compiled.text)
    assert len(found) >= 8
    assert ("f32", "f32") not in found
    return compiled


def state_bytes(name):
    """Float32 weights and the two moments of Adam, on each device."""
    program = PROGRAMS[name]
    return 12 * tj.count_parameters(program.config) / (program.mesh.fsdp * program.mesh.tensor)


def test_gpt2_small_trains_on_v5e():
    check_training("gpt2-small train", "v5e:2x4")


def test_decoding_writes_the_cache_in_place():
    compiled = compile_for(DECODE, "v6e:2x4")
    config, rows = DECODE.config, DECODE.batch_size
    cache = 2 * 2 * config.num_layers * rows * config.max_len * config.num_heads * config.head_dim
    assert compiled.peak < memory_of("v6e:2x4")
    assert compiled.aliased >= cache
    assert ("f32", "f32") not in products(compiled.text)


@pytest.mark.parametrize(("name", "topology"), [
    ("gpt2-small train", "v6e:2x4"), ("transformer-base train", "v5e:2x4"), ("transformer-base train", "v6e:2x4"),
    ("roberta-base train", "v5e:2x4"), ("roberta-base train", "v6e:2x4")])
def test_the_other_families_train(name, topology):
    check_training(name, topology)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize("name", ["gpt2-small prefill", "gpt2-small decode"])
def test_prefill_and_decoding_fit_one_device(name, topology):
    compiled = compile_for(PROGRAMS[name], topology)
    assert compiled.peak < memory_of(topology)
    assert ("f32", "f32") not in products(compiled.text)


def test_1_3_billion_parameters_train_on_v5e():
    check_training("gpt3-xl (1.3B) train", "v5e:2x4")


def test_gemma_2_2b_trains_on_v5e():
    """Its kernel caps the scores, and half of its layers have a window."""
    check_training("gemma-2-2b train", "v5e:2x4")


def test_olmoe_trains_on_16_chips_of_v5e_over_three_axes():
    compiled = compile_for(PROGRAMS["olmoe-1b-7b train"], "v5e:4x4")
    assert compiled.peak < memory_of("v5e:4x4")
    assert re.search(r"splash_mha_fwd[\w.]* = .*custom-call", compiled.text)


def test_the_table_has_a_row_for_every_program_and_topology():
    rows = tpu(["gpt2-small train"], ("v5e:2x4",))
    assert [row["config"] for row in rows] == ["gpt2-small train"]
    assert rows[0]["fits"] and rows[0]["topology"] == "v5e:2x4"
    # 64 rows of 1,024 tokens at 6 N + 12 L D T operations each (Chowdhery et al., 2022).
    assert rows[0]["model TFLOP"] == pytest.approx(64 * 1024 * (6 * 123_653_376 + 12 * 12 * 768 * 1024) / 1e12)
    assert rows[0]["step at least ms"] >= 1e3 * rows[0]["model TFLOP"] / 8 / 197


@pytest.mark.parametrize(("dtype", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_travel_in_the_type_of_choice(dtype, short):
    config = ExperimentConfig(
        model=PROGRAMS["gpt2-small train"].config.replace(num_layers=2, model_dim=256, num_heads=2, vocab_size=512),
        optim=OptimConfig(gradient_dtype=dtype, accumulation=2))
    mesh = make_mesh(MeshConfig(), devices_of("v5e:2x4"))
    text = lower_train_step(config, batch_shapes(config, 32), mesh)[0].compile().as_text()
    assert "splash_mha_fwd" in text
    sent = [shape for kind in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
            for shape in re.findall(r"(\w+)\[([\d,]+)\]", kind)]  # not the scalars: losses and weights
    assert sent and {kind for kind, _ in sent} == {short}
