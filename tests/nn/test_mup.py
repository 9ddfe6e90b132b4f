"""muP: its initial values and rates against the table of Yang et al. (2022), and the coordinate check:
one update changes activations by an amount that does not depend on the width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import MupConfig, OptimConfig
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

BASE = tj.ModelConfig(vocab_size=11, max_len=8, num_layers=2, num_heads=2, model_dim=32, init_std=0.1)
WIDE = BASE.replace(model_dim=128, mup=MupConfig(base_dim=32, base_head_dim=16))
TOKENS = np.random.default_rng(0).integers(0, 11, (8, 9))
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def decoder(config):
    return tj.Decoder(config, key=jax.random.key(0))


def leaves(model):
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def test_a_model_of_the_base_width_is_the_ordinary_one():
    config = BASE.replace(mup=MupConfig(base_dim=32, base_layers=2))
    plain, same = leaves(decoder(BASE)), leaves(decoder(config))
    assert all(np.array_equal(plain[name], same[name]) for name in plain)
    parameters = jax.tree.leaves(decoder(config), is_leaf=lambda node: hasattr(node, "axes"))
    assert len(parameters) == len(plain) and not any(hasattr(parameter, "rate") for parameter in parameters)
    logits = [tj.forward(decoder(one), TOKENS[:, :-1]) for one in (BASE, config)]
    np.testing.assert_array_equal(*logits)


def test_initial_values_and_rates_follow_the_table():
    deep = WIDE.replace(num_layers=6, mup=MupConfig(base_dim=32, base_head_dim=16, base_layers=2))
    model = decoder(deep)
    width, depth = 4.0, 3.0
    optimizer = make_optimizer(OptimConfig(peak_lr=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0,
                                           clip_norm=None), 1)
    # The first update of Adam has the size of the learning rate, whatever the gradient.
    gradients = jax.tree.map(jnp.ones_like, model)
    updates = leaves(jax.jit(optimizer.update)(gradients, optimizer.init(model), model)[0])
    for name, values in leaves(model).items():
        writes = ".output." in name or ".down." in name
        expected = (1 / width if name.endswith("kernel") else 1.0) / (depth if writes else 1.0)
        np.testing.assert_allclose(-np.asarray(updates[name]), expected, rtol=1e-4, err_msg=name)
        if name.endswith("kernel"):
            std = 0.1 / width**0.5 * (1 / (2 * 2) ** 0.5 / depth if writes else 1.0)
            assert np.std(values) == pytest.approx(std, rel=0.03), name
        elif name.startswith("embeddings"):
            assert np.std(values) == pytest.approx(0.1, rel=0.1), name


def test_scores_have_the_inverse_head_dim_and_logits_the_inverse_width():
    wide, plain = decoder(WIDE), decoder(WIDE.replace(mup=None, attention_scale=16**0.5 / 64))
    np.testing.assert_allclose(wide.unembed(jnp.ones((1, 1, 128))), plain.unembed(jnp.ones((1, 1, 128))) / 4, rtol=1e-5)
    plain.stack.blocks = jax.tree.map(lambda own, other: other, plain.stack.blocks,
                                      jax.tree.unflatten(jax.tree.structure(plain.stack.blocks),
                                                         jax.tree.leaves(wide.stack.blocks)))
    maps = [tj.trace(model, TOKENS[:, :-1]).attention() for model in (wide, plain)]
    np.testing.assert_allclose(*maps, atol=1e-6)


@functools.cache
def changes(width, is_mup, steps=3):
    """How much a few updates change the root mean square of activations."""
    config = BASE.replace(model_dim=width, mup=MupConfig(base_dim=32, base_head_dim=16) if is_mup else None)
    optimizer = make_optimizer(OptimConfig(peak_lr=5e-3, schedule="constant", warmup_steps=0, weight_decay=0.0,
                                           clip_norm=None), steps)
    state, step = init_state(lambda key: tj.Decoder(config, key=key), optimizer, jax.random.key(0)), make_train_step(
        next_token_loss(), optimizer)

    @jax.jit
    def activations(model):
        output = model(BATCH["tokens"])
        last = output.trace
        return {"residual": last.residual[-1], "logits": output.logits}

    before = activations(state.params)
    for _ in range(steps):
        state, _ = step(state, BATCH)
    after = activations(state.params)
    return {name: float(np.sqrt(np.square(after[name] - before[name]).mean())) for name in before}


def slope(name, is_mup, widths=(32, 64, 128, 256)):
    """The exponent with which the change grows with the width."""
    return np.polyfit(np.log(widths), np.log([changes(width, is_mup)[name] for width in widths]), 1)[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["residual", "logits"])
def test_coordinate_check(name):
    assert abs(slope(name, True)) < 0.2
    assert slope(name, False) > 0.4


@pytest.mark.parametrize("changes, message", [
    (dict(family="encoder"), "mup is for family='decoder' without experts"),
    (dict(init_std=None), "mup needs norm_position='pre', a number as init_std"),
    (dict(attention_scale=1.0), "mup needs .* attention_scale=None"),
    (dict(scale_embeddings=True), "mup scales the logits itself"),
    (dict(mup=MupConfig(base_dim=32), norm_position="post"), "mup needs norm_position='pre'"),
])
def test_models_without_mup(changes, message):
    with pytest.raises(ValueError, match=message):
        WIDE.replace(**changes)


def test_it_is_for_adamw():
    with pytest.raises(ValueError, match="model.mup sets the learning rates of adamw, but optim.name='lion'"):
        tj.ExperimentConfig(model=WIDE, optim=OptimConfig(name="lion"))
    with pytest.raises(ValueError, match="mup.base_dim=0 must be a positive integer"):
        MupConfig(base_dim=0)
