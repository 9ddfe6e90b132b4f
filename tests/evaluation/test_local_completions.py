"""lm-eval's client of the OpenAI API finds the same scores through our server as the adapter
does."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

import transformer_jax as tj
from tests.evaluation import harness_model

for package, extra in (("lm_eval", "lm-eval"), ("tokenizers", "hf"), ("uvicorn", "serve"), ("starlette", "serve"),
                       ("tenacity", "lm-eval"), ("aiohttp", "lm-eval")):
    pytest.importorskip(package, reason=f'needs pip install "transformer_jax[{extra}]"')
pytest.importorskip("transformers", reason="lm-eval's client tokenizes with transformers")


@pytest.mark.long
def test_scores_through_the_server_are_those_of_the_adapter(tmp_path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tests.evaluation.test_harness import check_equal
    from tests.serving.running import served
    from transformer_jax.evaluation import HarnessModel
    from transformer_jax.serving import Engine
    from transformer_jax.serving.served_model import ServedModel

    bundle = harness_model.make_bundle()
    tj.to_huggingface(bundle, tmp_path)
    engine = Engine(bundle.model, tokenizer=bundle.tokenizer, max_batch=8)
    with served({"tiny": ServedModel("tiny", bundle.model, bundle.tokenizer, engine)}) as address:
        client = LocalCompletionsAPI(base_url=f"{address}/v1/completions", model="tiny", tokenizer=str(tmp_path),
                                     max_length=bundle.config.max_len, num_concurrent=1, batch_size=4)
        found = harness_model.measure(client)
    # The client leaves room for one more token: of 128 it reads 127, and 126 of texts without a prompt.
    expected, of_texts = (harness_model.measure(HarnessModel(bundle=bundle, max_length=size)) for size in (127, 126))
    for part in expected:
        expected[part]["tj_text"] = of_texts[part]["tj_text"]
    check_equal(found, expected)
