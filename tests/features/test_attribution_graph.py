"""Attribution graphs: edges add up to the values of the model, and predictions match what a removed
feature changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from tests.compiles import count_compiles
from transformer_jax.config import CrossLayerTranscoderConfig, SparseAutoencoderConfig
from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.features.linearised import pulled_back
from transformer_jax.features.source_nodes import SourceNodes

CONFIG = tj.ModelConfig(vocab_size=19, max_len=12, num_layers=3, num_heads=4, num_kv_heads=2, model_dim=16, mlp_dim=24,
                        positions="rope", use_output_bias=True)
TEXT = [3, 9, 4, 4, 17, 1]


def randomized(tree, seed, scale):
    """The tree with noise added to every weight, so that no bias is zero."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [leaf + scale * jax.random.normal(key, leaf.shape)
                                          for key, leaf in zip(keys, leaves, strict=True)])


def transcoder(layer, activation="topk"):
    config = SparseAutoencoderConfig(
        site=f"layers.{layer}.mlp_input", target=f"layers.{layer}.mlp_output", input_dim=16, num_features=24, k=4,
        activation=activation, subtract_bias=False, scale=0.5, target_scale=2.0)
    made = randomized(SparseAutoencoder(config, key=jax.random.key(layer)), layer, 0.1)
    return made


def cross_layer(activation="topk"):
    config = CrossLayerTranscoderConfig(
        num_layers=3, input_dim=16, num_features=24, k=3, activation=activation, scales=(0.5, 1.0, 2.0),
        target_scales=(2.0, 4.0, 1.0))
    return randomized(tj.features.CrossLayerTranscoder(config, key=jax.random.key(0)), 5, 0.1)


@pytest.fixture(scope="module")
def model():
    return randomized(tj.Decoder(CONFIG, key=jax.random.key(0)), 7, 0.1)


@pytest.fixture(scope="module")
def graph(model):
    return tj.features.attribution_graph(model, [transcoder(0), transcoder(2)], TEXT, num_logits=2)


def test_edges_and_biases_add_up_to_logits_and_features(model, graph):
    logits = np.asarray(tj.forward(model, np.array([TEXT]))[0, -1])
    assert [node.number for node in (graph.nodes[place] for place in graph.logits)] == np.argsort(-logits)[:2].tolist()
    kinds = {node.kind for node in graph.nodes}
    assert kinds == {"embedding", "error", "feature", "logit"}
    for place, node in enumerate(graph.nodes):
        if node.kind in ("feature", "logit"):
            expected = node.value if node.kind == "feature" else logits[node.number]
            np.testing.assert_allclose(graph.edges[place].sum() + graph.bias[place], expected, atol=1e-4)
            assert all(graph.nodes[source].layer < node.layer and graph.nodes[source].position <= node.position
                       for source in np.flatnonzero(graph.edges[place]))
        else:
            assert not graph.edges[place].any()
    assert np.abs(graph.bias[list(graph.logits)]).min() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"positions": "learned", "num_kv_heads": None, "residual": "parallel"},
                                     {"positions": "alibi", "norm": "rmsnorm", "activation": "swiglu"},
                                     {"positions": "sinusoidal", "norm_position": "post"}])
def test_they_add_up_in_other_decoders_too(changes):
    model = randomized(tj.Decoder(CONFIG.replace(**changes), key=jax.random.key(0)), 7, 0.1)
    graph = tj.features.attribution_graph(model, [transcoder(1, "relu")], TEXT, num_logits=1, max_features=5)
    assert sum(node.kind == "feature" for node in graph.nodes) == 5
    for place, node in enumerate(graph.nodes):
        if node.kind in ("feature", "logit"):
            np.testing.assert_allclose(graph.edges[place].sum() + graph.bias[place], node.value, atol=1e-4)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_edges_of_a_cross_layer_transcoder_add_up(model, activation):
    made = cross_layer(activation)
    graph = tj.features.attribution_graph(model, made, TEXT, num_logits=2, max_features=60)
    logits = np.asarray(tj.forward(model, np.array([TEXT]))[0, -1])
    encoded = np.asarray(made.encode(tj.trace(model, np.array([TEXT]))["mlp_input"]))[:, 0]
    assert {node.layer for node in graph.nodes if node.kind == "feature"} == {0, 1, 2}
    for place, node in enumerate(graph.nodes):
        if node.kind == "feature":
            assert node.value == pytest.approx(encoded[node.layer, node.position, node.number], abs=1e-5)
        if node.kind in ("feature", "logit"):
            expected = node.value if node.kind == "feature" else logits[node.number]
            np.testing.assert_allclose(graph.edges[place].sum() + graph.bias[place], expected, atol=1e-4)
            assert all(graph.nodes[source].layer < node.layer and graph.nodes[source].position <= node.position
                       for source in np.flatnonzero(graph.edges[place]))


def test_an_edge_of_a_cross_layer_feature_is_what_it_writes_to_all_layers(model):
    """To a logit at the same position: directly, and through attention if its value is read."""
    made = cross_layer()
    graph = tj.features.attribution_graph(model, made, TEXT, num_logits=1)
    final = np.asarray(tj.trace(model, np.array([TEXT])).final[0, -1], np.float64)
    scale = np.asarray(model.final_norm.scale[...], np.float64) / np.sqrt(final.var() + model.config.norm_epsilon)
    unembedding = np.asarray(model.embeddings.unembedding_VD[graph.nodes[-1].number])
    checked = 0
    for source, node in enumerate(graph.nodes):
        if node.kind == "feature" and node.layer == 2 and node.position == 5:
            written = node.value * np.asarray(made.decoder[2][...], np.float64)[node.number, 0]
            expected = (written - written.mean()) * scale @ unembedding
            assert graph.edges[-1, source] == pytest.approx(expected, abs=1e-5)
            checked += 1
    assert checked == 3
    # What a feature of layer 0 writes to the layers 1 and 2 is a part of its edge: without attention
    # in these layers, the edge is the sum of three direct effects.
    still = jax.tree.map(lambda leaf: leaf, model)
    still.stack.blocks.attention.value.kernel.set_value(still.stack.blocks.attention.value.kernel[...] * 0)
    graph = tj.features.attribution_graph(still, made, TEXT, num_logits=1)
    final = np.asarray(tj.trace(still, np.array([TEXT])).final[0, -1], np.float64)
    scale = np.asarray(still.final_norm.scale[...], np.float64) / np.sqrt(final.var() + still.config.norm_epsilon)
    unembedding = np.asarray(still.embeddings.unembedding_VD[graph.nodes[-1].number])
    for source, node in enumerate(graph.nodes):
        if node.kind == "feature" and node.layer == 0 and node.position == 5:
            written = node.value * (np.asarray(made.decoder[0][...], np.float64)[node.number] / np.array(
                [[2.0], [4.0], [1.0]])).sum(0)
            assert graph.edges[-1, source] == pytest.approx((written - written.mean()) * scale @ unembedding, abs=1e-5)


def test_removing_a_cross_layer_feature_subtracts_what_it_writes_and_holds_the_rest(model):
    made = cross_layer("relu")
    graph = tj.features.attribution_graph(model, made, TEXT, num_logits=2)
    logits, tokens = list(graph.logits), np.array([TEXT])
    features = [place for place, node in enumerate(graph.nodes) if node.kind == "feature" and node.position == 5]
    place = next(place for place in features if graph.nodes[place].layer == 1)
    node, outputs = graph.nodes[place], np.array(tj.trace(model, tokens)["mlp_output"])
    outputs[1:, 0, 5] -= node.value * np.asarray(made.decoder[1][...])[node.number] / np.array([[4.0], [1.0]])
    edits = [tj.inspection.patch("mlp_output", layer, outputs[layer]) for layer in (1, 2)]
    changed = tj.forward(model, tokens, intervene=tj.inspection.together(*edits)) - tj.forward(model, tokens)
    expected = [float(changed[0, -1, graph.nodes[logit].number]) for logit in logits]
    np.testing.assert_allclose(tj.features.measured_without(model, made, graph, place)[logits], expected, atol=1e-5)
    # In the last layer only the final norm reacts, and little to a small feature: the graph is right.
    place = min((place for place in features if graph.nodes[place].layer == 2),
                key=lambda place: graph.nodes[place].value)
    direct = -graph.edges[logits, place]
    measured = tj.features.measured_without(model, made, graph, place)[logits]
    np.testing.assert_allclose(measured, direct, atol=0.15 * np.abs(direct).max() + 1e-4)


def test_one_program_serves_all_edges_and_all_removals(model):
    made = cross_layer()
    pulled_back.clear_cache()
    graph = tj.features.attribution_graph(model, made, TEXT, num_logits=2)
    tj.features.attribution_graph(model, made, TEXT[::-1], num_logits=1, max_features=7)
    assert pulled_back._cache_size() == 1
    features = [place for place, node in enumerate(graph.nodes) if node.kind == "feature"]
    tj.features.measured_without(model, made, graph, features[0])
    with count_compiles() as compiles:
        for place in features[1::7]:
            tj.features.measured_without(model, made, graph, place)
    assert compiles == []


def test_memory_does_not_grow_with_the_number_of_edges(model, monkeypatch):
    """The gradients of a few functions are held at a time."""
    held, original = [], SourceNodes.contributions

    def contributions(self, of_outputs, of_embeddings):
        held.append(of_outputs.shape)
        return original(self, of_outputs, of_embeddings)

    monkeypatch.setattr(SourceNodes, "contributions", contributions)
    graph = tj.features.attribution_graph(model, cross_layer("relu"), TEXT, num_logits=1)
    assert len(graph.nodes) > 100 and len(held) > 5 and max(held) == (16, 3, 6, 16)


def test_an_edge_of_the_last_layer_is_the_direct_effect(model, graph):
    made = transcoder(2)
    final = np.asarray(tj.trace(model, np.array([TEXT])).final[0, -1], np.float64)
    scale = np.asarray(model.final_norm.scale[...], np.float64) / np.sqrt(final.var() + model.config.norm_epsilon)
    checked = 0
    for source, node in enumerate(graph.nodes):
        if node.kind != "feature" or node.layer != 2 or node.position != 5:
            continue
        written = node.value * np.asarray(made.decoder[...][node.number], np.float64) / 2.0
        for target in graph.logits:
            unembedding = np.asarray(model.embeddings.unembedding_VD[graph.nodes[target].number])
            np.testing.assert_allclose(graph.edges[target, source], (written - written.mean()) * scale @ unembedding,
                                       atol=1e-5)
            checked += 1
    assert checked >= 4


def test_influence_follows_all_paths_and_pruning_keeps_the_most(graph):
    shares = np.abs(graph.edges)
    shares = shares / np.maximum(shares.sum(1, keepdims=True), 1e-30)
    start = np.zeros(len(shares))
    start[list(graph.logits)] = graph.probabilities
    total, step = start.copy(), start
    for _ in range(8):
        step = step @ shares
        total += step
    np.testing.assert_allclose(graph.influence(), total, atol=1e-10)
    small = graph.pruned(0.5, 0.9)
    assert len(small.nodes) < len(graph.nodes) and small.nodes[-2:] == graph.nodes[-2:]
    inner = {node: value for node, value in zip(graph.nodes, total, strict=True) if node.kind in ("feature", "error")}
    kept = [inner[node] for node in small.nodes if node in inner]
    assert sum(kept) >= 0.5 * sum(inner.values()) and min(kept) >= sorted(inner.values())[-len(kept)]
    assert 0 < (small.edges != 0).sum() < (graph.edges != 0).sum()
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        graph.pruned(2.0)


def test_a_removed_feature_changes_what_the_graph_predicts(model, graph):
    """A small feature, so that norms and attention hardly change; layer 1 has no transcoder, so only
    the direct effects on layer 2 are predicted exactly."""
    made = [transcoder(0), transcoder(2)]
    last = [place for place, node in enumerate(graph.nodes) if node.kind == "feature" and node.layer == 2
            and node.position == 5]
    place = min(last, key=lambda place: graph.nodes[place].value)
    predicted, measured = graph.predicted_without(place), tj.features.measured_without(model, made, graph, place)
    np.testing.assert_allclose(predicted[place], -graph.nodes[place].value)
    logits = list(graph.logits)
    np.testing.assert_allclose(predicted[logits], -graph.edges[logits, place], rtol=1e-6)
    np.testing.assert_allclose(measured[logits], predicted[logits], atol=0.15 * np.abs(predicted[logits]).max() + 0.02)
    with pytest.raises(ValueError, match="only features can be removed"):
        graph.predicted_without(0)


def test_what_has_no_graph_is_refused(model):
    with pytest.raises(ValueError, match="one transcoder for each feed-forward layer"):
        tj.features.attribution_graph(model, [transcoder(0), transcoder(0)], TEXT)
    with pytest.raises(ValueError, match="needs a decoder"):
        tj.features.attribution_graph(tj.Encoder(CONFIG.replace(
            family="encoder", positions="learned", use_output_bias=False), key=jax.random.key(0)), [], TEXT)
    assert float(jnp.abs(model.final_norm.bias[...]).max()) > 0


def test_targets_choose_the_logits(model, graph):
    chosen = [7, *(graph.nodes[place].number for place in graph.logits)][:2]
    of_targets = tj.features.attribution_graph(model, [transcoder(0), transcoder(2)], TEXT, targets=chosen)
    logits = np.asarray(tj.forward(model, np.array([TEXT]))[0, -1], np.float64)
    assert [of_targets.nodes[place].number for place in of_targets.logits] == chosen
    for place, token in zip(of_targets.logits, chosen, strict=True):
        np.testing.assert_allclose(of_targets.edges[place].sum() + of_targets.bias[place], logits[token], atol=1e-4)
    np.testing.assert_allclose(of_targets.probabilities, (np.exp(logits) / np.exp(logits).sum())[chosen], rtol=1e-5)
    for wrong in ([], [3, 3], [19], [-1], [0.5], 3):
        with pytest.raises(ValueError, match="targets=.* must be different token ids from 0 to 18"):
            tj.features.attribution_graph(model, [transcoder(0)], TEXT, targets=wrong)


def test_features_removed_together(model, graph):
    """Features of the last layer do not change each other, so that their predicted effects on the
    logits add up; what is measured is one patch of the sum of what they write."""
    made = transcoder(2)
    places = [place for place, node in enumerate(graph.nodes)
              if node.kind == "feature" and (node.layer, node.position) == (2, 5)][:3]
    assert len(places) == 3
    logits = list(graph.logits)
    alone = sum(graph.predicted_without(place)[logits] for place in places)
    np.testing.assert_allclose(graph.predicted_without(places)[logits], alone, atol=1e-6)
    assert graph.predicted_without(places)[places] == pytest.approx([-graph.nodes[place].value for place in places])

    outputs = np.array(tj.trace(model, np.array([TEXT]))["mlp_output"][2])
    for place in places:
        node = graph.nodes[place]
        outputs[0, 5] -= node.value * np.asarray(made.decoder[...])[node.number] / 2.0
    edit = tj.inspection.patch("mlp_output", 2, outputs)
    changed = tj.forward(model, np.array([TEXT]), intervene=edit) - tj.forward(model, np.array([TEXT]))
    expected = [float(changed[0, -1, graph.nodes[logit].number]) for logit in logits]
    measured = tj.features.measured_without(model, [transcoder(0), made], graph, places)
    np.testing.assert_allclose(measured[logits], expected, atol=1e-5)
    for remove in (graph.predicted_without,
                   lambda places: tj.features.measured_without(model, [transcoder(0), made], graph, places)):
        with pytest.raises(ValueError, match="is of kind 'logit', but only features can be removed"):
            remove([places[0], logits[0]])
        for wrong in (-1, len(graph.nodes), 1.5):
            with pytest.raises(ValueError, match=f"{wrong} is not the place of a node; expected a whole number from 0"):
                remove([places[0], wrong])
