"""Recurrent encoder-decoders: attention beside NumPy, packed rows, decoding, training,
inspection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import MeshConfig, OptimConfig, RecurrentConfig, SampleConfig
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import make_mesh
from transformer_jax.training.leaves import tree_digest

ONE = make_mesh(devices=jax.devices()[:1])
GREEDY = tj.Sampling(temperature=0)
PAIRS = [(word, word[::-1]) for word in ("abc", "acb", "bca", "cab", "ab", "ba", "ca", "bcaa", "abca", "cbab")] * 8
SETTINGS = {"attention": dict(cell="gru"), "deep": dict(cell="lstm", num_layers=2),
            "plain": dict(cell="lstm", use_attention=False), "deep_plain": dict(num_layers=2, use_attention=False)}
RUN = tj.ExperimentConfig(
    model=RecurrentConfig(family="recurrent_pairs", cell="gru", max_len=16, model_dim=24), steps=150, batch_size=8,
    optim=OptimConfig(peak_lr=0.02), sample=SampleConfig(every=0),
    data=tj.config.DataConfig(tokenizer=tj.config.TokenizerConfig(kind="char")))


@pytest.fixture(scope="module", params=SETTINGS)
def model(request):
    config = RecurrentConfig(family="recurrent_pairs", vocab_size=19, max_len=24, model_dim=8,
                             **SETTINGS[request.param])
    return make_model(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def bundle():
    return tj.train(RUN, PAIRS, mesh=ONE)


def test_attention_is_that_of_a_loop_in_numpy():
    config = RecurrentConfig(family="recurrent_pairs", vocab_size=19, model_dim=8, cell="gru")
    model = make_model(config, key=jax.random.key(0))
    source, target = np.asarray([[3, 4, 5, 6]]), np.asarray([[1, 7, 8]])

    def of(parameter):
        return np.asarray(parameter[...], np.float64)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def gru(cell, x, h):
        r, z, n = np.split(x @ of(cell.input_kernel) + of(cell.bias), 3)
        h_r, h_z, h_n = np.split(h @ of(cell.state_kernel), 3)
        r, z = sigmoid(r + h_r), sigmoid(z + h_z)
        return (1 - z) * np.tanh(n + r * (h_n + of(cell.candidate_bias))) + z * h

    table, layer = of(model.embeddings.token), model.attentive
    states = {"forward": [np.zeros(8)], "backward": [np.zeros(8)]}
    for token in source[0]:
        states["forward"].append(gru(model.forward[0], table[token], states["forward"][-1]))
    for token in source[0, ::-1]:
        states["backward"].append(gru(model.backward[0], table[token], states["backward"][-1]))
    memory = np.stack([np.concatenate(pair) for pair in zip(states["forward"][1:], states["backward"][:0:-1],
                                                            strict=True)])
    s = np.tanh(states["backward"][-1] @ of(model.initial.kernel) + of(model.initial.bias))
    out = tj.trace(model, source, target).cross.attention(layers=0, heads=0)[0]
    logits = tj.forward(model, source, target)[0]
    for step, token in enumerate(target[0]):
        scores = np.tanh(s @ of(layer.query_kernel) + memory @ of(layer.key_kernel)) @ of(layer.score_kernel)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[step], weights, atol=1e-5)
        s = gru(layer.cell, np.concatenate([table[token], weights @ memory]), s)
        hidden = np.tanh(np.concatenate([s, weights @ memory, table[token]]) @ of(model.output.kernel)
                         + of(model.output.bias))
        np.testing.assert_allclose(logits[step], hidden @ table.T + of(model.embeddings.output_bias), atol=1e-5)


@pytest.mark.long
def test_pairs_of_a_packed_row_are_read_as_if_alone(model):
    source, target = np.arange(1, 9)[None], np.arange(9, 17)[None]
    packed = tj.forward(model, source, target, source_segment_ids_BS=[[1, 1, 1, 2, 2, 2, 2, 0]],
                        target_segment_ids_BT=[[1, 1, 2, 2, 2, 2, 0, 0]])
    np.testing.assert_allclose(packed[:, :2], tj.forward(model, source[:, :3], target[:, :2]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 2:6], tj.forward(model, source[:, 3:7], target[:, 2:6]), atol=1e-5)


@pytest.mark.long
def test_batched_and_cached_targets_are_those_of_the_whole_pass(model):
    sources = [[1, 2, 3, 4, 5], [6, 7]]
    together = tj.generate(model, sources, start_id=1, max_new_tokens=7, sampling=GREEDY)
    for source, tokens, logprobs in zip(sources, together.tokens, together.logprobs, strict=True):
        logits_TV = np.asarray(tj.forward(model, np.asarray([source]), np.asarray([[1, *tokens[:-1]]])))[0]
        assert logits_TV.argmax(-1).tolist() == tokens
        expected_TV = logits_TV - np.asarray(jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True))
        np.testing.assert_allclose(logprobs, expected_TV.max(-1), atol=1e-4)


@pytest.mark.long
def test_reversed_words_are_learned_and_measured(bundle):
    assert tj.evaluate(bundle, PAIRS[:10], beam_size=1)["exact"] > 0.85
    with pytest.raises(ValueError, match="translates greedily, because beam search .*; set beam_size=1"):
        tj.evaluate(bundle, PAIRS[:2])
    with pytest.raises(ValueError, match="beam_search keeps the keys .* family 'recurrent_pairs' does not have"):
        tj.beam_search(bundle.model, ["abc"], tokenizer=bundle.tokenizer)


def test_alignments_go_through_inspection(bundle, tmp_path):
    inspected = tj.inspect_text(bundle, "abca", target="acba")
    assert inspected.kinds == ("cross",)
    maps = inspected.attention("cross", layers=0, heads=0)
    assert maps.shape == (5, 5)  # a, b, c, a, </s> for each of a, c, b, a and the token after them
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    both = tj.inspect_text(bundle, ["abca", "ab"], target=["acba", "ba"])
    np.testing.assert_allclose(both.texts[0].attention("cross")[0, 0], maps, atol=1e-5)
    assert both.texts[1].attention("cross").shape == (1, 1, 3, 3)
    assert "attention('cross'): [1 layers, 1 heads, 5 queries, 5 keys]" in repr(inspected)
    inspected.plot()
    inspected.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000
    with pytest.raises(ValueError, match="kind='self' is not one of cross, the attention of a RecurrentPairs"):
        inspected.attention("self")


@pytest.mark.long
def test_a_bundle_is_saved_loaded_and_resumed(bundle, tmp_path):
    tj.save(tmp_path / "saved", bundle)
    loaded = tj.load(tmp_path / "saved")
    assert loaded.config == bundle.config and tree_digest(loaded.model) == tree_digest(bundle.model)
    run = RUN.replace(steps=4, optim=OptimConfig(schedule="constant"), model=RUN.model.replace(dropout=0.1))
    tj.train(run, PAIRS, steps=2, workdir=tmp_path / "run", mesh=ONE)
    resumed = tj.train(run, PAIRS, workdir=tmp_path / "run", mesh=ONE)
    assert tree_digest(resumed.model) == tree_digest(tj.train(run, PAIRS, mesh=ONE).model)


@pytest.mark.long
def test_eight_devices_train_as_one_does():
    run = RUN.replace(steps=2, optim=OptimConfig(name="sgd", peak_lr=0.1))
    one, eight = (tj.train(run, PAIRS, mesh=mesh).model for mesh in (ONE, make_mesh(MeshConfig(fsdp=2, tensor=2))))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_model_without_attention_has_no_maps():
    config = RecurrentConfig(family="recurrent_pairs", vocab_size=19, model_dim=8, use_attention=False)
    model = make_model(config, key=jax.random.key(0))
    assert model.stacks() == {} and model(jnp.ones((1, 2), int), jnp.ones((1, 2), int)).trace is None
