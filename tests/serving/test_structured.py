"""The server applies the grammars of requests, and its texts are those of ``tj.generate``."""

import concurrent.futures
import re

import jax
import pytest

import transformer_jax as tj
from tests.serving.running import TOKENIZER, import_httpx, make_decoder, make_served, served

pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')
httpx = import_httpx()
pytest.importorskip("starlette", reason='needs pip install "transformer_jax[serve]"')

pytestmark = pytest.mark.long  # a server compiles the programs of a model
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["fox", "dog"]}, "b": {"type": "boolean"}},
          "required": ["a", "b"], "additionalProperties": False}


@pytest.fixture(scope="module")
def post():
    with served({"tiny": make_served(max_batch=4)}) as address:
        with httpx.Client(base_url=address, timeout=120) as client:
            yield lambda **body: client.post("/v1/completions", json={"model": "tiny", **body})



@pytest.mark.parametrize(("outputs", "grammar"), [
    ({"choice": ["the fox", "the dog", "a"]}, lambda: tj.Grammar.choice(["the fox", "the dog", "a"])),
    ({"regex": "(fox|dog){2}!"}, lambda: tj.Grammar.regex("(fox|dog){2}!")),
])
def test_texts_are_those_of_generate(post, outputs, grammar):
    reply = post(prompt="the ", structured_outputs=outputs, n=3, seed=5, max_tokens=24).json()
    expected = tj.generate(make_decoder(), "the ", tokenizer=TOKENIZER, key=jax.random.key(5), num_samples=3,
                           max_new_tokens=24, grammar=grammar())
    assert [choice["text"] for choice in reply["choices"]] == expected.texts
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}
    assert set(expected.finish_reasons) <= {"grammar", "eos"}


@pytest.mark.parametrize(("field", "message"), [
    ({"structured_outputs": {"regex": "(?=a)"}}, "look-around"),
    ({"structured_outputs": {"regexp": "a"}}, "must be an object with one of json, regex, choice, grammar"),
    ({"structured_outputs": {"choice": []}}, "must be a list of strings"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "exclude each other"),
    ({"structured_outputs": {"choice": ["a" * 60_000, "b" * 60_000]}}, "more than 100000 characters; simplify it"),
    ({"structured_outputs": {"grammar": "start"}}, "cannot follow the grammar"),
    ({"response_format": {"type": "json_schema"}}, 'must be {"type": "text"}'),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objet"}}}}, "objet"),
])
def test_wrong_grammars_are_errors_of_the_request(post, field, message):
    reply = post(prompt="the ", **field)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] in field


def test_text_that_the_vocabulary_cannot_write_is_an_error_of_its_request_only(post):
    """The characters of TOKENIZER have no braces."""
    wrong = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    bodies = [dict(prompt="the ", seed=2, max_tokens=40, structured_outputs={"regex": "[a-z ]{40}"}), wrong] * 3
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda body: post(**{"prompt": "the ", **body}), bodies))
    texts = {reply.json()["choices"][0]["text"] for reply in replies[::2]}
    assert len(texts) == 1 and re.fullmatch("[a-z ]{40}", texts.pop())
    for reply in replies[1::2]:
        assert reply.status_code >= 400 and "no token for the characters" in reply.json()["error"]["message"]


@pytest.mark.long
def test_text_as_a_format_changes_nothing(post):
    replies = [post(prompt="the ", seed=1, max_tokens=8, **field).json()["choices"][0]["text"]
               for field in ({}, {"response_format": {"type": "text"}})]
    assert replies[0] == replies[1]
