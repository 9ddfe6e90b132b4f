"""Errors of the JAX runtime become clear messages."""

import jax
import jax.numpy as jnp
import pytest

from transformer_jax.config import ExperimentConfig, LossConfig, MeshConfig, ModelConfig, OptimConfig
from transformer_jax.training.errors import LostProcessError, OutOfMemoryError, explained

CONFIG = ExperimentConfig(model=ModelConfig(vocab_size=48), batch_size=12)


def test_too_large_an_array_names_the_levers_in_order():
    with pytest.raises(OutOfMemoryError) as caught, explained(CONFIG, 8):
        jax.block_until_ready(jnp.zeros((1 << 24, 1 << 24)))  # a petabyte
    message = str(caught.value)
    levers = ["smaller batch_size (now 12)", "larger optim.accumulation (now 1)", "model.remat=full (now none)",
              "larger mesh.fsdp (now 1 of 8 devices)", "model.dtype=bfloat16 (now float32)", "loss.most_logits=0",
              "experiments.preflight"]
    places = [message.index(lever) for lever in levers]
    assert places == sorted(places) and "\n" not in message
    assert caught.value.__cause__ is not None


def test_levers_that_are_pulled_are_not_named():
    config = CONFIG.replace(model=CONFIG.model.replace(remat="full", dtype="bfloat16"), mesh=MeshConfig(fsdp=8),
                            optim=OptimConfig(accumulation=12), loss=LossConfig(most_logits=0))
    message = str(OutOfMemoryError(config, 8))
    assert not any(lever in message for lever in ("remat", "fsdp", "dtype", "most_logits")) and "(1)" in message


def test_a_broken_connection_is_a_lost_process_where_there_are_several(monkeypatch):
    error = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), explained(CONFIG, 8):
        raise error
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcessError, match="Connection closed by peer"), explained(CONFIG, 8):
        raise error


@pytest.mark.parametrize("error", [ValueError("a wrong setting"), jax.errors.JaxRuntimeError("INTERNAL: a bug")])
def test_other_errors_pass(error, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(type(error)) as caught, explained(CONFIG, 8):
        raise error
    assert caught.value is error
