"""The arrays that a layer keeps for its gradient: no float32 activation, no weight, and only those
wide activations that matrix products need."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals

import transformer_jax as tj

B, T, D, F, LAYERS = 3, 8, 16, 64, 2


@pytest.mark.parametrize("changes", [
    dict(), dict(norm="rmsnorm", use_bias=False, activation="swiglu", mlp_dim=F, positions="rope"),
    dict(norm_position="post", activation="gelu")])
def test_a_bfloat16_layer_keeps_no_float32_and_no_weight(capsys, changes):
    config = tj.presets.get("gpt2-small").replace(
        vocab_size=11, max_len=T, num_layers=LAYERS, num_heads=2, model_dim=D, dtype="bfloat16",
        attention_implementation="chunked").replace(**changes)
    model = tj.Decoder(config, key=jax.random.key(0))
    print_saved_residuals(lambda model: model(jnp.ones((B, T), jnp.int32)).hidden.sum(), model)
    kept = re.findall(rf"^(\w+)\[{LAYERS},([\d,]+)\] output of scan", capsys.readouterr().out, re.MULTILINE)
    activations = [dtype for dtype, shape in kept if shape in (f"{B},{T},{D}", f"{B * T},{D}")]
    assert activations and set(activations) == {"bf16"}, kept
    wide = [dtype for dtype, shape in kept if shape in (f"{B},{T},{F}", f"{B * T},{F}")]
    # The inputs of the activation and of the product after it; a gate has two more.
    assert wide == ["bf16"] * (4 if config.activation == "swiglu" else 2), kept
    weights = {f"{rows},{columns}" for rows in (D, F) for columns in (D, F)}
    assert weights.isdisjoint(shape for _, shape in kept), kept  # no copies in bfloat16
