"""A mixture of experts against a loop in NumPy float64: outputs, gradients, the choice, and the
losses of the router."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExpertConfig
from transformer_jax.nn.experts import Experts
from transformer_jax.ops.grouped import grouped_matmul
from transformer_jax.ops.routing import balance_loss, expert_loads, router_z_loss

D, F, E = 8, 12, 8
MODEL = tj.ModelConfig(vocab_size=9, max_len=64, num_layers=1, num_heads=2, model_dim=D, mlp_dim=F, use_bias=False,
                       activation="swiglu", init_std=0.5)
MIXTURES = {
    "softmax of all": ExpertConfig(E, 3, normalize_weights=False),
    "softmax of the chosen": ExpertConfig(E, 2, mlp_dim=10, shared_experts=2),
    "sigmoid": ExpertConfig(E, 2, scores="sigmoid", use_choice_bias=True, groups=4, groups_per_token=2,
                            weight_scale=2.5),
}


def silu(x):
    return x / (1 + np.exp(-x))


def mixture(weights, x, moe):
    """The mixture, token by token and expert by expert, in float64; ``x`` is ``[M, D]``."""
    out = np.zeros_like(x)
    for row, token in enumerate(x):
        logits = token @ weights["router"]
        if moe.scores == "softmax":
            scores = np.exp(logits) / np.exp(logits).sum()
            chosen = sorted(range(E), key=lambda e, scores=scores: -scores[e])[:moe.experts_per_token]
        else:
            scores = 1 / (1 + np.exp(-logits))
            choice = scores + weights["choice_bias"]
            size = E // moe.groups
            groups = sorted(range(moe.groups), key=lambda g, choice=choice: -sum(
                sorted(choice[g * size:(g + 1) * size])[-2:]))[:moe.groups_per_token]
            chosen = sorted((e for e in range(E) if e // size in groups),
                            key=lambda e, choice=choice: -choice[e])[:moe.experts_per_token]
        total = sum(scores[e] for e in chosen) if moe.normalize_weights else 1.0
        for e in chosen:
            hidden = silu(token @ weights["gate"][e]) * (token @ weights["up"][e])
            out[row] += moe.weight_scale * scores[e] / total * (hidden @ weights["down"][e])
        if moe.shared_experts:
            hidden = silu(token @ weights["shared_gate"]) * (token @ weights["shared_up"])
            out[row] += hidden @ weights["shared_down"]
    return out


def numpy_weights(experts):
    found = {"router": experts.router.kernel, "up": experts.up, "gate": experts.gate, "down": experts.down}
    if experts.shared is not None:
        found |= {f"shared_{name}": getattr(experts.shared, name).kernel for name in ("up", "gate", "down")}
    if experts.choice_bias is not None:
        found["choice_bias"] = experts.choice_bias
    return {name: np.asarray(value[...], np.float64) for name, value in found.items()}


@functools.cache
def made(name):
    moe = MIXTURES[name]
    experts = Experts(MODEL.replace(moe=moe), moe, key=jax.random.key(0, impl="unsafe_rbg"), output_scale=1.0)
    if experts.choice_bias is not None:
        experts.choice_bias[...] = jnp.linspace(-0.4, 0.4, E)[::-1]
    return experts, moe


# Five tokens are few rows, which are multiplied with copies of the matrices; 150 need several
# blocks for an expert.
@pytest.mark.long
@pytest.mark.parametrize("tokens", [5, 150])
@pytest.mark.parametrize("name", MIXTURES)
def test_outputs_and_gradients_are_those_of_a_loop(name, tokens):
    experts, moe = made(name)
    rng = np.random.default_rng(tokens)
    x, direction = rng.normal(size=(2, tokens, D))
    cotangent = rng.normal(size=(tokens, D))

    def loss(experts, x):
        y = experts(x[None])[0]
        return (y * cotangent).sum(), y

    (_, y), (grads, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(experts, jnp.float32(x))
    weights = numpy_weights(experts)
    wanted = mixture(weights, x, moe)
    np.testing.assert_allclose(y, wanted, atol=2e-5 * np.abs(wanted).max())

    def slope(change):
        """The derivative along a change of the weights and tokens, by central differences."""
        ends = [(mixture({key: value + step * change.get(key, 0) for key, value in weights.items()},
                         x + step * change.get("x", 0), moe) * cotangent).sum() for step in (1e-6, -1e-6)]
        return (ends[0] - ends[1]) / 2e-6

    found = numpy_weights(grads) | {"x": np.asarray(grad_x, np.float64)}
    assert not found.pop("choice_bias", np.zeros(1)).any()
    for key, gradient in found.items():
        along = direction if key == "x" else rng.normal(size=gradient.shape)
        assert (gradient * along).sum() == pytest.approx(slope({key: along}), rel=2e-4, abs=1e-3), key


@pytest.mark.parametrize("sizes", [[0, 70, 0, 1, 129], [200, 0, 0, 0, 0], [30, 30, 30, 30, 30]])
def test_products_of_groups(sizes):
    """Groups that are empty, of one row, and of several blocks; rows after the last group belong to
    none."""
    rng = np.random.default_rng(0)
    rows, kernels = rng.normal(size=(200, 6)), rng.normal(size=(5, 6, 7))
    cotangent = rng.normal(size=(200, 7)) * (np.arange(200) < sum(sizes))[:, None]
    product, transpose = jax.vjp(lambda rows, kernels: grouped_matmul(rows, kernels, jnp.array(sizes)),
                                 jnp.float32(rows), jnp.float32(kernels))
    of_rows, of_kernels = transpose(jnp.float32(cotangent))
    starts = np.cumsum([0, *sizes])
    for group, (first, last) in enumerate(itertools.pairwise(starts)):
        np.testing.assert_allclose(product[first:last], rows[first:last] @ kernels[group], atol=1e-5)
        np.testing.assert_allclose(of_rows[first:last], cotangent[first:last] @ kernels[group].T, atol=1e-5)
        np.testing.assert_allclose(of_kernels[group], rows[first:last].T @ cotangent[first:last], atol=1e-4)


@jax.jit
def derivatives(experts, x, dx):
    """Outputs, their change along ``dx``, and the gradient of the sum of their squares: under vmap;
    and the change of the gradient, by reverse mode twice and by differences."""
    run = jax.vmap(experts)
    y, dy = jax.jvp(run, (x,), (dx,))
    gradient = jax.grad(lambda x: (run(x) ** 2).sum())
    change = jax.grad(lambda x: (gradient(x) * dx).sum())(x)
    ends = [gradient(x + step * dx) for step in (1e-3, -1e-3)]
    return y, dy, gradient(x), change, (ends[0] - ends[1]) / 2e-3


@pytest.mark.long
def test_forward_mode_and_vmap_and_the_derivative_of_a_gradient():
    experts, _ = made("softmax of the chosen")
    x, dx = jax.random.normal(jax.random.key(1), (2, 2, 1, 12, D))
    y, dy, gradient, change, difference = derivatives(experts, x, dx)
    np.testing.assert_allclose(y[1, 0], mixture(numpy_weights(experts), np.asarray(x[1, 0], np.float64),
                                                MIXTURES["softmax of the chosen"]), atol=1e-5)
    np.testing.assert_allclose((2 * y * dy).sum(), (gradient * dx).sum(), rtol=1e-4)
    np.testing.assert_allclose(change, difference, atol=0.02 * jnp.abs(change).max())


def test_no_token_is_dropped_when_all_choose_one_expert():
    experts, _ = made("softmax of all")
    x = jax.random.normal(jax.random.key(2), (2, 100, D))
    routing = experts.route(x, tj.nn.sites.Sites(None, 0))
    same = dataclasses.replace(routing, experts=jnp.full_like(routing.experts, 5))
    weights = numpy_weights(experts)
    rows = np.asarray(x, np.float64)
    hidden = silu(rows @ weights["gate"][5]) * (rows @ weights["up"][5])
    wanted = (hidden @ weights["down"][5]) * np.asarray(same.weights.sum(-1, keepdims=True))
    np.testing.assert_allclose(experts.merge(x, same), wanted, atol=1e-4)


def test_losses_of_the_router_are_their_formulas_and_padding_does_not_count():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 6, E))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts = np.argsort(-probabilities)[..., :2]
    valid = np.arange(6) >= np.array([[0], [4]])
    kept = [(p, e, z) for p, e, z, ok in zip(probabilities.reshape(-1, E), experts.reshape(-1, 2),
                                             logits.reshape(-1, E), valid.reshape(-1), strict=True) if ok]
    loads = np.array([sum(e in chosen for _, chosen, _ in kept) for e in range(E)]) / len(kept)
    mean = np.mean([p for p, _, _ in kept], axis=0)
    arguments = (jnp.float32(probabilities), jnp.asarray(experts), jnp.asarray(valid))
    np.testing.assert_allclose(expert_loads(arguments[1], E, arguments[2]), loads, rtol=1e-6)
    assert float(balance_loss(*arguments)) == pytest.approx(E * (loads * mean).sum(), rel=1e-6)
    squares = np.mean([np.log(np.exp(z).sum()) ** 2 for _, _, z in kept])
    assert float(router_z_loss(jnp.float32(logits), arguments[2])) == pytest.approx(squares, rel=1e-6)
    everywhere = jnp.full((4, E), 1 / E), jnp.arange(E).reshape(4, 2)
    assert float(balance_loss(*everywhere)) == pytest.approx(2)  # experts per token, when the load is equal


@pytest.mark.parametrize(("settings", "words"), [
    (dict(num_experts=4, experts_per_token=5), "moe.experts_per_token=5 is more than the 4 experts"),
    (dict(num_experts=8, experts_per_token=5, groups=4, groups_per_token=2), "more than the 4 experts that a token"),
    (dict(num_experts=8, groups=3), "moe.groups=3 must divide moe.num_experts=8"),
    (dict(num_experts=8, groups=8), "leaves 1 experts in each group, but moe.experts_per_group_score=2"),
    (dict(scores="tanh"), "scores='tanh' is not one of softmax, sigmoid"),
    (dict(num_experts=0), "moe.num_experts=0 must be a positive integer"),
])
def test_a_mixture_that_cannot_be_made_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ExpertConfig(**settings)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(family="encoder"), "moe is for family='decoder' and 'reward', not 'encoder'"),
])
def test_a_model_that_cannot_have_experts_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        MODEL.replace(moe=ExpertConfig(), **changes)
