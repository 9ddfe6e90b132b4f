"""The flags of ``generate`` for constrained text, own documents and the calculator."""

import json

import jax
import pytest

import transformer_jax as tj

pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')
pytest.importorskip("bm25s", reason='needs pip install "transformer_jax[documents]"')


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A saved decoder with role tokens, not trained."""
    workdir = tmp_path_factory.mktemp("chat")
    tokenizer = tj.Tokenizer.train(['the cat sat? yes no {"a": 1}\n<=>+2'], kind="char", chat=True)
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=64, num_layers=1, num_heads=1, model_dim=8)
    tj.save(workdir, tj.Bundle(model=tj.Decoder(config, key=jax.random.key(0)), tokenizer=tokenizer, config=config))
    return workdir


@pytest.mark.long
def test_constrained_text(program, chat, tmp_path):
    common = (f"--workdir={chat}", "--prompt=the cat", "--max_new_tokens=16")
    assert program("generate", *common, "--choice= yes", "--choice= no").out in ("the cat yes\n", "the cat no\n")
    assert program("generate", *common, "--regex=s{3}", "--stream").out == "the catsss\n"
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}},
                                                      "required": ["a"], "additionalProperties": False}))
    found = program("generate", *common, f"--json_schema={tmp_path}/schema.json").out
    assert found in ('the cat{"a": 1}\n', 'the cat{"a": 2}\n')


@pytest.mark.long
def test_passages_are_shown_and_put_before_the_question(program, chat, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat")
    (tmp_path / "b.txt").write_text("no yes")
    read = []
    generate = tj.generate
    monkeypatch.setattr(tj, "generate", lambda model, prompts, **options: read.append(prompts) or generate(
        model, prompts, **options))
    common = ("generate", f"--workdir={chat}", "--chat", f"--documents={tmp_path}", "--max_new_tokens=8")
    ended = program(*common, "--prompt=cat?")
    tokenizer = tj.load(chat).tokenizer
    assert ended.out.startswith("[1] a.txt, passage 1 (score ") and "): the cat sat\ncat?\n" in ended.out
    assert tokenizer.decode(read[0][0]).startswith("the cat sat\n\ncat?")
    assert program(*common, "--prompt=a").out.startswith(f"no passage of {tmp_path} is used: none has a word")


@pytest.mark.parametrize(("flags", "message"), [
    (["--regex=(?=a)"], "llguidance cannot follow the grammar"),
    (["--regex=a", "--choice=b"], "--regex and --choice exclude each other"),
    (["--documents=x"], "--documents puts passages into a question, so it needs --chat"),
    (["--chat", "--documents=none", "--prompt=a"], "none is not a directory with files named"),
    (["--json_schema=none.json"], "none.json: No such file or directory"),
    (["--calculator", "--stream"], "--calculator writes one whole text"),
])
def test_wrong_flags(program, chat, flags, message):
    assert message in program("generate", f"--workdir={chat}", *flags).error


@pytest.mark.long
def test_the_calculator(program, chat):
    ended = program("generate", f"--workdir={chat}", "--prompt=the cat <<", "--calculator", "--max_new_tokens=6")
    assert ended.status == 0 and ended.out.startswith("the cat <<")
