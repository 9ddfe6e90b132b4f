"""Edges of a model: their exact effects compared with path patching and with whole runs, their
estimates with the exact effects, and the number of compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from random_biases import with_random_biases

import transformer_jax as tj
from tests.compiles import count_compiles
from transformer_jax.inspection import circuits
from transformer_jax.models.functional import make_model

V, T, L, N = 11, 5, 2, 2
BASE = tj.ModelConfig(vocab_size=V, max_len=T, num_layers=L, num_heads=N, model_dim=8, init_std=0.5, positions="rope",
                      tie_embeddings=False)
RNG = np.random.default_rng(0)
CLEAN, CORRUPTED = RNG.integers(0, V, (2, 2, T), np.int32)
FAMILIES = [{"num_heads": 4, "num_kv_heads": 2}, {"residual": "parallel", "norm": "rmsnorm"},
            {"family": "encoder", "norm_position": "post"},
            {"layer_pattern": (tj.config.LayerKind(sliding_window=2), tj.config.LayerKind())},
            {"moe": tj.config.ExpertConfig(), "use_bias": False, "norm": "rmsnorm"},
            {"family": "encoder_decoder", "norm_position": "post", "positions": "sinusoidal"}]


def metric(logits_BTV):
    return (logits_BTV[:, -1, 3] - logits_BTV[:, -1, 4]).sum()


@functools.cache
def make(**changes):
    """A model whose biases and norms are random too."""
    return with_random_biases(make_model(BASE.replace(**changes), key=jax.random.key(1)))


def runs(model):
    return ((CLEAN[:, :3], CLEAN), (CORRUPTED[:, :3], CORRUPTED)) if model.reads_sources else (CLEAN, CORRUPTED)


def logits(model, tokens):
    return tj.forward(model, *(tokens if isinstance(tokens, tuple) else (tokens,)))


@pytest.fixture(scope="module")
def measured():
    """A decoder with the exact effect and both estimates of every edge."""
    model = make()
    return {"model": model, "graph": circuits.edge_graph(model),
            "exact": np.asarray(circuits.edge_effects(model, CLEAN, CORRUPTED, metric)),
            "eap": np.asarray(circuits.edge_attribution(model, CLEAN, CORRUPTED, metric)),
            "eap_ig": np.asarray(circuits.edge_attribution(model, CLEAN, CORRUPTED, metric, steps=5))}


@pytest.mark.parametrize("changes", [*(pytest.param(changes, marks=pytest.mark.long) for changes in FAMILIES[:-1]),
                                     FAMILIES[-1]], ids=str)
@pytest.mark.long
def test_all_edges_are_the_clean_run_and_none_the_corrupted_run(changes):
    model = make(**changes)
    clean, corrupted = runs(model)
    measure = circuits.CircuitMetric(model, clean, corrupted, metric)
    allowed_VU = measure.graph.allowed_VU
    np.testing.assert_allclose(measure(allowed_VU), metric(logits(model, clean)), atol=2e-5)
    np.testing.assert_allclose(measure(np.zeros_like(allowed_VU)), metric(logits(model, corrupted)), atol=2e-5)


def test_an_edge_to_the_logits_or_to_a_head_has_the_effect_of_path_patching(measured):
    model, graph = measured["model"], measured["graph"]
    for sender in ((0, 1), (1, 0)):
        direct = tj.inspection.path_effect(model, CLEAN, CORRUPTED, metric, sender=sender)
        place = graph.edge(f"layers.{sender[0]}.heads.{sender[1]}", "logits")
        np.testing.assert_allclose(measured["exact"][place], direct, atol=1e-5)
    to_head = tj.inspection.path_effect(model, CLEAN, CORRUPTED, metric, sender=(0, 1), receiver=(1, 0))
    measure = circuits.CircuitMetric(model, CLEAN, CORRUPTED, metric)
    kept_VU = graph.allowed_VU.copy()
    for name in ("queries", "keys", "values"):
        kept_VU[graph.edge("layers.0.heads.1", f"layers.1.{name}.0")] = False
    assert abs(to_head) > 1e-3
    np.testing.assert_allclose(measure(kept_VU) - measure(graph.allowed_VU), to_head, atol=1e-5)


class Identity(nnx.Module):
    """In the place of a norm."""

    def __call__(self, x):
        return x


def linear_model():
    """A decoder in which everything is linear: uniform attention, no norms, and ReLUs that are
    always on."""
    model = jax.tree.map(lambda leaf: leaf, make(activation="relu"))
    blocks = model.stack.blocks
    blocks.attention_norm, blocks.mlp_norm, model.final_norm = Identity(), Identity(), None
    for linear in (blocks.attention.query, blocks.attention.key):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    blocks.mlp.up.bias[...] = jnp.full_like(blocks.mlp.up.bias[...], 20.0)
    blocks.mlp.down.bias[...] = -20.0 * blocks.mlp.down.kernel[...].sum(1)
    return model


def test_in_a_linear_model_the_estimates_are_exact():
    model = linear_model()
    exact = np.asarray(circuits.edge_effects(model, CLEAN, CORRUPTED, metric))
    assert np.abs(exact).max() > 0.1
    estimated = circuits.edge_attribution(model, CLEAN, CORRUPTED, metric, steps=3)
    np.testing.assert_allclose(estimated, exact, atol=2e-4 * np.abs(exact).max())
    grid = tj.inspection.patching_grid(model, CLEAN, CORRUPTED, metric, at="residual")
    estimated = circuits.attribution_patching(model, CLEAN, CORRUPTED, metric, at="residual")
    np.testing.assert_allclose(estimated, grid, atol=2e-4 * float(np.abs(grid).max()))


def test_the_estimates_rank_the_edges_like_the_exact_effects(measured):
    allowed = measured["graph"].allowed_VU
    assert (measured["eap"][~allowed] == 0).all()
    correlations = [scipy.stats.spearmanr(measured[name][allowed], measured["exact"][allowed]).statistic
                    for name in ("eap", "eap_ig")]
    assert min(correlations) > 0.6, correlations


def test_a_small_step_along_an_edge_has_the_estimated_effect(measured):
    from transformer_jax.inspection.circuits.edges import edited_logits

    model, graph = measured["model"], measured["graph"]
    program = jax.jit(lambda weights: metric(edited_logits(model, graph, [(CLEAN,), (CORRUPTED,)], {}, weights)))
    place = graph.edge("layers.0.heads.1", "layers.1.keys.0")
    weights = np.zeros(graph.allowed_VU.shape, np.float32)
    weights[place] = 0.02
    np.testing.assert_allclose((program(weights) - program(-weights)) / 0.04, measured["eap"][place], rtol=0.02)


@pytest.mark.long
def test_nodes_of_every_kind(measured):
    model = measured["model"]
    heads = circuits.attribution_patching(model, CLEAN, CORRUPTED, metric)
    neurons = circuits.attribution_patching(model, CLEAN, CORRUPTED, metric, at="neurons", steps=2)
    assert heads.shape == (L, T, N) and neurons.shape == (L, T, model.config.mlp_dim)
    whole = circuits.attribution_patching(model, CLEAN, CORRUPTED, metric, at="attention_output")
    np.testing.assert_allclose(heads.sum(-1), whole, atol=1e-5)


@pytest.mark.long
def test_nodes_of_an_encoder_decoder():
    pair = make(**FAMILIES[-1])
    assert circuits.attribution_patching(pair, *runs(pair), metric, kind="cross").shape == (L, T, N)
    assert circuits.attribution_patching(pair, *runs(pair), metric, kind="encoder").shape == (L, 3, N)


def test_a_sweep_compiles_once(measured):
    model, graph = make(num_layers=3), None
    with count_compiles() as compiles:
        measure = circuits.CircuitMetric(model, CLEAN, CORRUPTED, metric)
        graph = measure.graph
        measure(graph.allowed_VU)
        first = len(compiles)
        circuits.edge_effects(model, CLEAN, CORRUPTED, metric)
        scores = RNG.normal(size=graph.allowed_VU.shape)
        circuits.faithfulness_curve(measure, scores, sizes=[5, 50], draws=1)
    assert first == 1 and len(compiles) == first
    with count_compiles() as compiles:
        circuits.edge_attribution(model, CLEAN, CORRUPTED, metric, steps=5)
        circuits.edge_attribution(model, CORRUPTED, CLEAN, metric, steps=5)
    assert len(compiles) == 1


def test_edges_without_effect_are_removed_and_change_nothing(measured):
    graph = measured["graph"]
    measure = circuits.CircuitMetric(measured["model"], CLEAN, CORRUPTED, metric)
    chosen = circuits.random_edges(graph, graph.num_edges // 2, np.random.default_rng(3))
    connected = graph.connected(chosen)
    assert 0 < connected.sum() < chosen.sum()
    np.testing.assert_allclose(measure(connected), measure(chosen), atol=1e-5)
    dangling = np.zeros_like(chosen)
    dangling[graph.edge("layers.0.heads.0", "layers.1.queries.0")] = True
    assert not graph.connected(dangling).any()


def test_scores_of_circuits(measured):
    measure = circuits.CircuitMetric(measured["model"], CLEAN, CORRUPTED, metric)
    graph = measure.graph
    everything = graph.allowed_VU
    assert circuits.faithfulness(measure, everything) == 1 and circuits.faithfulness(measure, ~everything) == 0
    curve = circuits.faithfulness_curve(measure, measured["exact"], sizes=[10, graph.num_edges], draws=2)
    np.testing.assert_allclose(curve.circuit[-1], 1, atol=1e-5)
    assert curve.random.shape == curve.degree_matched.shape == (2, 2)
    kept = circuits.prune_greedily(measure, 0.05)
    assert kept.sum() < graph.num_edges and abs(circuits.faithfulness(measure, kept) - 1) < 0.5
    losses = circuits.minimality(measure, kept)
    place = tuple(np.argwhere(kept)[0])
    without = kept.copy()
    without[place] = False
    np.testing.assert_allclose(
        losses[place], circuits.faithfulness(measure, kept) - circuits.faithfulness(measure, without), atol=1e-6)
    assert np.isnan(losses[~kept]).all()
    both = circuits.completeness(measure, everything, draws=2)
    np.testing.assert_array_equal(both[:, 0], both[:, 1])
    matched = circuits.degree_matched_edges(graph, kept, np.random.default_rng(0))
    np.testing.assert_array_equal(matched.sum(1), kept.sum(1))


def test_wrong_arguments(measured):
    model, graph = measured["model"], measured["graph"]
    measure = circuits.CircuitMetric(model, CLEAN, CORRUPTED, metric)
    for wrong, message in ((lambda: graph.edge("layers.1.heads.0", "layers.0.keys.0"), "does not read"),
                           (lambda: graph.edge("layers.9.heads.0", "logits"), "not one of the senders"),
                           (lambda: circuits.top_edges(graph, measured["eap"], 10_000), "num_edges=10000"),
                           (lambda: circuits.edge_attribution(model, CLEAN, CORRUPTED, metric, steps=-1), "steps=-1"),
                           (lambda: circuits.edge_attribution(model, CLEAN, CLEAN[:, 1:], metric), "differ in shape"),
                           (lambda: circuits.edge_graph(make(norm_position="both")), "norm_position='both'"),
                           (lambda: measure(np.ones((2, 2))), r"shape \(2, 2\)"),
                           (lambda: circuits.attribution_patching(model, CLEAN, CORRUPTED, metric, at="keys"), "at="),
                           (lambda: circuits.faithfulness(circuits.CircuitMetric(model, CLEAN, CLEAN, metric),
                                                          graph.allowed_VU), "same metric")):
        with pytest.raises(ValueError, match=message):
            wrong()
