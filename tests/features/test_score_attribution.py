"""Attention scores as sums over pairs of nodes: the parts are those of a float64 NumPy formula."""

import jax
import numpy as np
import pytest

import transformer_jax as tj
from tests.features.test_attribution_graph import CONFIG, TEXT, cross_layer, randomized, transcoder
from transformer_jax.features.linearised import pulled_to_scores

LAYER, HEAD, QUERY, KEY = 2, 3, 5, 1


def float64(value):
    return np.asarray(value[...], np.float64)


def rotated(vectors, positions, base=10_000.0):
    """RoPE of vectors ``[..., T, H]`` at positions ``[T]``."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None] * base ** (-np.arange(half) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                           second * np.cos(angles) + first * np.sin(angles)], -1)


class Linear64:
    """A decoder with LayerNorm whose patterns and scales of norms are frozen, in float64 NumPy."""

    def __init__(self, model, tokens):
        self.blocks, config = model.stack.blocks, model.config
        found = tj.trace(model, tokens)
        self.residual = float64(found.residual)[:, 0]
        self.pattern = float64(found.attention())[:, 0]
        self.scales = 1 / np.sqrt(self.residual.var(-1, keepdims=True) + config.norm_epsilon)
        self.shape, self.group, self.rope = (config.num_heads, config.head_dim), 2, config.positions == "rope"

    def read(self, layer, stream):
        norm = self.blocks.attention_norm
        return (stream - stream.mean(-1, keepdims=True)) * self.scales[layer] * float64(norm.scale)[layer]

    def heads(self, layer, name, read):
        kernel = float64(getattr(self.blocks.attention, name).kernel)[layer]
        return (read @ kernel).reshape(*read.shape[:-1], -1, self.shape[1])

    def biases(self, layer):
        """What the biases of attention and of both norms add to queries, keys and the stream."""
        attention, norm = self.blocks.attention, float64(self.blocks.attention_norm.bias)[layer]
        return {name: norm @ float64(getattr(attention, name).kernel)[layer] + float64(getattr(attention, name).bias)[
            layer] for name in ("query", "key", "value")} | {"output": float64(attention.output.bias)[layer]}

    def attended(self, layer, stream, biases=False):
        """What attention adds to the stream."""
        values = self.heads(layer, "value", self.read(layer, stream))
        if biases:
            values = values + self.biases(layer)["value"].reshape(-1, self.shape[1])
        values = np.repeat(values, self.group, axis=-2)
        joined = np.einsum("nts,...snh->...tnh", self.pattern[layer], values).reshape(*stream.shape[:-1], -1)
        added = joined @ float64(self.blocks.attention.output.kernel)[layer]
        return added + self.biases(layer)["output"] if biases else added

    def vectors(self, stream, biases=False):
        """The query at QUERY and the key at KEY of the head."""
        found = []
        for name, place, head in (("query", QUERY, HEAD), ("key", KEY, HEAD // self.group)):
            vectors = self.heads(LAYER, name, self.read(LAYER, stream))
            if biases:
                vectors = vectors + self.biases(LAYER)[name].reshape(-1, self.shape[1])
            vectors = vectors[..., head, :]
            vectors = rotated(vectors, np.arange(len(TEXT))) if self.rope else vectors
            found.append(vectors[..., place, :])
        return found


@pytest.mark.parametrize(("positions", "kind"), [("rope", "transcoders"), ("alibi", "transcoders"),
                                                 ("rope", "cross_layer")])
@pytest.mark.long
def test_the_parts_are_those_of_the_formula_and_add_up_to_the_score(positions, kind):
    model = randomized(tj.Decoder(CONFIG.replace(positions=positions), key=jax.random.key(0)), 7, 0.1)
    made = cross_layer() if kind == "cross_layer" else [transcoder(0), transcoder(1)]
    graph = tj.features.attribution_graph(model, made, TEXT, num_logits=1)
    found = tj.features.score_attribution(model, made, graph, LAYER, HEAD, QUERY, KEY)
    linear, trace = Linear64(model, np.array([TEXT])), tj.trace(model, np.array([TEXT]))
    x = float64(trace["mlp_input"])[:, 0]
    outputs = np.zeros((3, len(TEXT), 16))  # the biases of the transcoders
    written = {}
    for layer in range(2):
        if kind == "cross_layer":
            features = float64(made.encode(trace["mlp_input"]))[layer, 0]
            decoders = [float64(made.decoder[layer])[:, target] / made.config.target_scales[layer + target]
                        for target in range(2 - layer)]
            outputs[layer] = float64(made.decoder_bias)[layer] / made.config.target_scales[layer]
        else:
            features, decoders = float64(made[layer].encode(trace["mlp_input"][layer, 0])), [
                float64(made[layer].decoder) / 2.0]
            outputs[layer] = float64(made[layer].decoder_bias) / 2.0
        for place, number in np.argwhere(features):
            written["feature", layer, place, number] = [features[place, number] * each[number] for each in decoders]
    errors = float64(trace["mlp_output"])[:, 0] - outputs
    for (_, layer, place, _), vectors in written.items():
        for target, vector in enumerate(vectors):
            errors[layer + target, place] -= vector
    assert x.shape == (3, 6, 16) and {node[:4] for node in found.nodes if node.kind == "feature"} == set(written)

    streams = np.zeros((len(found.nodes), len(TEXT), 16))  # what each node and the biases add to the stream
    for index, node in enumerate(found.nodes):
        if node.kind == "embedding":
            streams[index, node.position] = linear.residual[0, node.position]
    for layer in range(LAYER):
        streams[:-1] += linear.attended(layer, streams[:-1])
        streams[-1] += linear.attended(layer, streams[-1], biases=True) + outputs[layer]
        for index, node in enumerate(found.nodes):
            if node.kind == "error" and node.layer == layer:
                streams[index, node.position] += errors[layer, node.position]
            elif node.kind == "feature" and 0 <= layer - node.layer < len(written[node[:4]]):
                streams[index, node.position] += written[node[:4]][layer - node.layer]
    np.testing.assert_allclose(streams.sum(0), linear.residual[LAYER], atol=1e-4)
    queries, keys = linear.vectors(streams)
    bias_query, bias_key = linear.vectors(streams[-1], biases=True)
    queries[-1], keys[-1] = bias_query, bias_key
    np.testing.assert_allclose(found.parts, queries @ keys.T / 2.0, atol=1e-4)
    slope = 2.0 ** (-8 * (HEAD + 1) / 4) if positions == "alibi" else 0.0
    assert found.position_bias == pytest.approx(-slope * (QUERY - KEY))
    score = float(trace.scores(LAYER, HEAD, QUERY)[0, KEY])
    assert found.score == pytest.approx(score)
    assert found.parts.sum() + found.position_bias == pytest.approx(score, abs=1e-4)
    assert found.weight == pytest.approx(float(trace.attention(LAYER, HEAD, QUERY)[0, KEY]))
    best = found.largest(3)
    assert [abs(pair.value) for pair in best] == sorted(np.abs(found.parts).ravel())[:-4:-1]
    assert found.parts[found.nodes.index(best[0].query), found.nodes.index(best[0].key)] == best[0].value


def test_pruned_graphs_have_sources_too_and_one_program_serves_all_heads():
    model = randomized(tj.Decoder(CONFIG, key=jax.random.key(0)), 7, 0.1)
    made = [transcoder(0), transcoder(1)]
    graph = tj.features.attribution_graph(model, made, TEXT, num_logits=1).pruned(0.3, 0.9)
    pulled_to_scores.clear_cache()
    for place in ((2, 0, 5, 5), (1, 3, 4, 0), (0, 1, -1, 2)):
        found = tj.features.score_attribution(model, made, graph, *place)
        assert found.parts.sum() == pytest.approx(found.score, abs=1e-4)
        assert all(node.layer < place[0] for node in found.nodes)
    assert pulled_to_scores._cache_size() == 1
    for place, message in (((3, 0, 5, 5), "layer=3 is not from 0 to 2"), ((0, 4, 5, 5), "head=4 is not from 0 to 3"),
                           ((0, 0, 6, 5), "query=6 is not a position"), ((0, 0, 1, 2), "may not attend to the key")):
        with pytest.raises(ValueError, match=message):
            tj.features.score_attribution(model, made, graph, *place)


def test_links_are_the_changes_of_a_logit_without_one_weight():
    """Of the last layer, where nothing follows that could react but the frozen norm."""
    model = randomized(tj.Decoder(CONFIG, key=jax.random.key(0)), 7, 0.1)
    graph = tj.features.attribution_graph(model, [transcoder(0)], TEXT, num_logits=1)
    links = tj.features.attention_links(model, [transcoder(0)], graph, graph.logits[0], count=1000)
    assert [abs(link.effect) for link in links] == sorted((abs(link.effect) for link in links), reverse=True)
    trace = tj.trace(model, np.array([TEXT]))
    final, norm = float64(trace.final)[0, -1], model.final_norm
    scale = float64(norm.scale) / np.sqrt(final.var() + model.config.norm_epsilon)
    unembedding = float64(model.embeddings.unembedding_VD)[graph.nodes[-1].number] * scale
    kernel = float64(model.stack.blocks.attention.output.kernel)[2].reshape(4, 4, 16)
    last = {link[:4]: link for link in links if link.layer == 2}
    assert all(link.query == 5 for link in last.values()) and len(last) == 4 * 6
    for head in range(4):
        for key in range(6):
            written = float64(trace.values)[2, 0, key, head // 2] @ kernel[head]
            weight = float(trace.attention(2, head, 5)[0, key])
            expected = weight * (written - written.mean()) @ unembedding
            assert last[2, head, 5, key].effect == pytest.approx(expected, abs=1e-5)
            assert last[2, head, 5, key].weight == pytest.approx(weight)
    feature = next(place for place, node in enumerate(graph.nodes) if node.kind == "feature")
    assert {link.layer for link in tj.features.attention_links(model, [transcoder(0)], graph, feature)} == {0}
    with pytest.raises(ValueError, match="only features and logits have causes"):
        tj.features.attention_links(model, [transcoder(0)], graph, 0)
