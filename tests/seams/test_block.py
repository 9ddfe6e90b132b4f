"""A custom block, defined only in this file: parallel residual, gated attention, squared
activations."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import transformer_jax as tj
from transformer_jax.config import MeshConfig
from transformer_jax.nn.attention import Attention
from transformer_jax.nn.blocks import prepared, self_attention
from transformer_jax.nn.layers import Linear, Norm
from transformer_jax.nn.mlp import feed_forward
from transformer_jax.nn.sites import Sites
from transformer_jax.sharding import batch_sharding, make_mesh, shardings

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending" / "block.md"
CONFIG = tj.ModelConfig(vocab_size=16, max_len=24, num_layers=2, num_heads=4, num_kv_heads=2, model_dim=16, mlp_dim=32,
                        positions="rope", init_std=0.3)
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, CONFIG.vocab_size)


class SquaredRelu(nnx.Module):
    """A feed-forward layer that defines only ``__call__`` (So et al., 2021, Primer)."""

    def __init__(self, config, *, key):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(config.model_dim, config.mlp_dim, ("embed", "mlp"), config, key=up_key)
        self.out = Linear(config.mlp_dim, config.model_dim, ("mlp", "embed"), config, key=down_key)

    def __call__(self, x_BTD):
        return self.out(jnp.square(jax.nn.relu(self.up(x_BTD))))


class GatedParallelBlock(nnx.Module):
    """Attention, whose heads are gated, and the feed-forward layer read one norm and are added
    together."""

    def __init__(self, config, *, key, num_layers):
        attention_key, mlp_key, gate_key = jax.random.split(key, 3)
        self.norm = Norm(config.model_dim, config)
        self.attention = Attention(config, key=attention_key, output_scale=num_layers**-0.5)
        self.gate = Linear(config.model_dim, config.num_heads, ("embed", "heads"), config, key=gate_key)
        self.mlp = SquaredRelu(config, key=mlp_key)

    def __call__(self, x_BTD, context, layer, *, cache=None, key=None, intervene=None):
        sites = Sites(intervene, layer)
        x_BTD = sites("residual", x_BTD)
        read_BTD = self.norm(x_BTD)
        gate_BTN1 = jax.nn.sigmoid(self.gate(read_BTD))[..., None]
        trace, cache = self_attention(self.attention, x_BTD, read_BTD, context, sites, cache=cache, key=key,
                                      gate_BTNH=gate_BTN1)
        mlp_BTD, neurons_BTF = feed_forward(self.mlp, read_BTD, sites)
        trace = dataclasses.replace(trace, mlp_output=mlp_BTD, neurons=neurons_BTF)
        return x_BTD + trace.attention_output + mlp_BTD, trace, cache

    def for_single_tokens(self):
        block = jax.tree.map(lambda leaf: leaf, self)
        block.attention, block.mlp = prepared(self.attention), prepared(self.mlp)
        return block


@functools.cache
def make():
    return tj.Decoder(CONFIG, key=jax.random.key(0), block=GatedParallelBlock)


def rotated(x_TNH):
    half = x_TNH.shape[-1] // 2
    turns = np.exp(1j * np.arange(len(x_TNH))[:, None, None] * CONFIG.rope_base ** (-np.arange(half) / half))
    numbers = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * turns
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def in_numpy(model, tokens):
    """Logits ``[T, V]`` and maps ``[L, N, T, T]`` of one sequence in float64."""
    N, K, H, T = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim, len(tokens)
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))

    def linear(module, layer, x):
        y = x @ module["kernel"][layer]
        return y + module["bias"][layer] if module.get("bias") is not None else y

    def norm(module, x, layer=...):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * module["scale"][layer] + module[
            "bias"][layer]

    x, maps, blocks = leaves["embeddings"]["token"][tokens], [], leaves["stack"]["blocks"]
    for layer in range(CONFIG.num_layers):
        read, attention = norm(blocks["norm"], x, layer), blocks["attention"]
        q, k, v = (linear(attention[name], layer, read).reshape(T, heads, H)
                   for name, heads in (("query", N), ("key", K), ("value", K)))
        q, k, v = rotated(q), np.repeat(rotated(k), N // K, 1), np.repeat(v, N // K, 1)
        scores = np.where(np.tri(T, dtype=bool), np.einsum("tnh,snh->nts", q, k) / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(weights / weights.sum(-1, keepdims=True))
        gate = 1 / (1 + np.exp(-linear(blocks["gate"], layer, read)))
        heads = np.einsum("nts,snh->tnh", maps[-1], v) * gate[..., None]
        mlp = linear(blocks["mlp"]["out"], layer, np.maximum(linear(blocks["mlp"]["up"], layer, read), 0) ** 2)
        x = x + linear(attention["output"], layer, heads.reshape(T, -1)) + mlp
    return norm(leaves["final_norm"], x) @ leaves["embeddings"]["token"].T, np.stack(maps)


def test_maps_and_logits_equal_plain_numpy():
    logits, trace = tj.forward(make(), TOKENS), tj.trace(make(), TOKENS)
    for row, tokens in enumerate(np.asarray(TOKENS)):
        wanted_logits, wanted_maps = in_numpy(make(), tokens)
        np.testing.assert_allclose(logits[row], wanted_logits, atol=1e-4)
        np.testing.assert_allclose(trace["pattern"][:, row], wanted_maps, atol=3e-6)
    assert "layers.0.neurons" not in trace.names() and trace["mlp_output"].shape == (2, 2, 9, 16)


def test_a_padded_pass_with_a_cache_equals_one_without():
    model, lengths = jax.jit(lambda model: model.for_decoding())(make()), (9, 5)
    segments = np.arange(9) >= 9 - np.array(lengths)[:, None]

    @jax.jit
    def in_steps(model, cache):
        logits = []
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            out = model.step(TOKENS[:, start:stop], cache, segment_ids_BT=jnp.asarray(segments[:, start:stop], int))
            logits, cache = [*logits, out.logits], out.cache
        return jnp.concatenate(logits, axis=1)

    found = in_steps(model, model.start_cache(2, 16))
    for row, length in enumerate(lengths):
        alone = tj.forward(make(), TOKENS[row : row + 1, 9 - length :])[0]
        np.testing.assert_allclose(found[row, 9 - length :], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


@pytest.mark.long
def test_it_generates_the_most_probable_tokens():
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    found = tj.generate(make(), prompts, max_new_tokens=4, sampling=tj.Sampling(temperature=0)).tokens
    for prompt, new in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(4):
            text.append(int(in_numpy(make(), text)[0][-1].argmax()))
        assert new == text[len(prompt):]


@functools.partial(jax.jit, static_argnums=1)
def gradient(model, chosen=None, strength=0.0):
    def loss(model):
        def intervene(site, layer, value):
            return jnp.where(layer == 1, value * (1 + strength), value) if site == chosen else value

        logits = model(TOKENS, intervene=None if chosen is None else intervene).logits
        return -jax.nn.log_softmax(logits[:, :-1])[jnp.arange(2)[:, None], jnp.arange(8), TOKENS[:, 1:]].mean()

    return jax.value_and_grad(loss)(model)


def test_gradients_are_slopes_of_the_loss():
    model = make()
    slope = gradient(model)[1].stack.blocks.gate.kernel[...]
    rng, step = np.random.default_rng(0), 1e-2
    direction = jnp.asarray(rng.normal(size=slope.shape), jnp.float32)

    def moved(amount):
        copy = jax.tree.map(lambda leaf: leaf, model)
        copy.stack.blocks.gate.kernel.set_value(copy.stack.blocks.gate.kernel[...] + amount * direction)
        return float(gradient(copy)[0])

    np.testing.assert_allclose((slope * direction).sum(), (moved(step) - moved(-step)) / (2 * step), rtol=2e-2)


@pytest.mark.parametrize("site", ["residual", "keys", "head_output", "mlp_output"])
def test_interventions_act_in_it(site):
    changed, plain = gradient(make(), site, 0.5)[0], gradient(make(), site, 0.0)[0]
    np.testing.assert_allclose(plain, gradient(make())[0], rtol=1e-5)
    assert abs(changed - plain) > 1e-4


def test_eight_devices_compute_what_one_does():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted = gradient(make())
    with jax.set_mesh(mesh):
        model = jax.device_put(make(), shardings(make(), mesh))
        assert not model.stack.blocks.gate.kernel[...].sharding.is_fully_replicated
        logits = jax.jit(lambda model, tokens: model(tokens).logits)(
            model, jax.device_put(jnp.tile(TOKENS, (2, 1)), batch_sharding(mesh)))
        found = gradient(model)
    np.testing.assert_allclose(logits[:2], tj.forward(make(), TOKENS), atol=2e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_saved_custom_block_loads_with_a_template(tmp_path):
    tj.save(tmp_path, tj.Bundle(model=make(), tokenizer=None, config=CONFIG))
    with pytest.raises(ValueError, match=r"GatedParallelBlock at 'stack.blocks'.*template=model.*block=GatedP"):
        tj.load(tmp_path)
    with pytest.raises(ValueError, match="GatedParallelBlock at 'stack.blocks', but the template has .*blocks.Block"):
        tj.load(tmp_path, template=tj.Decoder(CONFIG, key=jax.random.key(1)))
    template = jax.eval_shape(lambda key: tj.Decoder(CONFIG, key=key, block=GatedParallelBlock), jax.random.key(1))
    loaded = tj.load(tmp_path, template=template).model
    np.testing.assert_array_equal(tj.forward(loaded, TOKENS), tj.forward(make(), TOKENS))


@pytest.mark.long
def test_a_feed_forward_layer_that_was_swapped_generates_and_loads(tmp_path):
    def with_squares(key):
        model = tj.Decoder(CONFIG, key=key)
        model.stack.blocks.mlp = jax.vmap(lambda key: SquaredRelu(CONFIG, key=key))(jax.random.split(key, 2))
        return model

    model = with_squares(jax.random.key(3))
    found = tj.generate(model, [[1, 2, 3]], max_new_tokens=2, sampling=tj.Sampling(temperature=0)).tokens[0]
    assert found[0] == tj.forward(model, jnp.asarray([[1, 2, 3]]))[0, -1].argmax()
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=None, config=CONFIG))
    loaded = tj.load(tmp_path, template=jax.eval_shape(with_squares, jax.random.key(1))).model
    np.testing.assert_array_equal(tj.forward(loaded, TOKENS), tj.forward(model, TOKENS))


def test_the_recipe_of_the_documentation_runs():
    namespace = {"__name__": "recipe"}
    for program in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        exec(compile(program, str(DOCUMENT), "exec"), namespace)
    assert namespace["maps"].shape == (1, 4, 3, 3) and len(namespace["tokens"][0]) == 4
    np.testing.assert_array_equal(namespace["bundle"].model.stack.blocks.gate.kernel[...],
                                  namespace["model"].stack.blocks.gate.kernel[...])


@pytest.mark.long
def test_a_run_that_begins_from_a_model_with_such_a_block_keeps_it(tmp_path):
    texts = ["abcab", "bcabc"] * 20
    tokenizer = tj.Tokenizer.train(texts, kind="char")
    config = CONFIG.replace(vocab_size=tokenizer.vocab_size, max_len=8)
    model = tj.Decoder(config, key=jax.random.key(0), block=GatedParallelBlock)
    base = tj.Bundle(model=model, tokenizer=tokenizer, config=config)
    run = tj.ExperimentConfig(steps=1, batch_size=8, sample=tj.config.SampleConfig(every=0),
                              optim=tj.config.OptimConfig(warmup_steps=0))
    trained = tj.train(run, texts, base=base, workdir=tmp_path)
    assert isinstance(trained.model.stack.blocks, GatedParallelBlock)
    with pytest.raises(ValueError, match=r"GatedParallelBlock at 'stack.blocks'.*load\(directory, template=model\)"):
        tj.load(tmp_path)
    loaded = tj.load(tmp_path, template=model)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(trained.model),
                                                     strict=True))
    with pytest.raises(ValueError, match="has custom modules .* its settings cannot be changed"):
        tj.train(run.replace(model=tj.ModelConfig(dropout=0.5)), texts, base=base)


@pytest.mark.parametrize("block", [int, 3, None])
def test_what_makes_no_block_is_refused(block):
    with pytest.raises(TypeError, match="cannot make the block of a layer; expected a subclass of nnx.Module"):
        tj.Decoder(tj.ModelConfig(vocab_size=5, model_dim=4, num_heads=1), key=jax.random.key(0), block=block)
