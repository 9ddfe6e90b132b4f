"""Models of every family as published on the Hugging Face hub, as transformers 5 saves them again,
and as ``AutoModel`` saves them without a head: computed here as transformers computed them.

``make_models.py`` made the fixtures; torch is not needed, but for one test that reads our exports.
"""

import json
import warnings

import jax
import numpy as np
import pytest
from fixture_weights import MODELS, cases, model_directory

import transformer_jax as tj
from transformer_jax.interop import FAMILIES

pytest.importorskip("safetensors", reason="the extra `hf` is not installed")
CASES = cases()


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A case's directory, bundle and the values that transformers computed; each case is read
    once."""
    known = {}

    def once(case):
        if case not in known:
            directory = model_directory(case, tmp_path_factory.mktemp("models") / case)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*is loaded without a tokenizer.*")
                if is_body(case):
                    warnings.filterwarnings("ignore", ".*without its head.*")
                bundle = tj.from_huggingface(directory)
            known[case] = directory, bundle, np.load(MODELS / case / "expected.npz")
        return known[case]

    return once


def is_body(case):
    return "logits" not in np.load(MODELS / case / "expected.npz")


@jax.jit
def run(model, tokens, options):
    out = model(*tokens, **options)
    return out.logits, out.hidden


def test_there_is_a_case_of_every_family_and_era():
    found = {(json.loads((MODELS / case / "config.json").read_text())["model_type"], case.split("-")[1])
             for case in CASES}
    assert {(family, era) for family in FAMILIES for era in ("published", "transformers5")} <= found
    assert {"gpt2", "llama", "bert", "roberta", "distilbert", "electra", "albert", "modernbert", "bart", "marian",
            "t5"} == {family for family, era in found if era == "automodel"}


# The short tests of these families read what transformers 5 saves; the other files differ in names.
NEWER = tuple(f"{name}-{era}" for name in ("distilbert", "xlm_roberta", "camembert", "electra", "albert")
              for era in ("published", "automodel"))


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.long if case in NEWER else ()) for case in CASES])
def test_logits_and_hidden_states(case, read):
    _, bundle, wanted = read(case)
    mask = wanted["mask"] if "mask" in wanted else np.ones(wanted["hidden"].shape[:2], int)
    if bundle.config.family == "encoder_decoder":
        tokens, options = (wanted["source"], wanted["target"]), {"source_segment_ids_BS": mask.astype(np.int32)}
        mask = np.ones(wanted["hidden"].shape[:2], int)
    else:
        tokens, options = (wanted["tokens"],), {"segment_ids_BT": mask.astype(np.int32)}
    logits, hidden = map(np.asarray, run(bundle.model, tuple(ids.astype(np.int32) for ids in tokens), options))
    real = mask == 1
    assert np.ptp(wanted["hidden"]) > 1
    np.testing.assert_allclose(hidden[real], wanted["hidden"][real], atol=2e-5)
    if not is_body(case):
        places = real if logits.ndim == 3 else ...  # a classifier of texts has no axis of tokens
        np.testing.assert_allclose(logits[places], wanted["logits"][places], atol=2e-5)


# Each family compiles its own program, so the other families are among the long tests.
SHORT = ("gpt2", "gptj", "marian")


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case.split("-")[0] in SHORT else pytest.mark.long)
    for case in CASES if "generated" in np.load(MODELS / case / "expected.npz")])
def test_fifty_greedy_tokens(case, read):
    _, bundle, wanted = read(case)
    if bundle.config.family == "encoder_decoder":
        prompts = [row[real == 1].tolist() for row, real in zip(wanted["source"], wanted["mask"], strict=True)]
        skipped = len(bundle.config.start_ids)
        assert (wanted["generated"][:, :skipped] == bundle.config.start_ids).all()
    else:
        prompts, skipped = wanted["prompt"].tolist(), 0
    found = tj.generate(bundle.model, prompts, max_new_tokens=50, end_ids=[], sampling=tj.Sampling(temperature=0))
    theirs = wanted["generated"][:, skipped:].tolist()
    # In transformers, forced tokens count as new tokens.
    assert [row[:len(other)] for row, other in zip(found.tokens, theirs, strict=True)] == theirs
    assert min(map(len, theirs)) >= 49


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case.endswith("-transformers5") else pytest.mark.long) for case in CASES])
def test_exported_and_read_again(case, read, tmp_path):
    directory, bundle, _ = read(case)
    tj.to_huggingface(bundle, tmp_path)
    again = tj.from_huggingface(tmp_path)
    assert again.config == bundle.config
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle.model)
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path))
    assert after["model_type"] == before["model_type"]
    # Settings that the family's table does not express are kept unchanged.
    lost = {name for name in before.keys() - after.keys()}
    assert not lost, lost
    generation = directory / "generation_config.json"
    if generation.is_file():
        assert (tmp_path / "generation_config.json").read_bytes() == generation.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_export(case, read, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    _, bundle, wanted = read(case)
    tj.to_huggingface(bundle, tmp_path)
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    missing = {key for key in info["missing_keys"] if "embed_positions" not in key}  # which it computes
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if is_body(case):
        model = transformers.AutoModel.from_pretrained(tmp_path)
    model = model.float().eval()
    with torch.no_grad():
        ids = {ours: torch.tensor(wanted[ours].astype(np.int64)) for ours in wanted.files if ours not in
               ("hidden", "logits", "generated", "prompt")}
        inputs = {"input_ids": ids.get("source", ids.get("tokens"))}
        inputs |= {"attention_mask": ids["mask"]} if "mask" in ids else {}
        inputs |= {"decoder_input_ids": ids["target"]} if "target" in ids else {}
        out = model(**inputs)
    value = out.last_hidden_state if is_body(case) else out.logits
    expected = wanted["hidden" if is_body(case) else "logits"]
    np.testing.assert_allclose(value.numpy().reshape(expected.shape), expected, atol=2e-5)
