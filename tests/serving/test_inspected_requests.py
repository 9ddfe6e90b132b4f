"""Requests that read or change what the model computes, that get passages of documents, and that call
the calculator: through the ``openai`` client."""

import concurrent.futures
import json

import jax
import numpy as np
import pytest
import running

import transformer_jax as tj
from transformer_jax.inspection import interventions, lens
from transformer_jax.serving.served_model import ServedModel

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

TEXTS = [*running.TEXT, "|_/", "12+30=42 << >> 0123456789*-()."]
TOKENIZER = tj.Tokenizer.train(TEXTS, kind="char", chat=True)
SHAPE = running.SHAPE | dict(vocab_size=TOKENIZER.vocab_size, num_layers=2, max_len=128)
MODEL = tj.Decoder(tj.ModelConfig(**SHAPE), key=jax.random.key(1))
VECTOR = np.random.default_rng(0).normal(size=32).astype(np.float32)
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {
    "type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}
DOCUMENTS = {"fox.txt": "the quick brown fox jumps\n\nthe lazy dog sleeps", "sums.txt": "2+2=4"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("bm25s", reason='needs pip install "transformer_jax[documents]"')
    directory = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (directory / name).write_text(text)
    engine = running.Engine(MODEL, tokenizer=TOKENIZER, max_batch=2)
    return ServedModel("open", MODEL, TOKENIZER, engine, allows_inspection=True, steering_vectors={"away": VECTOR},
                       documents=tj.tools.Passages.read(directory, max_words=6), num_passages=1)


@pytest.fixture(scope="module")
def client(served):
    closed = ServedModel("closed", MODEL, TOKENIZER, served.engine)
    with running.served({"open": served, "closed": closed}) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=600) as client:
            yield client


def complete(client, prompt="the quick", model="open", **extra):
    seed = extra.pop("seed", 1)
    return client.completions.create(model=model, prompt=prompt, max_tokens=8, seed=seed, extra_body={
        "ignore_eos": True, "return_token_ids": True} | extra)


def generated(prompt="the quick", seed=1, **options):
    return tj.generate(MODEL, [prompt], tokenizer=TOKENIZER, key=jax.random.key(seed), max_new_tokens=8, end_ids=(),
                       **options).tokens[0]


@pytest.mark.long
def test_edits_are_those_of_generate_and_leave_the_neighbours_alone(client):
    edits = {"steer": [{"layer": 1, "vector": "away", "scale": 3.0}], "ablate": [{"layer": 0, "heads": [1]}]}
    intervene = interventions.together(interventions.steer(1, VECTOR, 3.0), interventions.ablate_head(0, 1))
    bodies = [{}, edits, {"seed": 2}, edits | {"seed": 2}]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [each.choices[0].token_ids for each in pool.map(lambda body: complete(client, **body), bodies)]
    expected = [generated(), generated(intervene=intervene), generated(seed=2), generated(seed=2, intervene=intervene)]
    assert found == expected and expected[0] != expected[1] and expected[2] != expected[3]
    assert complete(client, steer=[{"layer": 1, "vector": (3 * VECTOR).tolist()}],
                    ablate=edits["ablate"]).choices[0].token_ids == expected[1]
    # What was read with an edit is not used for a prompt without one, and the other way round.
    assert complete(client).choices[0].token_ids == expected[0]


@pytest.mark.long
def test_inspection_shows_what_the_model_computed_for_each_new_token(client):
    edits = {"steer": [{"layer": 0, "vector": "away", "scale": 2.0}]}
    what = {"attention": {"layers": [1], "heads": [0, 1]}, "logit_lens": {"layers": [0, 2], "top_k": 3},
            "residuals": {"layers": [1]}}
    choice = complete(client, inspect=what, **edits).choices[0]
    tokens, start = choice.inspection["token_ids"], len("the quick")
    assert tokens == [*TOKENIZER.encode("the quick"), *choice.token_ids]
    trace = tj.trace(MODEL, np.array([tokens[:-1]]), intervene=interventions.steer(0, VECTOR, 2.0))
    places = list(range(start - 1, len(tokens) - 1))
    np.testing.assert_allclose(choice.inspection["attention"]["weights"],
                               trace.attention(layers=[1], heads=[0, 1], queries=places)[:, 0], atol=1e-4)
    expected = lens.logit_lens(MODEL, trace, positions=places, top_k=3)
    np.testing.assert_allclose(choice.inspection["logit_lens"]["probabilities"],
                               np.asarray(expected.probabilities)[[0, 2], 0], atol=1e-4)
    assert choice.inspection["logit_lens"]["token_ids"][1] == np.asarray(expected.ids)[2, 0].tolist()
    np.testing.assert_allclose(choice.inspection["residuals"]["vectors"],
                               np.asarray(trace.residual)[1:2, 0, start - 1:], atol=1e-4)
    parts = [part for part in client.completions.create(model="open", prompt="the", max_tokens=3, seed=0, stream=True,
                                                         extra_body={"inspect": {"residuals": {"layers": [2]}}})]
    assert np.shape(parts[-1].choices[0].inspection["residuals"]["vectors"]) [0::2] == (1, 32)


@pytest.mark.parametrize(("model", "body", "message"), [
    ("closed", {"inspect": {"attention": {}}}, "--allow_inspection"),
    ("closed", {"ablate": [{"layer": 0, "heads": [0]}]}, "--allow_inspection"),
    ("open", {"inspect": {"maps": {}}}, "attention, logit_lens, residuals"),
    ("open", {"inspect": {"attention": {"layers": [2]}}}, "whole numbers from 0 to 1"),
    ("open", {"steer": [{"layer": 0, "vector": "none"}]}, "there are: away"),
    ("open", {"steer": [{"layer": 0, "vector": [1.0]}]}, "a list of 32 numbers"),
    ("open", {"steer": [{"vector": "away"}]}, "no layer"),
    ("open", {"ablate": [{"layer": 5, "heads": [0]}]}, "layer=5"),
    ("open", {"ablate": {"layer": 0}}, "a list of objects"),
])
def test_wrong_inspections_are_errors_of_the_request(client, model, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, model=model, **body)


def chat(client, content="2+2?", model="open", **options):
    return client.chat.completions.create(**dict(model=model, messages=[{"role": "user", "content": content}],
                                                 max_tokens=24, seed=1) | options)


def test_passages_are_put_before_the_question_and_shown(client, served):
    answer = chat(client, "where does the lazy dog sleep?", extra_body={"return_token_ids": True})
    [passage] = answer.passages
    assert (passage["source"], passage["text"]) == ("fox.txt", "the lazy dog sleeps")
    prompt = tj.data.encode_prompt("the lazy dog sleeps\n\nwhere does the lazy dog sleep?", TOKENIZER)
    assert answer.choices[0].prompt_token_ids == prompt
    parts = list(chat(client, "where does the lazy dog sleep?", stream=True))
    assert parts[0].passages == answer.passages
    plain = chat(client, "where does the lazy dog sleep?", extra_body={"documents": False, "return_token_ids": True})
    assert plain.choices[0].prompt_token_ids == tj.data.encode_prompt("where does the lazy dog sleep?", TOKENIZER)
    assert not hasattr(plain, "passages")
    with pytest.raises(openai.BadRequestError, match="--documents"):
        chat(client, model="closed", extra_body={"documents": True})


def test_the_calculator_is_called_and_the_answer_goes_on_with_its_value(client, served):
    pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')
    [equals] = TOKENIZER.encode("=")  # made probable, so that the expression ends
    options = dict(tools=[TOOL], extra_body={"documents": False, "return_token_ids": True},
                   logit_bias={str(equals): 20})
    choice = chat(client, tool_choice="required", max_tokens=60, **options).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == ""
    [call] = choice.message.tool_calls
    expression = json.loads(call.function.arguments)["expression"]
    assert TOKENIZER.decode(choice.token_ids) == f"<<{expression}="
    parts = list(chat(client, tool_choice="required", max_tokens=60, stream=True, **options))
    [streamed] = [part.choices[0].delta.tool_calls[0] for part in parts if part.choices[0].delta.tool_calls]
    assert streamed.function.arguments == call.function.arguments
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    try:
        value = tj.tools.calculate(expression)
    except ValueError:
        value = "?"
    messages = [{"role": "user", "content": "2+2?"}, choice.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.id, "content": value}]
    following = chat(client, messages=messages, **options).choices[0]
    assert following.prompt_token_ids == [*tj.data.encode_prompt("2+2?", TOKENIZER),
                                          *TOKENIZER.encode(f"<<{expression}={value}>>")]


@pytest.mark.parametrize(("options", "message"), [
    (dict(tools=[{"type": "function", "function": {"name": "search"}}]), "one function named 'calculator'"),
    (dict(tools=[TOOL], tool_choice="always"), "tool_choice"),
    (dict(messages=[{"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "x", "content": "1"}]),
     "role 'tool'"),
])
def test_other_tools_are_refused(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **options)
