"""Writes fixtures/harness_scores.json: what lm-eval's own ``hf`` says about the weights of
``harness_model.make_bundle``, read by transformers. Needs torch, transformers and lm-eval.

python -m tests.evaluation.make_harness_scores
"""

import json
import pathlib
import tempfile

import transformer_jax as tj
from tests.evaluation.harness_model import make_bundle, measure

PATH = pathlib.Path(__file__).parent / "fixtures" / "harness_scores.json"


def measure_exported() -> dict:
    """Measures the exported weights with transformers."""
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as folder:
        tj.to_huggingface(make_bundle(), folder)
        return measure(HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4))


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(measure_exported(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
