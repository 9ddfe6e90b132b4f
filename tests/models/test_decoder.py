"""The decoder against a plain NumPy one, against Hugging Face, and by its properties."""

import collections
import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import reference_decoder
from reference_decoder import abstract_decoder, random_decoder

import transformer_jax as tj
from transformer_jax.config import RopeLayout
from transformer_jax.models import functional
from transformer_jax.models.inputs import positions_in_segments
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.ops import AttentionMask
from transformer_jax.training.objectives import next_token_loss

BASE = tj.ModelConfig(vocab_size=17, max_len=12, num_layers=2, num_heads=4, model_dim=16)
VARIANTS = {
    "gpt2": {},
    "post-norm": dict(norm_position="post"),
    "rmsnorm": dict(norm="rmsnorm"),
    "swiglu": dict(activation="swiglu", mlp_dim=24),
    "relu": dict(activation="relu"),
    "gelu-erf": dict(activation="gelu"),
    "qk-norm": dict(use_qk_norm=True),
    "no biases": dict(use_bias=False),
    "rope": dict(positions="rope", rope_base=100.0),
    "alibi": dict(positions="alibi"),
    "alibi of 3 heads": dict(positions="alibi", num_heads=3, head_dim=4),
    "sinusoidal": dict(positions="sinusoidal"),
    "no positions": dict(positions="none"),
    "grouped queries": dict(num_kv_heads=2),
    "one key head": dict(num_kv_heads=1, head_dim=6),
    "sliding window": dict(sliding_window=3),
    "untied": dict(tie_embeddings=False),
    "llama": dict(positions="rope", norm="rmsnorm", activation="swiglu", use_bias=False, num_kv_heads=2,
                  tie_embeddings=False, use_qk_norm=True),
    "gpt-neox": dict(positions="rope", rope_layout=RopeLayout(2), residual="parallel", tie_embeddings=False),
    "gpt-j": dict(positions="rope", rope_layout=RopeLayout(2, "interleaved"), residual="parallel_shared",
                  use_bias=False, use_mlp_bias=True, use_norm_bias=True, use_output_bias=True, tie_embeddings=False),
    "norms without weights": dict(positions="rope", rope_layout=RopeLayout(None, "interleaved"),
                                  norm="layernorm_without_weights"),
}


# Machine code that is quick to make, where the program itself is the test or a gradient is computed
# once.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def make(variant="gpt2", **changes):
    """A small decoder whose norms and biases are random too, so that leaving one out shows."""
    return random_decoder(BASE.replace(**{**VARIANTS[variant], **changes}))


@functools.cache
def tokens(batch=2, length=9):
    with jax.ensure_compile_time_eval():  # the first caller may be in a traced function
        return jax.random.randint(jax.random.key(5), (batch, length), 0, BASE.vocab_size)


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@functools.cache
def expected_logits(variant):
    return np.stack([reference_decoder.run(make(variant), row)[0] for row in np.asarray(tokens())])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_plain_numpy(variant):
    logits = tj.forward(make(variant), tokens())
    assert logits.dtype == jnp.float32
    assert_close(logits, expected_logits(variant))


def test_logits_equal_hugging_face_gpt2():
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    model = make("gpt2")
    config = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.model_dim, n_layer=config.num_layers,
        n_head=config.num_heads, bos_token_id=0, eos_token_id=0, attn_implementation="eager")).eval()
    blocks = model.stack.blocks

    def copy(to, *sources):
        with torch.no_grad():
            to.copy_(torch.tensor(np.concatenate(sources, axis=-1)))

    def layer_of(parameter, layer):
        return np.asarray(parameter[...][layer])

    copy(theirs.transformer.wte.weight, np.asarray(model.embeddings.token[...]))
    copy(theirs.transformer.wpe.weight, np.asarray(model.embeddings.position[...]))
    copy(theirs.transformer.ln_f.weight, np.asarray(model.final_norm.scale[...]))
    copy(theirs.transformer.ln_f.bias, np.asarray(model.final_norm.bias[...]))
    for layer, block in enumerate(theirs.transformer.h):
        attention = blocks.attention
        for module, parts in ((block.attn.c_attn, (attention.query, attention.key, attention.value)),
                              (block.attn.c_proj, (attention.output,)), (block.mlp.c_fc, (blocks.mlp.up,)),
                              (block.mlp.c_proj, (blocks.mlp.down,))):
            copy(module.weight, *(layer_of(part.kernel, layer) for part in parts))
            copy(module.bias, *(layer_of(part.bias, layer) for part in parts))
        for module, ours in ((block.ln_1, blocks.attention_norm), (block.ln_2, blocks.mlp_norm)):
            copy(module.weight, layer_of(ours.scale, layer))
            copy(module.bias, layer_of(ours.bias, layer))
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens()))).logits.numpy()
    np.testing.assert_allclose(tj.forward(model, tokens()), expected, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_token_changes_nothing_before_it(variant):
    model = make(variant)
    changed = tokens().at[:, 5].set((tokens()[:, 5] + 1) % BASE.vocab_size)
    before, after = tj.forward(model, tokens()), tj.forward(model, changed)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (after[:, 5] != before[:, 5]).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_each_alone(variant):
    model = make(variant)
    row = tokens(1, 12)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 3, 3, 1, 1, 1]])
    packed = tj.forward(model, row, segment_ids_BT=segments)
    for start, end in ((0, 3), (3, 7), (7, 9)):
        assert_close(packed[0, start:end], reference_decoder.run(model, np.asarray(row[0, start:end]))[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_on_either_side_changes_nothing(variant):
    row = tokens()[:1]
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = jnp.pad(row, ((0, 0), (left, right)), constant_values=3)
        segments = jnp.pad(jnp.ones_like(row), ((0, 0), (left, right)))
        logits = tj.forward(make(variant), padded, segment_ids_BT=segments)
        assert jnp.isfinite(logits).all()
        assert_close(logits[0, left : left + 9], expected_logits(variant)[0])


def test_positions_restart_with_each_segment():
    ids = jnp.asarray([[0, 0, 1, 1, 1, 2, 1, 1], [5, 5, 5, 5, 4, 4, 0, 0]])
    np.testing.assert_array_equal(positions_in_segments(ids, ids), [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1, 0, 1]])


@pytest.mark.parametrize("variant", ["gpt2", "rope", "sinusoidal"])
def test_positions_may_be_given(variant):
    model = make(variant)
    row, positions = tokens(1, 5), np.array([4, 0, 1, 7, 2])
    logits = jax.jit(lambda positions: model(row, positions_BT=positions).logits)(jnp.asarray(positions)[None])
    assert_close(logits[0], reference_decoder.run(model, np.asarray(row[0]), positions)[0])


def key_of(seed):
    return jax.random.key(seed, impl="unsafe_rbg")  # compiles in a fraction of the default's time


def test_dropout_is_decided_by_the_key():
    run = jax.jit(lambda model, key: model(tokens(), key=key).logits)
    model, without = make(dropout=0.3), tj.forward(make(), tokens())
    np.testing.assert_array_equal(tj.forward(model, tokens()), without)
    first, again, other = (run(model, key_of(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-2) and not np.allclose(first, without, atol=1e-2)
    np.testing.assert_array_equal(run(make(), key_of(1)), without)  # with rate 0 the key has no effect


def test_every_layer_has_its_own_dropout():
    model = make(dropout=0.5)
    def ones(site, layer, value):
        return {"mlp_output": jnp.ones_like(value), "attention_output": jnp.zeros_like(value)}.get(site, value)

    residual = jax.jit(lambda key: model(tokens(), key=key, intervene=ones).trace.residual)(key_of(0))
    dropped = np.asarray(residual[1:] - residual[:-1]).round(4)
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert abs(dropped.mean() - 1) < 5 / np.sqrt(dropped.size)
    assert (dropped[0] != dropped[1]).any()


def gradient_of(model, **changes):
    """The loss and its gradient, with the compute settings of the config changed."""
    config = model.config.replace(**changes)

    def loss(leaves):
        other = jax.tree.unflatten(jax.tree.structure(abstract_decoder(config)), leaves)
        total, weight = next_token_loss()(other, {"tokens": tokens(), "targets": tokens()}, key_of(3))
        return total / weight

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(jax.tree.leaves(model))


@pytest.fixture(scope="module")
def plain_gradient():
    return gradient_of(make(num_layers=3, dropout=0.2))


@pytest.mark.parametrize("changes", [dict(unroll=2), dict(unroll=3), dict(remat="dots"), dict(remat="full"),
                                     dict(remat="offload")], ids=str)
@pytest.mark.long
def test_unroll_and_remat_change_no_result(changes, plain_gradient):
    loss, gradient = gradient_of(make(num_layers=3, dropout=0.2), **changes)
    np.testing.assert_allclose(loss, plain_gradient[0], rtol=1e-6)
    for got, wanted in zip(gradient, plain_gradient[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_remat_saves_memory():
    def temporary_bytes(remat):
        config = BASE.replace(num_layers=8, max_len=64, remat=remat)
        batch = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        loss = jax.grad(lambda model, tokens: next_token_loss()(model, {"tokens": tokens, "targets": tokens})[0])
        compiled = jax.jit(loss).lower(abstract_decoder(config), batch).compile(QUICK)
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (temporary_bytes(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none


def without_trace(model, tokens_BT):
    """The forward pass of a pre-norm GPT with nothing returned but the logits of its blocks."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    context = AttentionContext(mask=AttentionMask.causal())

    def layer(x_BTD, block_and_index):
        block, index = block_and_index
        return block(x_BTD, context, index)[0], None

    if model.config.remat == "full":
        layer = jax.checkpoint(layer)
    x_BTD, _ = jax.lax.scan(layer, model.embeddings(tokens_BT, positions),
                            (model.stack.blocks, jnp.arange(model.config.num_layers)), unroll=model.config.unroll)
    return model.embeddings.unembed(model.final_norm(x_BTD))


def program(forward, model, gradient):
    """What a compiled program consists of: the instructions with their shapes, counted, and its
    memory."""
    def loss(model, tokens_BT):
        return tj.ops.cross_entropy(forward(model, tokens_BT), tokens_BT).mean()

    compiled = jax.jit(jax.grad(loss) if gradient else forward).lower(model, tokens()).compile(QUICK)
    instructions = re.findall(r"= (\(.*?\)|\S+) ([a-z\-]+)\(", re.sub(r"\{[\d,]*\}", "", compiled.as_text()))
    return collections.Counter(instructions), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("gradient", "remat"), [(False, "none"), (True, "none"), (True, "full")])
def test_the_compiled_program_holds_nothing_of_an_unread_trace(gradient, remat):
    model = make(num_layers=3, remat=remat)
    assert program(lambda model, tokens_BT: model(tokens_BT).logits, model, gradient) == program(
        without_trace, model, gradient)


def test_reading_the_trace_shows_in_the_compiled_program():
    def reads(model, tokens_BT):
        out = model(tokens_BT)
        return out.logits + out.trace.queries.mean()

    instructions, memory = program(reads, make(num_layers=3), gradient=False)
    bare_instructions, bare_memory = program(without_trace, make(num_layers=3), gradient=False)
    assert instructions != bare_instructions and memory > bare_memory


def test_logits_compile_once_for_equal_shapes():
    before = functional._logits._cache_size()
    config = BASE.replace(mlp_dim=20)
    for seed in (0, 1):
        tj.forward(random_decoder(config, seed), (tokens() + seed) % BASE.vocab_size)
    assert functional._logits._cache_size() == before + 1


def dots(jaxpr):
    """The operand and result types of every matrix product, inner jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield *(str(x.aval.dtype) for x in equation.invars), str(equation.outvars[0].aval.dtype)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dots(inner)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_bfloat16_computes_in_bfloat16(variant):
    model = make(variant, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(lambda model: model(tokens()).logits)(model)
    types = collections.Counter(dots(jaxpr.jaxpr))
    assert sum(types.values()) >= 7  # queries, keys and values may be one product
    assert {kinds[:2] for kinds in types} == {("bfloat16", "bfloat16")}
    out = jax.eval_shape(lambda model: model(tokens()), model)
    assert out.logits.dtype == jnp.float32 and out.hidden.dtype == out.trace.queries.dtype == jnp.bfloat16
    exact = expected_logits(variant)
    error = np.abs(tj.forward(model, tokens()) - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < 0.05


def test_bfloat16_parameters():
    model = make("llama", dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    exact = expected_logits("llama")
    assert np.abs(tj.forward(model, tokens()) - exact).max() < 0.1 * np.abs(exact).max()


def test_the_program_hardly_grows_with_depth():
    def size(num_layers):
        model = abstract_decoder(tj.presets.get("gpt2-small").replace(num_layers=num_layers))
        batch = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        gradient = jax.grad(lambda model, tokens: next_token_loss()(model, {"tokens": tokens, "targets": tokens})[0])
        return len(jax.jit(gradient).lower(model, batch).as_text())

    assert size(12) <= 1.3 * size(1)


@pytest.fixture(scope="module")
def fresh():
    config = tj.presets.get("nanogpt-char-cpu").replace(use_bias=True)
    return jax.jit(lambda key: tj.Decoder(config, key=key))(key_of(0))


def test_initial_weights_are_those_of_gpt2(fresh):
    model, blocks = fresh, fresh.stack.blocks
    for parameter, std in ((model.embeddings.token, 0.02), (blocks.attention.query.kernel, 0.02),
                           (blocks.mlp.up.kernel, 0.02), (blocks.attention.output.kernel, 0.02 / np.sqrt(8)),
                           (blocks.mlp.down.kernel, 0.02 / np.sqrt(8))):
        values = np.asarray(parameter[...])
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * values.size)
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
    kernels = np.asarray(blocks.attention.query.kernel[...])
    assert not np.allclose(kernels[0], kernels[1]), "each layer is initialised on its own"
    assert (blocks.mlp.up.bias[...] == 0).all() and (blocks.mlp_norm.scale[...] == 1).all()


def test_a_fresh_model_predicts_nearly_uniformly(fresh):
    row = jax.random.randint(jax.random.key(1), (2, 64), 0, 65)
    loss = tj.ops.cross_entropy(tj.forward(fresh, row), jnp.roll(row, 1, axis=1)).mean()
    assert abs(float(loss) - np.log(65)) < 0.1


@pytest.mark.parametrize(("bad", "words"), [
    (jnp.zeros((2, 3)), "float32 (2, 3)"), (jnp.zeros(3, jnp.int32), "int32 (3,)"),
    (jnp.zeros((1, 13), jnp.int32), "13 tokens are longer than the 12"),
])
def test_wrong_tokens_are_refused(bad, words):
    with pytest.raises(ValueError) as error:
        make()(bad)
    assert words in str(error.value)


@pytest.mark.parametrize("bad", [-1, 17])
def test_ids_outside_the_vocabulary_are_refused(bad):
    for function in (tj.forward, tj.trace):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 17 .ids 0 to 16"):
            function(make(), jnp.asarray([[0, bad]]))


def test_a_model_needs_its_vocabulary():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        tj.Decoder(tj.ModelConfig(), key=jax.random.key(0))
