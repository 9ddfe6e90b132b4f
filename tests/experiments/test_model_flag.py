"""Programs accept a Hugging Face directory (``--model``) in place of a workdir."""

import json

import numpy as np
import pytest
from imported import TEXTS, imported

import transformer_jax as tj
from transformer_jax.training.leaves import tree_digest

pytest.importorskip("tokenizers", reason="the extra `hf` is not installed")
pytest.importorskip("safetensors", reason="the extra `hf` is not installed")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return str(tmp_path_factory.mktemp("imported"))


@pytest.mark.long
def test_generate(program, tmp):
    directory, bundle = imported("gpt2", tmp)
    ended = program("generate", f"--model={directory}", "--prompt=the cat", "--temperature=0", "--max_new_tokens=6")
    wanted = tj.generate(bundle.model, ["the cat"], tokenizer=bundle.tokenizer, max_new_tokens=6,
                         sampling=tj.Sampling(temperature=0)).texts[0]
    assert ended.status == 0 and wanted in ended.out, ended


@pytest.mark.parametrize(("kind", "text"), [("bert", "the cat [MASK] here"), ("roberta", "the <mask> sat")])
def test_fill_mask(program, tmp, kind, text):
    directory, bundle = imported(kind, tmp)
    ended = program("fill_mask", f"--model={directory}", f"--text={text}", "--top_k=3")
    assert ended.status == 0, ended
    for candidate in tj.fill_mask(bundle.model, text, tokenizer=bundle.tokenizer, top_k=3)[0][0]:
        assert f"{candidate.probability:.4f}  {candidate.token!r}" in ended.out, ended.out


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bart", "marian", "t5"])
def test_translate(program, tmp, kind):
    directory, bundle = imported(kind, tmp)
    ended = program("translate", f"--model={directory}", f"--text={TEXTS[0]}", "--beam_size=3")
    assert ended.status == 0, ended
    wanted = tj.beam_search(bundle.model, TEXTS[:1], tokenizer=bundle.tokenizer, beam_size=3).texts[0]
    assert ended.out.strip() == wanted.strip()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt2", "bert", "bart"])
def test_attention(program, tmp, kind, tmp_path):
    directory, _ = imported(kind, tmp)
    ended = program("attention", f"--model={directory}", f"--text={TEXTS[0]}", f"--out={tmp_path / 'maps.html'}")
    assert ended.status == 0 and "cat" in (tmp_path / "maps.html").read_text(), ended


@pytest.mark.long
def test_adapters_learn_on_an_imported_model(program, tmp, tmp_path):
    directory, bundle = imported("gpt2", tmp)
    data = tmp_path / "demonstrations.jsonl"
    data.write_text("".join(json.dumps({"prompt": "cats", "response": text}) + "\n" for text in 8 * TEXTS))
    ended = program("sft", f"--model={directory}", f"--config.data.path={data}", f"--workdir={tmp_path / 'run'}",
                    "--config=sft_instructions", "--config.lora.rank=2", "--config.batch_size=8", "--config.steps=6",
                    "--config.log_every=1", "--config.sample.every=0", "--config.eval.every=6")
    assert ended.status == 0, ended
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 6 and losses[-1] < losses[0]
    tuned = tj.load(tmp_path / "run")
    assert tuned.tokenizer.digest == bundle.tokenizer.digest
    assert tree_digest(tj.load(tmp_path / "run" / "base").model) == tree_digest(bundle.model)
    assert not np.array_equal(np.asarray(tuned.model.stack.blocks.attention.query.kernel[...]),
                              np.asarray(bundle.model.stack.blocks.attention.query.kernel[...]))
