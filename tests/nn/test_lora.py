"""Adapters: their gradients compared with a float64 formula, their cost, merging, and training in
every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import transformer_jax as tj
from transformer_jax.config import LoraConfig, MeshConfig, OptimConfig
from transformer_jax.models.functional import make_model
from transformer_jax.models.heads import RewardModel
from transformer_jax.nn.layers import Linear
from transformer_jax.nn.lora import Adapter, adapt, adapted_loss, make_adapters, merge_adapters
from transformer_jax.ops.dropout import drop
from transformer_jax.sharding import batch_sharding, make_mesh, shardings
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.objectives import masked_token_loss, next_token_loss, translation_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state, init_state
from transformer_jax.training.step import make_train_step

SHAPE = dict(vocab_size=16, max_len=8, num_layers=2, num_heads=2, model_dim=8, init_std=0.2)
CONFIGS = {family: tj.ModelConfig(family=family, **SHAPE) for family in ("decoder", "encoder", "encoder_decoder")}
LOSSES = {"decoder": next_token_loss(), "encoder": masked_token_loss(), "encoder_decoder": translation_loss()}
LORA = LoraConfig(rank=2, alpha=3.0)


def model_of(family="decoder", **changes):
    return make_model(CONFIGS[family].replace(**changes), key=jax.random.key(0))


def trained(adapters, size=0.1):
    """Adapters as after training: no matrix is zero."""
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(structure, [leaf + size * jax.random.normal(key, leaf.shape)
                                          for leaf, key in zip(leaves, keys, strict=True)])


def batch_of(family="decoder", rows=2):
    rng = np.random.default_rng(0)
    tokens, targets, source = rng.integers(16, size=(3, rows, 8)).astype(np.int32)
    batch = {"tokens": tokens, "targets": targets}
    if family == "encoder":
        return {"tokens": tokens, "masked_positions": np.array([[1, 4]] * rows), "masked_targets": targets[:, :2],
                "masked_weights": np.ones((rows, 2), np.float32)}
    return batch | {"source": source} if family == "encoder_decoder" else batch


def kernel_at(tree, path):
    return functools.reduce(getattr, [*path.split("."), "kernel"], tree)[...]


def test_a_linear_map_with_an_adapter_beside_a_float64_formula():
    linear = Linear(6, 5, ("embed", "mlp"), CONFIGS["decoder"], key=jax.random.key(1))
    adapter = trained(make_adapters(linear, LoraConfig(rank=2, alpha=3.0, weights=""), key=jax.random.key(2)))[""]
    x, g = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((3, (2, 4, 6)), (4, (2, 4, 5))))

    def weighted_sum(adapter, x):
        return (adapt(linear, {"": adapter})(x) * g).sum()

    gradient, x_gradient = jax.grad(weighted_sum, argnums=(0, 1))(adapter, x)
    W, bias, A, B, X, G = (np.asarray(array, np.float64)
                           for array in (linear.kernel[...], linear.bias[...], adapter.a[...], adapter.b[...], x, g))
    scale = 3.0 / 2
    X, G = X.reshape(8, 6), G.reshape(8, 5)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    close(adapt(linear, {"": adapter})(x).reshape(8, 5), X @ (W + scale * A @ B) + bias)
    close(gradient.a[...], scale * X.T @ G @ B.T)
    close(gradient.b[...], scale * (X @ A).T @ G)
    close(x_gradient.reshape(8, 6), G @ (W + scale * A @ B).T)


@pytest.mark.long
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_in_stacked_layers_are_those_of_the_explicit_sum(family):
    # d loss / d A = scale * dW B^T and d loss / d B = scale * A^T dW, where dW is the gradient of
    # the merged kernel.
    base, loss_fn, batch = model_of(family), LOSSES[family], batch_of(family)
    adapters = trained(make_adapters(base, LORA, key=jax.random.key(1)))
    gradient = jax.jit(jax.grad(lambda adapters: adapted_loss(loss_fn, base)(adapters, batch)[0]))(adapters)
    merged_gradient = jax.jit(jax.grad(lambda model: loss_fn(model, batch)[0]))(merge_adapters(base, adapters))
    assert set(adapters) == {path for path in adapters if "attention" in path or "mlp" in path}
    assert len(adapters) == {"decoder": 6, "encoder": 6, "encoder_decoder": 16}[family]
    for path, adapter in adapters.items():
        A, B, dW = (np.asarray(array, np.float64)
                    for array in (adapter.a[...], adapter.b[...], kernel_at(merged_gradient, path)))
        assert A.shape[0] == B.shape[0] == 2  # layers
        for computed, formula in ((gradient[path].a[...], 1.5 * dW @ B.swapaxes(1, 2)),
                                  (gradient[path].b[...], 1.5 * A.swapaxes(1, 2) @ dW)):
            assert np.abs(formula).max() > 1e-3
            np.testing.assert_allclose(computed, formula, rtol=1e-4, atol=1e-5 * np.abs(formula).max())


@pytest.mark.parametrize("family", CONFIGS)
def test_new_adapters_change_nothing_and_merged_ones_are_the_adapted_model(family):
    base, batch = model_of(family), batch_of(family)
    inputs = (batch["source"], batch["tokens"]) if family == "encoder_decoder" else (batch["tokens"],)
    new = make_adapters(base, LORA, key=jax.random.key(1))
    np.testing.assert_array_equal(tj.forward(adapt(base, new), *inputs), tj.forward(base, *inputs))
    adapters = trained(new)
    logits = tj.forward(merge_adapters(base, adapters), *inputs)
    np.testing.assert_allclose(logits, tj.forward(adapt(base, adapters), *inputs), rtol=1e-4, atol=1e-4)
    assert np.abs(logits - tj.forward(base, *inputs)).max() > 0.1


@pytest.mark.long
def test_an_embedding_table_is_adapted_where_it_is_read_and_where_it_makes_logits():
    base = model_of(tie_embeddings=True)
    adapters = trained(make_adapters(base, LoraConfig(rank=2, alpha=3.0, weights="token"), key=jax.random.key(1)))
    assert list(adapters) == ["embeddings.token"]
    adapter, table = adapters["embeddings.token"], base.embeddings.token[...]
    np.testing.assert_allclose(np.std(make_adapters(base, LoraConfig(rank=64, weights="token"), key=jax.random.key(1))[
        "embeddings.token"].a[...]), 1.0, rtol=0.1)
    A, B = (np.asarray(factor[...], np.float64) for factor in (adapter.a, adapter.b))
    merged = merge_adapters(base, adapters)
    np.testing.assert_allclose(merged.embeddings.token[...], table + 1.5 * A @ B, rtol=1e-5, atol=1e-6)
    tokens = batch_of()["tokens"]
    adapted = tj.forward(adapt(base, adapters), tokens)
    np.testing.assert_allclose(tj.forward(merged, tokens), adapted, rtol=1e-5, atol=1e-5)
    loss = adapted_loss(next_token_loss(), base)
    gradient = jax.grad(lambda adapters: loss(adapters, batch_of())[0])(adapters)["embeddings.token"]
    dW = jax.grad(lambda model: next_token_loss()(model, batch_of())[0])(merged).embeddings.token[...]
    np.testing.assert_allclose(gradient.a[...], 1.5 * np.asarray(dW, np.float64) @ B.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient.b[...], 1.5 * A.T @ np.asarray(dW, np.float64), rtol=1e-4, atol=1e-5)


def test_merging_is_exact_and_unmerging_gives_the_bits_of_the_base():
    base = model_of()
    before = tree_digest(base)
    adapters = trained(make_adapters(base, LoraConfig(rank=2, weights="query"), key=jax.random.key(1)))
    merged = jax.jit(merge_adapters)(base, adapters)
    query, adapter = "stack.blocks.attention.query", adapters["stack.blocks.attention.query"]
    explicit = kernel_at(base, query) + 8.0 * np.asarray(adapter.a[...], np.float64) @ np.asarray(adapter.b[...])
    np.testing.assert_allclose(kernel_at(merged, query), explicit, rtol=1e-6, atol=1e-6)
    # Merging makes a new model and does not change the base model, so the base is the model without
    # adapters. The weights without an adapter are the same arrays.
    assert tree_digest(base) == before
    assert jax.tree.structure(base) == jax.tree.structure(merged)
    differing = [jax.tree_util.keystr(path) for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(merged), strict=True) if not (a == b).all()]
    assert differing == [".stack.blocks.attention.query.kernel.value"]
    apart = merge_adapters(base, adapters)
    assert apart.embeddings.token[...] is base.embeddings.token[...]
    np.testing.assert_array_equal(kernel_at(apart, "stack.blocks.mlp.up"), kernel_at(base, "stack.blocks.mlp.up"))


@pytest.mark.long
def test_generation_from_a_merged_model_is_that_of_the_adapted_forward_pass():
    base = model_of()
    adapters = trained(make_adapters(base, LORA, key=jax.random.key(1)))
    tokens, greedy = [1, 2, 3], dict(max_new_tokens=4, sampling=tj.Sampling(temperature=0.0))
    generated = tj.generate(merge_adapters(base, adapters), [tokens], **greedy)
    for _ in range(4):
        tokens.append(int(tj.forward(adapt(base, adapters), jnp.array([tokens]))[0, -1].argmax()))
    assert generated.tokens[0] == tokens[3:]
    assert generated.tokens != tj.generate(base, [[1, 2, 3]], **greedy).tokens
    with pytest.raises(ValueError, match=r"not merged; decode with merge_adapters\(base, adapters\)"):
        tj.generate(adapt(base, adapters), [[1]], **greedy)


@pytest.mark.long
def test_dropout_is_of_each_tokens_inputs():
    base = model_of(num_layers=3)
    adapters = trained(make_adapters(base, LoraConfig(rank=2, dropout=0.5), key=jax.random.key(1)))
    adapter = adapters["stack.blocks.mlp.up"]
    one = jax.tree.map(lambda x: x[0], adapter)
    x = jax.random.normal(jax.random.key(2), (2, 4, 8))
    expected = 8.0 * drop(x.reshape(8, 8), 0.5, jax.random.key(3)) @ one.a[...] @ one.b[...]
    np.testing.assert_allclose(one(x, jax.random.key(3)).reshape(8, 8 * 4), expected, rtol=1e-5, atol=1e-6)
    keys = adapt(base, adapters, jax.random.key(4)).stack.blocks.mlp.up.key
    others = adapt(base, adapters, jax.random.key(4)).stack.blocks.mlp.down.key
    data = jax.random.key_data(jnp.concatenate([keys, others])).tolist()
    assert len(set(map(tuple, data))) == 6  # another for each layer and each kernel
    tokens = batch_of()["tokens"]
    dropped, again = (tj.forward(adapt(base, adapters, jax.random.key(4)), tokens) for _ in range(2))
    np.testing.assert_array_equal(dropped, again)
    assert np.abs(dropped - tj.forward(adapt(base, adapters), tokens)).max() > 0.01
    loss = adapted_loss(next_token_loss(), base)
    keys = (None, jax.random.key(1), jax.random.key(2))
    assert len({float(loss(adapters, batch_of(), key)[0]) for key in keys}) == 3


def test_optimizer_state_on_the_shape_of_gpt2_is_below_2_percent():
    config, optimizer = tj.presets.get("gpt2-small"), make_optimizer(OptimConfig(), 10)

    def num_bytes(make_params):
        return sum(leaf.size * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(abstract_state(make_params, optimizer).opt_state))

    full = num_bytes(lambda key: tj.Decoder(config, key=key))
    assert full == pytest.approx(2 * 4 * 124_439_808, rel=1e-6)
    for weights, num_adapted in (("attention.(query|value)", 12 * 2 * 8 * 1536), ("attention|mlp", 12 * 8 * 13_824),
                                 ("attention|mlp|token", 12 * 8 * 13_824 + 8 * (50_257 + 768))):
        base = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))
        lora = LoraConfig(rank=8, weights=weights)
        adapters = num_bytes(lambda key, base=base, lora=lora: make_adapters(base, lora, key=key))
        assert adapters == pytest.approx(2 * 4 * num_adapted, rel=1e-4)
        assert adapters < 0.02 * full


@pytest.mark.long
def test_a_training_step_holds_adapters_only_and_takes_the_base_as_an_argument():
    base, batch = model_of(), batch_of(rows=4)
    before, optimizer = tree_digest(base), optax.adam(0.01)
    loss_fn = adapted_loss(next_token_loss(), base)
    state = init_state(lambda key: make_adapters(base, LORA, key=key), optimizer, jax.random.key(0))
    num_state = len(jax.tree.leaves(state))
    assert jax.tree.structure(state.params) == jax.tree.structure(state.opt_state[0].mu)
    step = make_train_step(loss_fn, optimizer)
    arguments = jax.tree.leaves(step.lower(state, batch).args_info)
    assert len(arguments) == num_state + len(batch) + len(jax.tree.leaves(base))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert tree_digest(base) == before
    accumulated = make_train_step(loss_fn, optimizer, accumulation=2)
    twin = jax.tree.map(jnp.copy, state)
    np.testing.assert_allclose(accumulated(twin, batch)[1]["loss"], step(state, batch)[1]["loss"], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("changes", [dict(remat="full"), dict(remat="dots"), dict(unroll=2), dict(positions="rope")])
def test_gradients_do_not_depend_on_how_the_layers_are_run(changes):
    def gradient(model):
        adapters = trained(make_adapters(model, LORA, key=jax.random.key(1)))
        loss = lambda adapters: adapted_loss(next_token_loss(), model)(adapters, batch_of())[0]
        return jax.jit(jax.grad(loss))(adapters)

    reference = gradient(model_of(**(changes if "positions" in changes else {})))
    for a, b in zip(jax.tree.leaves(gradient(model_of(**changes))), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_trained_whole_beside_the_adapters():
    base = RewardModel(CONFIGS["decoder"].replace(family="reward"), key=jax.random.key(0))
    lora = LoraConfig(rank=2, weights="attention", whole="head|final_norm")
    adapters = make_adapters(base, lora, key=jax.random.key(1))
    whole = {path for path, node in adapters.items() if not isinstance(node, Adapter)}
    assert whole == {"head.kernel", "head.bias", "trunk.final_norm.scale", "trunk.final_norm.bias"}
    changed = trained(adapters)
    merged = merge_adapters(base, changed)
    np.testing.assert_array_equal(merged.head.kernel[...], changed["head.kernel"][...])
    tokens = batch_of()["tokens"]
    np.testing.assert_allclose(merged(tokens), adapt(base, changed)(tokens), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda adapters: adapt(base, adapters)(tokens).sum())(changed)
    assert float(gradient["head.bias"][...]) == 2.0


MESHES = {"data": (8, 1, 1), "all": (2, 2, 2)}


@functools.cache
def losses_on(name):
    """Losses of ten steps, the adapters' shardings, and those of the base."""
    mesh = None if name is None else make_mesh(MeshConfig(*MESHES[name]))
    base, optimizer = model_of(), optax.adam(0.01)
    base = base if mesh is None else jax.device_put(base, shardings(base, mesh))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh):
        state = init_state(lambda key: make_adapters(base, LoraConfig(rank=2, dropout=0.1), key=key), optimizer,
                           jax.random.key(0), mesh)
        step = make_train_step(adapted_loss(next_token_loss(), base), optimizer)
        losses = []
        for _ in range(10):
            batch = batch_of(rows=8)
            state, metrics = step(state, batch if mesh is None else jax.device_put(batch, batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    return losses, state.params


@pytest.mark.long
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_the_losses_of_one(name):
    losses, params = losses_on(name)
    np.testing.assert_allclose(losses, losses_on(None)[0], rtol=1e-5)
    assert losses[-1] < losses[0]
    expected = {"query": (P(None, "fsdp", None), P(None, None, "tensor")),
                "output": (P(None, "tensor", None), P(None, None, "fsdp"))}
    for projection, (a, b) in expected.items():
        adapter = params[f"stack.blocks.attention.{projection}"]
        mesh = make_mesh(MeshConfig(*MESHES[name]))
        for factor, spec in ((adapter.a[...], a), (adapter.b[...], b)):
            assert factor.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize(("lora", "message"), [
    (dict(rank=0), "lora.rank=0 makes no adapter"),
    (dict(rank=2, weights="atention"), "lora.weights='atention' matches none of stack.blocks.attention.key, stack.*up"),
    (dict(rank=2, whole="heads"), "lora.whole='heads' matches none of embeddings.position, embeddings.token.*mlp.up"),
    (dict(rank=2, weights="token", whole="token"), "embeddings.token has an adapter"),
    (dict(rank=2, whole="query"), r"query.kernel has an adapter \(lora.weights='attention\|mlp'\) and is"),
])
def test_patterns_that_fit_no_weight(lora, message):
    with pytest.raises(ValueError, match=message):
        make_adapters(model_of(), LoraConfig(**lora), key=jax.random.key(0))


@pytest.mark.parametrize(("lora", "message"), [
    (dict(rank=-1), "lora.rank=-1"), (dict(alpha=0.0), "lora.alpha=0.0"), (dict(dropout=1.0), "lora.dropout=1.0"),
    (dict(weights="a("), "lora.weights='a\\(' is not a valid regular expression")])
def test_bad_settings(lora, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**lora)


def test_adapters_of_another_model():
    adapters = make_adapters(model_of(), LORA, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"has no 'stack.blocks.attention.key'; it has decoder.blocks.attention.key"):
        merge_adapters(model_of("encoder_decoder"), adapters)
    with pytest.raises(ValueError, match=r"'stack.blocks.attention.key' is \[3, 8, 8\] here and \[2, 8, 8\] there"):
        adapt(model_of(num_layers=3), adapters)
