"""Inputs of a model: embeddings in place of tokens, and wrong inputs, which are refused with the
reason."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.models.functional import make_model
from transformer_jax.models.inputs import CausalInputs

SHAPE = dict(vocab_size=11, max_len=8, num_layers=1, num_heads=2, model_dim=8, init_std=0.4, tie_embeddings=False,
             scale_embeddings=True)
FAMILIES = {"decoder": ("embeddings_BTD",), "encoder": ("embeddings_BTD",),
            "encoder_decoder": ("source_embeddings_BSD", "target_embeddings_BTD")}
TOKENS = np.asarray([[1, 2, 3, 2], [4, 10, 4, 4]], np.int32)


@functools.cache
def make(family="decoder", **changes):
    return make_model(tj.ModelConfig(family=family, **SHAPE | changes), key=jax.random.key(0))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_tokens_give_what_the_tokens_give(family):
    model, names = make(family), FAMILIES[family]
    rows = {name: model.embeddings.token[...][TOKENS + place] for place, name in enumerate(names) if place == 0}
    rows |= {name: model.embeddings.token[...][TOKENS] for name in names[1:]}
    wanted = tj.forward(model, *[TOKENS] * len(names))
    np.testing.assert_array_equal(tj.forward(model, **rows), wanted)
    if family == "encoder_decoder":  # one side of the two
        source, target = (dict([pair]) for pair in rows.items())
        np.testing.assert_array_equal(tj.forward(model, None, TOKENS, **source), wanted)
        np.testing.assert_array_equal(tj.forward(model, TOKENS, **target), wanted)
        return
    trace = tj.trace(model, **rows, intervene=tj.inspection.patch("head_output", 0, 0.0, positions=-1))
    assert not np.any(trace["layers.0.head_output"][:, -1]) and np.any(trace["layers.0.head_output"][:, -2])
    moved = tj.forward(model, **rows, positions_BT=np.asarray([[1, 2, 3, 4]]))
    np.testing.assert_array_equal(moved, tj.forward(model, TOKENS, positions_BT=np.asarray([[1, 2, 3, 4]])))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_embeddings_are_the_parts_of_those_of_the_table(family):
    """By the chain rule: each row of the table has the sum of the gradients of its tokens."""
    model, names = make(family), FAMILIES[family]

    def total(logits):
        return (logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).sum()

    of_model = jax.grad(lambda model: total(tj.forward(model, *[TOKENS] * len(names))))(model)
    rows = {name: model.embeddings.token[...][TOKENS] for name in names}
    of_rows = jax.grad(lambda rows: total(tj.forward(model, **rows)))(rows)
    wanted = sum(np.zeros((11, 8), np.float32) + jnp.zeros((11, 8)).at[TOKENS].add(of_rows[name]) for name in names)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(of_model.embeddings.token[...], wanted, atol=1e-5)


X = jnp.ones((1, 2, 8))


@pytest.mark.parametrize(("family", "tokens", "options", "message"), [
    ("decoder", (TOKENS,), dict(embeddings_BTD=X), "pass either token ids or embeddings_BTD=.* both were given"),
    ("decoder", (), {}, "pass either token ids or embeddings_BTD=.* neither was given"),
    ("decoder", (), dict(embeddings_BTD=X[..., :7]), r"floats \[B, T, 8\] .*but they are float32 \(1, 2, 7\)"),
    ("encoder", (), dict(embeddings_BTD=X[0]), r"floats \[B, T, 8\] .*but they are float32 \(2, 8\)"),
    ("encoder", (), dict(embeddings_BTD=X.astype(int)), r"floats \[B, T, 8\] .*but they are int32 \(1, 2, 8\)"),
    ("encoder", (), dict(embeddings_BTD=jnp.ones((1, 9, 8))), "9 tokens are longer than the 8"),
    ("decoder", (), dict(embeddings_BTD=jnp.ones((0, 3, 8))), "there are no tokens"),
    ("encoder_decoder", (TOKENS,), {}, "target_embeddings_BTD=.* neither was given"),
    ("encoder_decoder", (None, TOKENS), {}, "source_embeddings_BSD=.* neither was given"),
    ("encoder_decoder", (TOKENS, TOKENS), dict(target_embeddings_BTD=X), "target_embeddings_BTD.* both were given"),
    ("encoder_decoder", (), dict(source_embeddings_BSD=X[..., 1:], target_embeddings_BTD=X), "source_embeddings_BSD"),
    *((family, tuple(TOKENS[:rows, :length] for _ in names), {}, "there are no tokens")
      for family, names in FAMILIES.items() for rows, length in ((0, 4), (2, 0))),
    ("decoder", ([],), {}, "the list of texts is empty"),
    ("decoder", (TOKENS,), dict(positions_BT=[[0, 1, 2, 8]]), "position 8 is outside .* of 8 .positions 0 to 7"),
    ("decoder", (TOKENS,), dict(positions_BT=[[0, 1, 2, -1]]), "position -1 is outside the table"),
    ("encoder", (TOKENS,), dict(positions_BT=[[0, 1, 2, 99]]), "position 99 is outside the table"),
    ("decoder", (TOKENS,), dict(positions_BT=[[0.0, 1.0, 2.0, 3.0]]), "positions must be integers"),
    ("decoder", (TOKENS,), dict(positions_BT=[0, 1, 2, 3]), r"positions must be integers \[B or 1, T\]"),
    ("typed", (TOKENS,), dict(token_types_BT=[[0, 1, 2, 0]]), "token type 2 is outside the table of 2 .types 0 to 1"),
    ("typed", (TOKENS,), dict(token_types_BT=[[0, 1, -1, 0]]), "token type -1 is outside"),
    ("encoder", (TOKENS,), dict(token_types_BT=[[0, 0, 0, 0]]), "config.num_token_types is 0"),
    ("decoder", (TOKENS + 1,), {}, "token id 11 is outside the vocabulary of 11 .ids 0 to 10"),
    ("encoder_decoder", (TOKENS, TOKENS - 3), {}, "token id -2 is outside the vocabulary"),
    ("encoder_decoder", (TOKENS + 1, TOKENS), {}, "token id 11 is outside the vocabulary"),
])
def test_wrong_tokens_are_refused_by_forward_and_by_the_model(family, tokens, options, message):
    model = make("encoder", num_token_types=2) if family == "typed" else make(family)
    for call in (tj.forward, tj.trace):
        with pytest.raises(ValueError, match=message):
            call(model, *tokens, **options)
    if not isinstance(tokens[0] if tokens else None, list):  # a model itself takes arrays only
        with pytest.raises(ValueError, match=message):
            model(*tokens, **{name: jnp.asarray(value) for name, value in options.items()})


def test_a_model_itself_refuses_a_list():
    with pytest.raises(ValueError, match=r"tokens are of type list; expected an integer array \[B, T\]"):
        make("decoder")([[1, 2]])


def test_positions_beyond_the_cache_of_a_learned_table_are_refused():
    def five_more(positions):
        model = make(positions=positions)
        cache = model.start_cache(1, 16).append_segments(jnp.ones((1, 4), int), jnp.arange(4)[None]).advance(4)
        CausalInputs.of(model.config, jnp.ones((1, 5), int), None, None, cache, None)

    with pytest.raises(ValueError, match="position 8 is outside the table"):
        five_more("learned")
    five_more("rope")  # which knows any position
    rotating = make(positions="rope")
    tj.forward(rotating, TOKENS, positions_BT=np.asarray([[0, 5, 100, 101]]))


def test_targets_outside_the_vocabulary_are_refused():
    logits, hidden = jnp.zeros((2, 11)), jnp.zeros((2, 8))
    for bad in (-100, 11):
        with pytest.raises(ValueError, match=f"target {bad} is outside the vocabulary of 11"):
            tj.ops.cross_entropy(logits, jnp.asarray([1, bad]))
        with pytest.raises(ValueError, match=f"target {bad} is outside the vocabulary of 11"):
            tj.ops.linear_cross_entropy(hidden, jnp.zeros((11, 8)), jnp.asarray([1, bad]))


def test_given_positions_change_a_position_bias():
    """They once had no effect on ``alibi`` and ``relative``."""
    for positions in ("alibi", "relative"):
        model, given = make(positions=positions, num_heads=1), np.asarray([[0, 2, 5, 6]])
        plain = make(positions="none", num_heads=1)
        plain.stack.blocks, plain.embeddings.token = model.stack.blocks, model.embeddings.token
        added = tj.trace(model, TOKENS, positions_BT=given).scores() - tj.trace(plain, TOKENS).scores()
        offsets = given[:, None, :] - given[:, :, None]
        wanted = -np.abs(offsets) / 256.0 if positions == "alibi" else np.asarray(model.stack.relative.table[...])[
            np.maximum(-offsets, 0), 0]
        visible = np.tri(4, dtype=bool)
        np.testing.assert_allclose(added[0, :, 0][:, visible], np.broadcast_to(wanted, (2, 4, 4))[:, visible],
                                   atol=1e-5)
