"""Makes ``fixtures/transformerlens.npz`` and ``fixtures/leace.npz``: what TransformerLens computes with
small random models, and the maps of the package concept-erasure.

Run it where transformer-lens, concept-erasure and torch are installed:
``python tests/inspection/make_reference_values.py``. The weights are those of
``tests/interop/fixture_weights.py``, so that only results are stored.
"""

import os
import pathlib
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from concept_erasure import LeaceEraser
from transformer_lens.model_bridge import TransformerBridge

from tests.interop.fixture_weights import model_directory

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
CASES = ("gpt2-transformers5", "gpt_neox-transformers5")
NAMES = ("hook_resid_pre", "hook_mlp_out", "attn.hook_pattern", "attn.hook_z", "attn.hook_v", "mlp.hook_post",
         "hook_resid_post", "hook_attn_out")
CLEAN, CORRUPTED, ANSWER = [[3, 5, 9, 2, 7, 11]], [[3, 5, 4, 2, 7, 11]], 8


def of_model(case: str) -> dict[str, np.ndarray]:
    """Cache entries, the logit lens and a patching grid of the residual stream."""
    directory = model_directory(case, tempfile.mkdtemp())
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    bridge = TransformerBridge.boot_transformers(str(directory), hf_model=model, device="cpu")
    clean, corrupted = torch.tensor(CLEAN), torch.tensor(CORRUPTED)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(clean)
        found = {"logits": logits}
        layers = model.config.num_hidden_layers
        for layer in range(layers):
            found |= {f"blocks.{layer}.{name}": cache[f"blocks.{layer}.{name}"] for name in NAMES}
        streams = [*(cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(layers)),
                   cache[f"blocks.{layers - 1}.hook_resid_post"]]
        found["logit_lens"] = torch.stack([bridge.unembed(bridge.ln_final(stream)) for stream in streams])
        base = bridge(corrupted)[0, -1, ANSWER]
        grid = torch.zeros(layers, clean.shape[1])
        for layer in range(layers):
            for place in range(clean.shape[1]):
                def patch(value, hook, layer=layer, place=place):
                    value = value.clone()
                    value[:, place] = cache[f"blocks.{layer}.hook_resid_pre"][:, place]
                    return value

                patched = bridge.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)])
                grid[layer, place] = patched[0, -1, ANSWER] - base
        found["patching"] = grid
    return {f"{case}/{name}": value.detach().numpy() for name, value in found.items()}


def leace() -> dict[str, np.ndarray]:
    """What LeaceEraser does to random features with three labels, in float64."""
    rng = np.random.RandomState(0)
    features, labels = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5)), rng.randint(0, 3, 60)
    features[:, 1] += labels
    eraser = LeaceEraser.fit(torch.tensor(features), torch.nn.functional.one_hot(torch.tensor(labels)).double(),
                             shrinkage=False)
    return {"features": features, "labels": labels, "erased": eraser(torch.tensor(features)).numpy()}


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURES / "transformerlens.npz", **{
        name: value for case in CASES for name, value in of_model(case).items()})
    np.savez_compressed(FIXTURES / "leace.npz", **leace())
