"""Functions that use a model and its tokenizer together work on a directory of transformers, with
the results of transformers."""

import numpy as np
import pytest
from imported import KINDS, TEXTS, imported

import transformer_jax as tj

pytest.importorskip("tokenizers", reason="the extra `hf` is not installed")
pytest.importorskip("safetensors", reason="the extra `hf` is not installed")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return str(tmp_path_factory.mktemp("imported"))


@pytest.mark.parametrize(("kind", "text"), [
    ("bert", "The cat [MASK] on [MASK] mat."), ("roberta", "the <mask> sat<mask>")])
def test_fill_mask_and_embed(kind, text, tmp):
    directory, bundle = imported(kind, tmp)
    found = tj.fill_mask(bundle.model, text, tokenizer=bundle.tokenizer, top_k=4)[0]
    assert len(found) == 2 and all(len(candidates) == 4 for candidates in found)
    vectors = tj.embed(bundle.model, TEXTS, tokenizer=bundle.tokenizer, pooling="none")
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(text, return_tensors="pt")
    places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
    with torch.no_grad():
        probabilities = theirs(**encoded).logits[0, places].softmax(-1)
        wanted = torch.topk(probabilities, 4)
        for candidates, values, ids in zip(found, *wanted, strict=True):
            assert [candidate.token_id for candidate in candidates] == ids.tolist()
            np.testing.assert_allclose([candidate.probability for candidate in candidates], values, rtol=1e-4)
        for text, vector in zip(TEXTS, vectors, strict=True):
            hidden = theirs.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            np.testing.assert_allclose(vector, hidden, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bart", "marian", "t5"])
def test_translations(kind, tmp):
    directory, bundle = imported(kind, tmp)
    found = tj.beam_search(bundle.model, TEXTS, tokenizer=bundle.tokenizer, beam_size=3, length_penalty=0.0,
                           max_new_tokens=12)
    greedy = tj.generate(bundle.model, TEXTS, tokenizer=bundle.tokenizer, sampling=tj.Sampling(temperature=0),
                         max_new_tokens=12)
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    theirs.generation_config.forced_eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    settings = dict(attention_mask=encoded["attention_mask"], do_sample=False, length_penalty=0.0,
                    max_new_tokens=11 + len(bundle.config.start_ids))
    with torch.no_grad():
        for ours, options in ((found.texts, dict(num_beams=3, early_stopping="never")), (greedy.texts, {})):
            wanted = theirs.generate(encoded["input_ids"], **settings, **options)
            assert ours == tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert len(set(greedy.texts)) > 1


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_a_text(kind, tmp):
    _, bundle = imported(kind, tmp)
    inspected = tj.inspect_text(bundle, TEXTS[0])
    pair = bundle.config.family == "encoder_decoder"
    maps = np.asarray(inspected.attention("encoder" if pair else "self"))
    ids = bundle.tokenizer.encode_source(TEXTS[0])
    assert maps.shape == (2, 2, len(ids), len(ids))
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)
    if pair:
        assert inspected.ids[:len(bundle.config.start_ids)].tolist() == list(bundle.config.start_ids)
        assert inspected.attention("cross").shape[2:] == (len(inspected.ids), len(ids))
