"""Imported models give what TransformerLens gives with the same weights, and LEACE what the package
of its authors gives. ``make_reference_values.py`` made the values."""

import pathlib

import jax
import numpy as np
import pytest

import transformer_jax as tj
from tests.interop.fixture_weights import model_directory
from transformer_jax import inspection
from transformer_jax.inspection.parts import read_out

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# As in make_reference_values.py, which imports torch.
CLEAN, CORRUPTED, ANSWER = np.array([[3, 5, 9, 2, 7, 11]]), np.array([[3, 5, 4, 2, 7, 11]]), 8
SITES = {"hook_resid_pre": "residual", "hook_mlp_out": "mlp_output", "attn.hook_pattern": "pattern",
         "attn.hook_z": "head_output", "attn.hook_v": "values", "mlp.hook_post": "neurons",
         "hook_attn_out": "attention_output"}


def of_answer(logits_BTV):
    return logits_BTV[0, -1, ANSWER]


@pytest.mark.long
@pytest.mark.parametrize("case", ["gpt2-transformers5", "gpt_neox-transformers5"])
def test_an_imported_model_gives_what_transformer_lens_gives(case, tmp_path):
    values = {name.removeprefix(f"{case}/"): value for name, value in np.load(FIXTURES / "transformerlens.npz").items()
              if name.startswith(case)}
    model = tj.from_huggingface(model_directory(case, tmp_path)).model
    trace = tj.trace(model, CLEAN)
    np.testing.assert_allclose(tj.forward(model, CLEAN), values["logits"], atol=1e-5)
    for layer in range(2):
        for theirs, ours in SITES.items():
            np.testing.assert_allclose(trace[f"layers.{layer}.{ours}"], values[f"blocks.{layer}.{theirs}"], atol=1e-5,
                                       err_msg=f"{layer} {ours}")
    np.testing.assert_allclose(trace["final"], values["blocks.1.hook_resid_post"], atol=1e-5)
    np.testing.assert_allclose(jax.jit(read_out(model))(trace.residual), values["logit_lens"], atol=1e-5)
    theirs = values["logit_lens"]
    expected = theirs - np.logaddexp.reduce(theirs, -1, keepdims=True)
    targets = np.full((1, 6), ANSWER)
    np.testing.assert_allclose(inspection.target_logprobs(model, trace, targets), expected[..., ANSWER], atol=1e-5)
    grid = inspection.patching_grid(model, CLEAN, CORRUPTED, of_answer)
    assert np.abs(grid).max() > 1e-2
    np.testing.assert_allclose(grid, values["patching"], atol=1e-5)


def test_leace_gives_what_the_package_of_its_authors_gives():
    values = np.load(FIXTURES / "leace.npz")
    erased = inspection.leace(values["features"], values["labels"])(values["features"])
    np.testing.assert_allclose(erased, values["erased"], atol=1e-10)
    assert np.abs(erased - values["features"]).max() > 0.1
