"""A custom sampling rule, as in the documentation, and interventions during decoding."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.inspection.interventions import ablate_head, patch, together

CONFIG = tj.ModelConfig(vocab_size=40, max_len=64, num_layers=2, num_heads=4, model_dim=32, init_std=0.4)
PROMPTS = [[7, 1, 33, 2, 18, 5, 5, 21, 9, 30], [4], [11, 39, 0, 12]]
GREEDY = tj.Sampling(temperature=0)
RECIPE = pathlib.Path(__file__).parents[2] / "docs" / "extending" / "sampling.md"


@pytest.fixture(scope="module")
def model() -> tj.Decoder:
    return tj.Decoder(CONFIG, key=jax.random.key(1))


@pytest.fixture(scope="module")
def recipe(model) -> dict:
    names = {"model": model, "__name__": "recipe"}
    for part in re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.S):
        exec(compile(part, str(RECIPE), "exec"), names)
    return names


def plain_loop(model, prompt, num_new, rule=lambda logits, context: logits, intervene=None):
    """Token by token with full uncached passes over the row alone."""
    forward = jax.jit(lambda model, tokens: model(tokens, intervene=intervene).logits[0])
    context = list(prompt)
    for _ in range(num_new):
        padded = np.zeros((1, CONFIG.max_len), np.int32)
        padded[0, :len(context)] = context
        logits = np.asarray(forward(model, padded))[len(context) - 1].astype(np.float64)
        context.append(int(rule(logits, context).argmax()))
    return context[len(prompt):]


def penalized(logits, context):
    logits = logits.copy()
    logits[sorted(set(context))] -= 2.0
    return logits


@pytest.mark.long
def test_the_rule_equals_a_plain_loop_in_a_batch_and_alone(model, recipe):
    rule = recipe["UsedTokenPenalty"](2.0)
    together_ = tj.generate(model, PROMPTS, processors=[rule], sampling=GREEDY, max_new_tokens=12).tokens
    assert together_ == [plain_loop(model, prompt, 12, penalized) for prompt in PROMPTS]
    assert together_ != tj.generate(model, PROMPTS, sampling=GREEDY, max_new_tokens=12).tokens
    for prompt, tokens in zip(PROMPTS, together_, strict=True):
        assert tj.generate(model, [prompt], processors=[rule], sampling=GREEDY, max_new_tokens=12).tokens == [tokens]
    assert recipe["result"].tokens == [plain_loop(model, [1, 2, 3], 8, penalized)]


def test_a_new_setting_compiles_nothing(model, recipe):
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiles.append(event) if "backend_compile" in event else None)
    for penalty in (1.0, 3.0):
        compiles.clear()
        tj.generate(model, PROMPTS, processors=[recipe["UsedTokenPenalty"](penalty)], sampling=GREEDY,
                    max_new_tokens=12)
    assert not compiles


def test_stream_applies_the_rule(recipe):
    tokenizer = tj.Tokenizer.train(["abcdefgh"], kind="char")
    model = tj.Decoder(CONFIG.replace(vocab_size=tokenizer.vocab_size), key=jax.random.key(2))
    options = dict(tokenizer=tokenizer, processors=[recipe["UsedTokenPenalty"](5.0)], sampling=GREEDY, max_new_tokens=9)
    assert "".join(tj.stream(model, "abc", **options)) == tj.generate(model, "abc", **options).texts[0]


def test_invalid_sampling_rules_raise(model, recipe):
    for wrong in (recipe["UsedTokenPenalty"], 3):
        with pytest.raises(ValueError, match="processors has"):
            tj.generate(model, PROMPTS, processors=[wrong], sampling=GREEDY, max_new_tokens=8)


def double(site, layer, value):
    return jnp.where(layer == 1, 2 * value, value) if site == "mlp_output" else value


@pytest.mark.parametrize("edit", [
    ablate_head(0, 2), patch("residual", 0, jnp.linspace(-1, 1, 32)), double,
    together(ablate_head(1, 1), ablate_head(0, 3))], ids=["head", "residual", "function", "several"])
@pytest.mark.long
def test_interventions_act_as_in_full_passes(model, edit):
    expected = [plain_loop(model, prompt, 8, intervene=edit) for prompt in PROMPTS]
    assert tj.generate(model, PROMPTS, sampling=GREEDY, max_new_tokens=8, intervene=edit).tokens == expected
    found = tj.beam_search(model, PROMPTS, beam_size=1, max_new_tokens=8, intervene=edit)
    assert found.tokens == expected


def test_an_edit_of_single_positions_is_refused(model):
    with pytest.raises(ValueError, match="act at all positions"):
        tj.generate(model, PROMPTS, sampling=GREEDY, max_new_tokens=8,
                    intervene=patch("residual", 0, jnp.zeros(32), positions=3))


def test_the_prepared_model_replaces_the_original(model):
    prepared = tj.prepare_for_decoding(model)
    assert tj.prepare_for_decoding(prepared) is prepared
    for decode in (lambda m: tj.generate(m, PROMPTS, sampling=GREEDY, max_new_tokens=8).tokens,
                   lambda m: tj.beam_search(m, PROMPTS, max_new_tokens=8).tokens):
        assert decode(prepared) == decode(model)


def test_a_pass_without_a_cache_refuses_the_prepared_model(model):
    prepared = tj.prepare_for_decoding(model)
    pair = tj.prepare_for_decoding(tj.EncoderDecoder(CONFIG.replace(family="encoder_decoder"), key=jax.random.key(0)))
    tokenizer = tj.Tokenizer.train(["abcdefgh"], kind="char")
    tokens = np.array([[1, 2]])
    for call in (lambda: tj.forward(prepared, tokens), lambda: tj.trace(prepared, tokens), lambda: prepared(tokens),
                 lambda: tj.score(prepared, "abc", tokenizer=tokenizer), lambda: tj.embed(prepared, tokens.tolist()),
                 lambda: jax.grad(lambda model: model(tokens).logits.sum())(prepared), lambda: pair(tokens, tokens)):
        with pytest.raises(ValueError, match=r"form for decoding .* needs the original model"):
            call()
