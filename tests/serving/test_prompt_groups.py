"""Short prompts are read together, and each gets the tokens that it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import TOKENIZER, make_decoder

import transformer_jax as tj
from transformer_jax.serving import Engine, TextRequest, waiting
from transformer_jax.serving.prompts import read_group

OPTIONS = dict(tokenizer=TOKENIZER, max_new_tokens=6, end_ids=())


@pytest.fixture(scope="module")
def model():
    return make_decoder(positions="alibi", max_len=160)


@pytest.fixture
def lengths(monkeypatch):
    """The length of each group that is read."""
    lengths = []

    def counted(model, tokens_RT, segment_ids_RT):
        lengths.append(tokens_RT.shape[1])
        return read_group(model, tokens_RT, segment_ids_RT)

    monkeypatch.setattr(waiting, "read_group", counted)
    return lengths


def answers(model, prompts):
    """Asks for all prompts before the engine reads the first."""
    engine = Engine(model, tokenizer=TOKENIZER, max_batch=8)
    with engine._changed:
        replies = [engine.submit(TextRequest(prompt, 6, key=jax.random.key(index), end_ids=()))
                   for index, prompt in enumerate(prompts)]
    tokens = [reply.result(600).tokens for reply in replies]
    engine.close()
    return tokens, [reply.num_reused for reply in replies]


def alone(model, prompts):
    return [tj.generate(model, [prompt], key=jnp.stack([jax.random.key(index)]), **OPTIONS).tokens[0]
            for index, prompt in enumerate(prompts)]


@pytest.mark.long
def test_prompts_of_different_lengths_are_read_together(model, lengths):
    draw = np.random.default_rng(0)
    prompts = [draw.integers(5, 40, size).tolist() for size in (9, 1, 13, 17, 5, 2)]
    tokens, reused = answers(model, prompts)
    assert tokens == alone(model, prompts) and lengths == [16] and not any(reused)


@pytest.mark.long
def test_few_long_and_equal_prompts_are_read_alone(model, lengths):
    draw = np.random.default_rng(1)
    long, short = draw.integers(5, 40, 140).tolist(), draw.integers(5, 40, 12).tolist()
    tokens, reused = answers(model, [long, short, long, [*short, 7, 8, 9, 10, 11], [9]])
    assert tokens == alone(model, [long, short, long, [*short, 7, 8, 9, 10, 11], [9]]) and not lengths
    assert reused[2] >= 128
