"""The table of accelerators."""

import pytest

from transformer_jax.training.chips import CHIPS, get_chip


@pytest.mark.parametrize(("name", "memory", "peak", "bandwidth"), [
    ("v5e", 16, 197, 819), ("v6e", 32, 918, 1640), ("h100", 80, 989, 3350), ("h200", 141, 989, 4800)])
def test_chips_are_those_of_the_data_sheets(name, memory, peak, bandwidth):
    chip = get_chip(name)
    assert (chip.memory, chip.peak_flops, chip.bandwidth) == (memory * 1e9, peak * 1e12, bandwidth * 1e9)


def test_a_device_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match=r"device='tpu' is not one of v5e, v6e, h100, h200, cpu"):
        get_chip("tpu")


def test_this_machine_has_memory_but_no_published_rate():
    chip = get_chip("cpu")
    assert chip.memory > 1e8 and chip.peak_flops is None and "cpu" not in CHIPS
