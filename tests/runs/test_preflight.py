"""Preflight predicts what a run needs. The tests compare it with shapes, formulas and real runs."""

import dataclasses

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, LoraConfig, MeshConfig, OptimConfig
from transformer_jax.runs import preflight as module
from transformer_jax.runs.preflight import batch_shapes
from transformer_jax.sharding import make_mesh
from transformer_jax.training.chips import CHIPS, Chip
from transformer_jax.training.metrics import flops_per_token

MODEL = tj.ModelConfig(vocab_size=48, max_len=16, num_layers=2, num_heads=4, model_dim=32)
CONFIG = ExperimentConfig(model=MODEL, batch_size=16)
ONE = MeshConfig(data=1)


@pytest.fixture(scope="module")
def found():
    return tj.preflight(CONFIG, mesh=make_mesh(ONE, jax.devices()[:1]), device="v5e", search=False)


def test_parameters_and_adams_two_moments_are_counted(found):
    assert found.num_parameters == tj.count_parameters(MODEL)
    assert found.parameters == 4 * found.num_parameters
    assert 2 * found.parameters <= found.optimizer < 2 * found.parameters + 100  # and its counters
    assert 3 * 16 * 16 * 4 <= found.inputs < 3 * 16 * 16 * 4 + 100  # tokens, targets, segment ids; step and key
    assert found.peak == found.parameters + found.optimizer + found.inputs + found.temporaries
    assert found.temporaries > found.parameters  # the gradient at least


def test_operations_are_those_of_the_formula(found):
    assert found.tokens == 16 * 16
    assert found.flops == 16 * 16 * flops_per_token(MODEL, found.num_parameters)


def test_no_chip_is_faster_than_its_rates(found):
    assert [line.chip for line in found.rooflines] == list(CHIPS.values())
    for line in found.rooflines:
        assert line.fits and 0 < line.mfu <= 1
        assert line.seconds >= found.flops / line.chip.peak_flops
        assert line.seconds >= 2 * (found.parameters + found.optimizer) / line.chip.bandwidth
        assert line.tokens_per_second == pytest.approx(found.tokens / line.seconds)


def test_the_page_says_what_was_found(found):
    page = str(found)
    assert f"{found.num_parameters:,} parameters, 16 rows of 16 tokens a step" in page and "one device" in page
    assert "v5e: 16 GB, of which 90% are counted on: fits; largest batch: not searched" in page
    assert all(name in page for name in CHIPS)


def test_fsdp_divides_weights_and_moments_among_devices(found):
    sharded = tj.preflight(CONFIG, mesh=make_mesh(MeshConfig(fsdp=8)), device="v5e", search=False)
    assert found.parameters / 8 <= sharded.parameters < 0.2 * found.parameters
    assert sharded.mesh == {"data": 1, "fsdp": 8, "expert": 1, "sequence": 1, "tensor": 1}
    assert "mesh: fsdp 8" in str(sharded)
    assert sharded.flops == found.flops


def test_the_largest_batch_is_found_where_the_peak_reaches_the_memory(monkeypatch):
    """Peaks of a machine whose memory grows as 1,000 + 7 a row, and not quite as a line."""
    compiled = []

    def compile_(config, shapes, mesh):
        rows = shapes["tokens"].shape[0]
        compiled.append(rows)
        return {"parameters": 0, "optimizer": 0, "inputs": 0, "temporaries": 0, "peak": 1000 + 7 * rows + rows // 50}, 1

    monkeypatch.setattr(module, "_compile", compile_)
    config = CONFIG.replace(batch_size=8, optim=OptimConfig(accumulation=2))
    shapes = batch_shapes(config, 8)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])

    def largest(usable):
        return module._largest_batch(config, shapes, mesh, compile_(config, shapes, mesh)[0]["peak"], usable)

    best = max(rows for rows in range(4, 4000, 4) if 1000 + 7 * rows + rows // 50 <= 9000)
    assert best - 8 <= largest(9000) <= best and len(compiled) <= 6
    assert largest(9000) % 4 == 0  # rows divide over two devices and two microbatches
    assert largest(1000) == 0


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_batches_of_the_other_families_have_what_their_losses_read(family):
    config = CONFIG.replace(model=MODEL.replace(family=family))
    shapes = batch_shapes(config, 4)
    assert {shape.shape[0] for shape in shapes.values()} == {4}
    assert ("masked_positions" in shapes) == (family == "encoder") and ("source" in shapes) != (family == "encoder")
    if family == "encoder":
        assert shapes["masked_targets"].shape == (4, 3)  # the ceiling of 0.15 x 16


def test_preflight_refuses_configs_that_it_cannot_plan():
    with pytest.raises(ValueError, match="the task 'reward' does not define the shapes"):
        tj.preflight(CONFIG.replace(model=MODEL.replace(family="reward")))
    with pytest.raises(ValueError, match="lora.rank=4"):
        tj.preflight(CONFIG.replace(lora=LoraConfig(rank=4)))
    with pytest.raises(ValueError, match="set model.vocab_size"):
        tj.preflight(CONFIG.replace(model=MODEL.replace(vocab_size=None)))
    with pytest.raises(ValueError, match="device='abacus' is not one of v5e"):
        tj.preflight(CONFIG, device="abacus")


def test_preflight_reports_a_device_that_is_too_small(found):
    small = dataclasses.replace(found, chip=Chip("tiny", 1e6, 1e12, 1e9), fits=False, largest_batch=0)
    assert "DOES NOT FIT; largest batch: none" in str(small)


def test_nothing_is_allocated():
    """A hundred billion parameters are planned here."""
    shapes = {name: np.zeros((8, 16), np.int32) for name in ("tokens", "targets")}
    config = CONFIG.replace(model=MODEL.replace(num_layers=8, model_dim=32_768, num_heads=256), batch_size=8)
    before = sum(array.nbytes for array in jax.live_arrays())
    found = tj.preflight(config, shapes, make_mesh(MeshConfig(fsdp=8)), device="h100", search=False)
    assert found.num_parameters > 1e11 and not found.fits
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1e6
