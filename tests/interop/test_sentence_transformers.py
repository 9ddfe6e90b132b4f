"""Exports that sentence-transformers loads, with the vectors of ``tj.embed``; the fixture has what
sentence-transformers computed, see ``make_sentence_vectors``."""

import json

import jax
import numpy as np
import pytest
from make_sentence_vectors import POOLINGS, TEXTS, VECTORS, bundle, theirs

import transformer_jax as tj

pytest.importorskip("tokenizers", reason="the extra `hf` is not installed")
pytest.importorskip("safetensors", reason="the extra `hf` is not installed")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_sentence_transformers(pooling, tmp_path):
    tj.interop.to_sentence_transformers(bundle(), tmp_path, pooling=pooling)
    again = tj.from_huggingface(tmp_path)
    found = tj.embed(again.model, TEXTS, tokenizer=again.tokenizer, pooling=pooling)
    wanted = np.load(VECTORS)[pooling]
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    settings = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    mode = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}[pooling]
    assert [name for name, value in settings.items() if value is True] == [f"pooling_mode_{mode}"]


def test_sentence_transformers_loads_the_export(tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    made = bundle()
    tj.interop.to_sentence_transformers(made, tmp_path)
    np.testing.assert_allclose(theirs(tmp_path), tj.embed(made.model, TEXTS, tokenizer=made.tokenizer), atol=2e-5)


def test_what_sentence_transformers_cannot_read_is_refused(tmp_path):
    made = bundle()
    own = tj.Bundle(made.model, tj.Tokenizer.train(["a b"], kind="char"), made.config)
    with pytest.raises(ValueError, match="cannot read a tokenizer of type Tokenizer; train a model that was loaded"):
        tj.interop.to_sentence_transformers(own, tmp_path)
    with pytest.raises(ValueError, match="pooling='max' is not one of mean, first, last"):
        tj.interop.to_sentence_transformers(made, tmp_path, pooling="max")
    config = made.config.replace(norm_position="pre")
    model = jax.eval_shape(lambda key: tj.Encoder(config, key=key), jax.random.key(0))
    with pytest.raises(ValueError, match="norm_position='pre': transformers normalizes the last layer once more"):
        tj.interop.to_sentence_transformers(tj.Bundle(model, made.tokenizer, config), tmp_path)
