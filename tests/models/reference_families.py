"""Encoders and encoder-decoders in plain float64 NumPy, one sequence at a time, written from the
papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from reference_decoder import ACTIVATIONS, array, linear, norm, rotate, sinusoids, slopes

from transformer_jax.models.functional import make_model


def random_model(config, seed=0):
    """A model of the config's family with every weight random, those of norms around 1."""
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        mean = 1.0 if ".scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(weight, jax.eval_shape(
        lambda key: make_model(config, key=key), jax.random.key(0)))


def _norm(module, layer, x, c):
    return norm(module, layer, x, c.norm, c.norm_epsilon)


def _embed(model, tokens, types, positions, own=None):
    """``own`` is what has the positions and the norm of this side."""
    c, e = model.config, model.embeddings
    own = e if own is None else own
    x = array(e.token)[tokens] * (math.sqrt(c.model_dim) if c.scale_embeddings else 1.0)
    if c.positions == "learned":
        x = x + array(own.position)[positions + c.position_offset]
    if c.positions == "sinusoidal":
        x = x + sinusoids(positions, c.model_dim)
    if c.positions == "sinusoidal_halves":
        waves = sinusoids(positions, c.model_dim)
        x = x + np.concatenate([waves[:, 0::2], waves[:, 1::2]], axis=1)
    if c.positions == "sinusoidal_fairseq":
        half = c.model_dim // 2
        angles = (positions + c.position_offset)[:, None] * 10_000.0 ** (-np.arange(half) / (half - 1))
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    if c.num_token_types:
        x = x + array(e.token_type)[types]
    x = _norm(own.norm, None, x, c) if c.use_embedding_norm else x
    return x if c.embedding_dim == c.model_dim else linear(e.projection, None, x)


def relative_bias(table, query, key, num_buckets, max_distance, causal):
    """The bias ``[N]`` of T5 for one query and one key, by the words of Raffel et al. (2020),
    section 2.1."""
    first, distance = 0, max(query - key, 0)
    if not causal:
        num_buckets //= 2
        first, distance = (num_buckets if key > query else 0), abs(query - key)
    single = num_buckets // 2
    if distance < single:
        return table[first + distance]
    steps = (num_buckets - single) * math.log(distance / single, max_distance / single)
    return table[first + min(single + math.floor(steps + 1e-9), num_buckets - 1)]


def _attend(module, layer, x, memory, c, allowed, positions, bias=0.0):
    """Returns what attention adds, and its maps ``[N, T, S]``; ``positions`` is ``None`` in
    attention to a memory."""
    bias = np.broadcast_to(bias, (c.num_heads, len(x), len(memory)))
    q = linear(module.query, layer, x).reshape(len(x), c.num_heads, c.head_dim)
    k = linear(module.key, layer, memory).reshape(len(memory), c.num_kv_heads, c.head_dim)
    v = linear(module.value, layer, memory).reshape(len(memory), c.num_kv_heads, c.head_dim)
    if c.use_qk_norm:
        q = norm(module.query_norm, layer, q, "rmsnorm", c.norm_epsilon)
        k = norm(module.key_norm, layer, k, "rmsnorm", c.norm_epsilon)
    if c.positions == "rope" and positions is not None:
        q, k = rotate(q, positions, c.rope_base), rotate(k, positions, c.rope_base)
    maps = np.zeros((c.num_heads, len(x), len(memory)))
    heads = np.zeros(q.shape)
    for n in range(c.num_heads):
        shared = n // (c.num_heads // c.num_kv_heads)
        scale = 1 / math.sqrt(c.head_dim) if c.attention_scale is None else c.attention_scale
        scores = q[:, n] @ k[:, shared].T * scale + bias[n]
        if c.positions == "alibi" and positions is not None:
            scores = scores - slopes(c.num_heads)[n] * np.abs(positions[:, None] - positions)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
        maps[n] = weights / weights.sum(-1, keepdims=True)
        heads[:, n] = maps[n] @ v[:, shared]
    return linear(module.output, layer, heads.reshape(len(x), -1)), maps


def _feed_forward(mlp, layer, x, c):
    up = linear(mlp.up, layer, x)
    gates = {"swiglu": "silu", "geglu": "gelu_tanh", "geglu_erf": "gelu"}
    activations = ACTIVATIONS | {"silu": lambda x: x / (1 + np.exp(-x))}
    if c.activation in gates:
        return linear(mlp.down, layer, activations[gates[c.activation]](linear(mlp.gate, layer, x)) * up)
    return linear(mlp.down, layer, activations[c.activation](up))


def _stack(c, stack, x, *, causal, memory=None, positions=None):
    """The last stream, the maps of self-attention ``[L, N, T, T]`` and those of attention to the
    memory."""
    positions = np.arange(len(x)) if positions is None else positions
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    everywhere = distance >= 0 if causal else np.full(distance.shape, True)
    kinds = c.of_places()
    blocks, maps, cross_maps, bias = stack.blocks, [], [], 0.0
    if c.positions == "relative":
        table = array(stack.relative.table)
        bias = np.array([[relative_bias(table, query, key, c.relative_buckets, c.relative_max_distance, causal)
                          for key in range(len(x))] for query in range(len(x))]).transpose(2, 0, 1)

    def sub_layer(x, norm_module, layer, function):
        if c.norm_position == "pre":
            skips = norm_module is blocks.attention_norm and layer == 0 and not c.use_first_norm
            return x + function(x if skips else _norm(norm_module, layer, x, c))
        return _norm(norm_module, layer, x + function(x), c)

    for layer in [0] * stack.num_layers if c.shared_layers else range(stack.num_layers):
        def self_attention(h, layer=layer):
            kind = kinds[layer % len(kinds)]
            allowed = everywhere & (np.abs(distance) < (kind.sliding_window or len(h)))
            out, attention = _attend(blocks.attention, layer, h, h, kind, allowed, positions, bias)
            maps.append(attention)
            return out

        def cross_attention(h, layer=layer):
            out, attention = _attend(blocks.cross_attention, layer, h, memory, c, True, None)
            cross_maps.append(attention)
            return out

        x = sub_layer(x, blocks.attention_norm, layer, self_attention)
        if memory is not None:
            x = sub_layer(x, blocks.cross_norm, layer, cross_attention)
        x = sub_layer(x, blocks.mlp_norm, layer, lambda h, layer=layer: _feed_forward(blocks.mlp, layer, h, c))
    return x, np.array(maps), np.array(cross_maps)


def encode(model, tokens, types=None, positions=None):
    """Returns the outputs of an ``Encoder``: hidden states ``[T, D]``, logits ``[T, V]`` and
    attention maps ``[L, N, T, T]``."""
    c, tokens = model.config, np.asarray(tokens)
    positions = np.arange(len(tokens)) if positions is None else positions
    x = _embed(model, tokens, np.zeros_like(tokens) if types is None else types, positions)
    x, maps, _ = _stack(c, model.stack, x, causal=False, positions=positions)
    if c.norm_position == "pre":
        x = _norm(model.final_norm, None, x, c)
    head = model.head
    transformed = _norm(head.norm, None, ACTIVATIONS["gelu"](linear(head.transform, None, x)), c)
    table = model.embeddings.token if c.tie_embeddings else model.embeddings.output
    return x, transformed @ array(table).T + array(head.bias), maps


def translate(model, source, target):
    """Returns the outputs of an ``EncoderDecoder``: logits ``[T, V]``, and maps of the encoder, the
    decoder and cross-attention."""
    c, source, target = model.config, np.asarray(source), np.asarray(target)
    memory, encoder_maps, _ = _stack(c, model.encoder, _embed(model, source, 0, np.arange(len(source))), causal=False)
    if c.norm_position == "pre":
        memory = _norm(model.encoder_norm, None, memory, c)
    x = _embed(model, target, 0, np.arange(len(target)), model.target_embeddings)
    x, decoder_maps, cross_maps = _stack(c, model.decoder, x, causal=True, memory=memory)
    if c.norm_position == "pre":
        x = _norm(model.decoder_norm, None, x, c)
    table = model.embeddings.token if c.tie_embeddings else model.embeddings.output
    logits = x @ array(table).T / (math.sqrt(c.model_dim) if c.scale_logits else 1.0)
    logits = logits + (array(model.embeddings.output_bias) if c.use_output_bias else 0.0)
    return logits, (encoder_maps, decoder_maps, cross_maps)
