"""Recurrent language models: cells beside PyTorch, the decode contract, training, resume, save and
load."""

import dataclasses
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.baselines.cells import RecurrentLayer, segment_starts
from transformer_jax.config import MeshConfig, OptimConfig, RecurrentConfig, SampleConfig
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import make_mesh
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import flops_per_token

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "torch_cells.npz"
ONE = make_mesh(devices=jax.devices()[:1])
CELLS = ("rnn", "lstm", "gru")
GREEDY = tj.Sampling(temperature=0)
TEXTS = ["the cat sat on the mat and the dog sat on the log", "a dog ran after the cat"] * 12
RUN = tj.ExperimentConfig(
    model=RecurrentConfig(cell="gru", max_len=16, num_layers=2, model_dim=16, dropout=0.1), steps=4, batch_size=8,
    optim=OptimConfig(peak_lr=0.01, schedule="constant"), sample=SampleConfig(every=0),
    data=tj.config.DataConfig(tokenizer=tj.config.TokenizerConfig(kind="char")))


@pytest.fixture(scope="module", params=CELLS)
def model(request):
    config = RecurrentConfig(cell=request.param, vocab_size=23, max_len=32, num_layers=2, model_dim=12)
    return make_model(config, key=jax.random.key(0))


def layer_of(kind: str, index: int) -> tuple[RecurrentLayer, dict[str, np.ndarray]]:
    """The layer with the weights of PyTorch, and the gradients of these weights there."""
    torch = {name.removeprefix(f"{kind}/"): value for name, value in np.load(FIXTURE).items()
             if name.startswith(f"{kind}/")}
    D = torch["out"].shape[-1]

    def ours(suffix: str) -> dict[str, np.ndarray]:
        w_in, w_state, b_in, b_state = (torch[f"{name}_l{index}{suffix}"] for name in (
            "weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        found = {"input_kernel": w_in.T, "state_kernel": w_state.T, "bias": b_in.copy()}
        if not suffix:  # one bias stands for two, whose gradients are equal
            found["bias"][:2 * D if kind == "gru" else None] += b_state[:2 * D if kind == "gru" else None]
        if kind == "gru":
            found["candidate_bias"] = b_state[2 * D:]
        return found

    layer = RecurrentLayer(RecurrentConfig(cell=kind, model_dim=D), torch[f"weight_ih_l{index}"].shape[1],
                           key=jax.random.key(0))
    for name, value in ours("").items():
        getattr(layer, name)[...] = jnp.asarray(value)
    return layer, ours("/gradient")


@pytest.mark.parametrize("kind", CELLS)
def test_outputs_and_gradients_are_those_of_pytorch(kind):
    torch, (layers, expected) = np.load(FIXTURE), zip(*(layer_of(kind, index) for index in range(2)), strict=True)
    x_BTD, weight_BTD = jnp.asarray(torch[f"{kind}/x"]), torch[f"{kind}/weight"]
    ids_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)

    def run(layers, x_BTD):
        last = []
        for layer in layers:
            (x_BTD, *_), state = layer(x_BTD, ids_BT)
            last.append(state)
        return x_BTD, last

    out_BTD, last = run(layers, x_BTD)
    np.testing.assert_allclose(out_BTD, torch[f"{kind}/out"], atol=1e-6)
    for index, states in enumerate(zip(*last, strict=True)):
        np.testing.assert_allclose(jnp.stack(states), torch[f"{kind}/last_{index}"], atol=1e-6)
    gradients, of_x = jax.grad(lambda layers, x: (run(layers, x)[0] * weight_BTD).sum(), argnums=(0, 1))(layers, x_BTD)
    np.testing.assert_allclose(of_x, torch[f"{kind}/x_gradient"], atol=1e-5)
    for layer, wanted in zip(gradients, expected, strict=True):
        for name, value in wanted.items():
            np.testing.assert_allclose(getattr(layer, name)[...], value, atol=1e-5, err_msg=name)


def test_a_layer_that_reads_from_the_end_is_the_layer_on_the_reversed_row():
    layer = RecurrentLayer(RecurrentConfig(cell="lstm", model_dim=6), 3, key=jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 9, 3))
    ids_BT = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
    (found, _), _ = layer(x_BTD, ids_BT, reverse=True)
    (expected, _), _ = layer(x_BTD[:, ::-1], ids_BT[:, ::-1])
    np.testing.assert_allclose(found, expected[:, ::-1], atol=1e-6)


def test_segments_start_where_the_last_token_had_another_segment():
    found = segment_starts(jnp.asarray([[0, 0, 1, 1, 2, 2, 0], [1, 0, 1, 2, 0, 0, 3]]), jnp.asarray([0, 1]))
    assert found.astype(int).tolist() == [[0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 1]]


@pytest.mark.long
def test_documents_of_a_packed_row_are_read_as_if_alone(model):
    tokens_BT = np.asarray([[3, 4, 5, 6, 7, 8, 9, 10]], np.int32)
    packed = tj.forward(model, tokens_BT, segment_ids_BT=[[1, 1, 1, 2, 2, 2, 2, 0]])
    np.testing.assert_allclose(packed[:, :3], tj.forward(model, tokens_BT[:, :3]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 3:7], tj.forward(model, tokens_BT[:, 3:7]), atol=1e-5)


@pytest.mark.long
def test_cached_uncached_batched_and_padded_rows_are_equal(model):
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [8, 9]]
    together = tj.generate(model, prompts, max_new_tokens=9, sampling=GREEDY)
    alone = [tj.generate(model, [prompt], max_new_tokens=9, sampling=GREEDY) for prompt in prompts]
    assert together.tokens == [result.tokens[0] for result in alone]
    for prompt, tokens, logprobs in zip(prompts, together.tokens, together.logprobs, strict=True):
        logits_TV = np.asarray(tj.forward(model, np.asarray([prompt + tokens], np.int32)))[0, len(prompt) - 1:-1]
        assert logits_TV.argmax(-1).tolist() == tokens
        expected_TV = logits_TV - np.asarray(jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True))
        np.testing.assert_allclose(logprobs, expected_TV.max(-1), atol=1e-4)


@pytest.mark.long
def test_the_cache_is_read_in_parts_of_any_length(model):
    tokens_BT = np.random.default_rng(0).integers(23, size=(2, 9), dtype=np.int32)
    ids_BT = jnp.asarray([[0, 0, 1, 1, 1, 1, 2, 2, 2], [1] * 9])
    whole = model.step(tokens_BT, model.start_cache(2, 9), segment_ids_BT=ids_BT)
    cache, parts = model.start_cache(2, 9), []
    for start, stop in ((0, 1), (1, 4), (4, 9)):
        out = model.step(tokens_BT[:, start:stop], cache, segment_ids_BT=ids_BT[:, start:stop])
        cache, parts = out.cache, [*parts, out.logits]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole.logits, atol=1e-5)
    size = {len(jax.tree.leaves(cache.state)), *(leaf.shape for leaf in jax.tree.leaves(cache.state))}
    assert size == {len(jax.tree.leaves(cache.state)), (2, 12)}  # constant, whatever the length of the text


def test_embeddings_are_the_states(model):
    found = tj.embed(model, [[1, 2, 3]], layer=-1, pooling="last")
    states = tj.trace(model, np.asarray([[1, 2, 3]], np.int32)).residual
    assert states.shape == (3, 1, 3, 12)
    np.testing.assert_allclose(found[0], states[-1, 0, -1], atol=1e-6)


@pytest.fixture(scope="module")
def bundle():
    faster = RUN.replace(optim=OptimConfig(peak_lr=0.05, schedule="constant"))
    return tj.train(faster, texts=TEXTS, steps=80, mesh=ONE)


@pytest.mark.long
def test_training_text_scores_higher_than_its_reverse(bundle):
    text = "the cat sat on"
    scores = tj.score(bundle.model, [text, text[::-1]], tokenizer=bundle.tokenizer).totals
    assert scores[0] > scores[1] + 3
    pieces = list(tj.stream(bundle.model, "the ", tokenizer=bundle.tokenizer, max_new_tokens=8, sampling=GREEDY))
    assert "".join(pieces) == tj.generate(bundle.model, "the ", tokenizer=bundle.tokenizer, max_new_tokens=8,
                                          sampling=GREEDY).texts[0]
    assert tj.evaluate(bundle, TEXTS[:2])["bits_per_byte"] < 4


def test_a_bundle_is_saved_and_loaded(bundle, tmp_path):
    tj.save(tmp_path, bundle)
    loaded = tj.load(tmp_path)
    assert loaded.config == bundle.config and tree_digest(loaded.model) == tree_digest(bundle.model)


@pytest.mark.long
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    with pytest.raises(tj.training.Interrupted):
        tj.train(RUN, texts=TEXTS, workdir=tmp_path, mesh=ONE,
                 hooks=[lambda loop: loop.step == 2 and os.kill(os.getpid(), signal.SIGTERM)])
    resumed = tj.train(RUN, texts=TEXTS, workdir=tmp_path, mesh=ONE)
    assert tree_digest(resumed.model) == tree_digest(tj.train(RUN, texts=TEXTS, mesh=ONE).model)


@pytest.mark.long
def test_eight_devices_train_as_one_does():
    run = RUN.replace(model=RUN.model.replace(dropout=0.0), optim=OptimConfig(name="sgd", peak_lr=0.1))
    one, eight = (tj.train(run, texts=TEXTS, mesh=mesh).model for mesh in (
        ONE, make_mesh(MeshConfig(fsdp=2, tensor=2))))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_flops_count_each_matrix_once():
    config = RecurrentConfig(cell="lstm", vocab_size=100, model_dim=32, num_layers=2, tie_embeddings=False)
    matrices = 2 * 2 * 32 * 4 * 32 + 100 * 32
    assert tj.count_parameters(config) == matrices + 100 * 32 + 2 * 4 * 32 + 100
    assert flops_per_token(config, tj.count_parameters(config)) == 6 * (matrices + 2 * 4 * 32 + 100)


@pytest.mark.parametrize(("change", "message"), [
    (dict(cell="lstmm"), "cell='lstmm' is not one of rnn, lstm, gru; did you mean 'lstm'"),
    (dict(family="recurent"), "family='recurent' is not one of .*; did you mean 'recurrent'"),
    (dict(num_layers=0), "num_layers=0 must be a positive integer"),
    (dict(use_attention=False), "use_attention=False is for family='recurrent_pairs'"),
    (dict(num_heads=2), "RecurrentConfig has no field 'num_heads'"),
])
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RecurrentConfig().replace(**change)


def test_wrong_calls_are_refused(model):
    with pytest.raises(ValueError, match="token id 23 is out of range|23"):
        tj.forward(model, np.asarray([[23]], np.int32))
    with pytest.raises(ValueError, match="no intervention sites"):
        model(np.asarray([[1]], np.int32), intervene=lambda site, layer, value: value)
    with pytest.raises(ValueError, match="config.vocab_size is not set"):
        make_model(RecurrentConfig(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="is for models of family 'encoder'"):
        tj.train(dataclasses.replace(RUN, task="masked_language_model"), texts=TEXTS)
