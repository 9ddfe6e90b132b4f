"""Forward mode, and Hessians by both modes, of the functions that have a gradient of their own:
those of plain operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax import derivatives
from transformer_jax.models.functional import make_model
from transformer_jax.ops import linear as products
from transformer_jax.ops.masks import AttentionMask

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X, KERNEL, TABLE, BIAS, TARGETS = normal(5, 8), normal(8, 6), normal(12, 8), normal(12), jnp.asarray([0, 3, 11, 5, 7])
Q, K, V, SLOPES = normal(2, 6, 4, 4), normal(2, 6, 2, 4), normal(2, 6, 2, 4), jnp.abs(normal(4))
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])


def attention(implementation):
    def attend(q, k, v, slopes):
        mask = AttentionMask.causal() & AttentionMask.segments(SEGMENTS)
        return tj.ops.attend(q, k, v, mask, bias=tj.ops.LinearBias(slopes), implementation=implementation)

    return attend


def plain_attention(q, k, v, slopes):
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    offsets = jnp.arange(6)[None, :] - jnp.arange(6)[:, None]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / 2 - slopes[:, None, None] * jnp.abs(offsets)
    allowed = (offsets <= 0) & (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None]) & (SEGMENTS[:, None, None] != 0)
    weights = jnp.where(allowed, jnp.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("BNTS,BSNH->BTNH", weights / jnp.where(total == 0.0, 1.0, total), v)


def losses(hidden, table, bias):
    return tj.ops.linear_cross_entropy(hidden, table, TARGETS, 0.1, 1e-2, 5, bias)


def plain_losses(hidden, table, bias):
    logits = hidden @ table.T + bias
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    return log_z - 0.9 * logits[jnp.arange(5), TARGETS] - 0.1 * logits.mean(-1) + 1e-2 * log_z**2


CASES = {
    "linear": (products.linear, lambda x, kernel: x @ kernel, (X, KERNEL)),
    "logits": (products.float32_logits, lambda x, table: x @ table.T, (X, TABLE)),
    "gelu": (products.gelu, functools.partial(jax.nn.gelu, approximate=False), (X,)),
    "cross entropy": (losses, plain_losses, (X, TABLE, BIAS)),
    "xla": (attention("xla"), plain_attention, (Q, K, V, SLOPES)),
    "chunked": (attention("chunked"), plain_attention, (Q, K, V, SLOPES)),
}


def all_derivatives(function, args, along, is_twice=True):
    """By forward mode, by reverse mode, and Hessian-vector products by forward over reverse, by
    reverse over forward and by reverse over reverse; and by vmap of each mode."""
    def loss(*args):
        return jnp.sin(function(*args)).sum()

    gradient = jax.grad(loss, argnums=tuple(range(len(args))))

    def slope(*args):
        return jax.jvp(loss, args, along)[1]

    def slope_again(*args):
        return sum((a * b).sum() for a, b in zip(gradient(*args), along, strict=True))

    def of_row(first):
        return function(first, *args[1:])

    rows = jnp.stack([args[0], 2 * args[0]])
    twice = {"reverse over forward": slope, "reverse over reverse": slope_again} if is_twice else {}
    return {"value": function(*args), "jvp": jax.jvp(function, args, along)[1], "gradient": gradient(*args),
            "forward over reverse": jax.jvp(gradient, args, along)[1],
            **{kind: jax.grad(f, argnums=tuple(range(len(args))))(*args) for kind, f in twice.items()},
            "gradient of vmap": jax.grad(lambda rows: jnp.sin(jax.vmap(of_row)(rows)).sum())(rows),
            "vmap of gradient": jax.vmap(jax.grad(lambda first: jnp.sin(of_row(first)).sum()))(rows),
            "jvp of vmap": jax.jvp(jax.vmap(of_row), (rows,), (jnp.cos(rows),))[1]}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_plain_operations(name):
    function, plain, args = CASES[name]
    along = tuple(jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in args)
    found, wanted = (jax.jit(functools.partial(all_derivatives, f, is_twice=name != "chunked"))(args, along)
                     for f in (function, plain))
    for kind in wanted:
        jax.tree.map(lambda a, b, kind=kind: np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-4, err_msg=kind), found[kind], wanted[kind])


def test_a_second_gradient_of_blocks_is_refused_with_what_to_set():
    """Reverse mode does not support loops with an unknown number of iterations; a mask that is not
    causal has a known number."""
    def slope(q):
        return jax.jvp(lambda q: jnp.sin(attention("chunked")(q, K, V, SLOPES)).sum(), (q,), (jnp.cos(q),))[1]

    with pytest.raises(ValueError, match="jax.jvp of jax.grad, or set attention_implementation='xla'"):
        jax.grad(slope)(Q)


def test_the_gradient_is_the_one_that_is_given():
    """Only the reverse mode uses the custom gradient; forward mode and second derivatives use the
    function itself."""
    def double(x):
        return derivatives.with_gradient(jnp.sin, lambda args, kept, ct: (kept * ct,), x,
                                         forward=lambda x: (jnp.sin(x), jnp.full_like(x, 7.0)))

    assert jax.grad(double)(1.0) == 7.0 and jax.jit(jax.grad(double))(1.0) == 7.0
    np.testing.assert_allclose(jax.jvp(double, (1.0,), (1.0,))[1], np.cos(1.0), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.grad(double))(1.0), -np.sin(1.0), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: jax.vmap(double)(x).sum())(jnp.ones(3)), 7.0)


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_hessian_vector_products_of_models_agree_both_ways(family):
    config = tj.ModelConfig(family=family, vocab_size=7, max_len=6, num_layers=2, num_heads=2, model_dim=8,
                            activation="gelu" if family == "encoder" else "swiglu", init_std=0.2,
                            positions="relative" if family == "encoder_decoder" else "learned")
    model = make_model(config, key=jax.random.key(0))
    tokens = jnp.asarray([[1, 2, 3, 4, 5]])
    along = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), model)

    def loss(model):
        if family == "encoder":  # the logits of all tokens; the others by their losses
            return tj.ops.cross_entropy(model(tokens).logits, tokens).mean()
        if family == "decoder":
            return tj.training.next_token_loss()(model, {"tokens": tokens, "targets": tokens})[0]
        return tj.training.objectives.translation_loss()(model, {
            "source": tokens, "source_segment_ids": jnp.ones_like(tokens), "tokens": tokens, "targets": tokens,
            "segment_ids": jnp.ones_like(tokens), "weights": jnp.ones(tokens.shape)})[0]

    def dot(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    @jax.jit
    def both(model):
        gradient, bent = jax.jvp(jax.grad(loss), (model,), (along,))
        slope, again = jax.value_and_grad(lambda model: jax.jvp(loss, (model,), (along,))[1])(model)
        return gradient, slope, bent, again

    gradient, slope, bent, again = both(model)
    np.testing.assert_allclose(slope, dot(gradient, along), rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(bent))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), bent, again)
    step = 2e-4
    ahead, behind = (both(jax.tree.map(lambda x, d, sign=sign: x + sign * step * d, model, along))[1]
                     for sign in (1, -1))
    np.testing.assert_allclose(dot(bent, along), (ahead - behind) / (2 * step), rtol=2e-2)
