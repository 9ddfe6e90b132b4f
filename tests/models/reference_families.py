"""Encoders and encoder-decoders in plain float64 NumPy, one sequence at a time, written from the papers."""

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


def _embed(model, tokens, types, positions):
    c, e = model.config, model.embeddings
    x = array(e.token)[tokens] * (math.sqrt(c.model_dim) if c.scale_embeddings else 1.0)
    if c.positions == "learned":
        x = x + array(e.position)[positions]
    if c.positions == "sinusoidal":
        x = x + sinusoids(positions, c.model_dim)
    if c.num_token_types:
        x = x + array(e.token_type)[types]
    return _norm(e.norm, None, x, c) if c.use_embedding_norm else x


def _attend(module, layer, x, memory, c, allowed, positions):
    """What attention adds, and its maps ``[N, T, S]``; ``positions`` is ``None`` in attention to a memory."""
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
        scores = q[:, n] @ k[:, shared].T / math.sqrt(c.head_dim)
        if c.positions == "alibi" and positions is not None:
            scores = scores - slopes(c.num_heads)[n] * np.abs(positions[:, None] - positions)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
        maps[n] = weights / weights.sum(-1, keepdims=True)
        heads[:, n] = maps[n] @ v[:, shared]
    return linear(module.output, layer, heads.reshape(len(x), -1)), maps


def _feed_forward(mlp, layer, x, c):
    up = linear(mlp.up, layer, x)
    if c.activation == "swiglu":
        gate = linear(mlp.gate, layer, x)
        return linear(mlp.down, layer, gate / (1 + np.exp(-gate)) * up)
    return linear(mlp.down, layer, ACTIVATIONS[c.activation](up))


def _stack(c, stack, x, *, causal, memory=None, positions=None):
    """The last stream, the maps of self-attention ``[L, N, T, T]`` and those of attention to the memory."""
    positions = np.arange(len(x)) if positions is None else positions
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    allowed = distance >= 0 if causal else np.full(distance.shape, True)
    if c.sliding_window is not None:
        allowed &= np.abs(distance) < c.sliding_window
    blocks, maps, cross_maps = stack.blocks, [], []

    def sub_layer(x, norm_module, layer, function):
        if c.norm_position == "pre":
            return x + function(_norm(norm_module, layer, x, c))
        return _norm(norm_module, layer, x + function(x), c)

    for layer in range(stack.num_layers):
        def self_attention(h, layer=layer):
            out, attention = _attend(blocks.attention, layer, h, h, c, allowed, positions)
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
    """Of an ``Encoder``: hidden states ``[T, D]``, logits ``[T, V]`` and attention maps ``[L, N, T, T]``."""
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
    """Of an ``EncoderDecoder``: logits ``[T, V]``, and maps of the encoder, the decoder, and across."""
    c, source, target = model.config, np.asarray(source), np.asarray(target)
    memory, encoder_maps, _ = _stack(c, model.encoder, _embed(model, source, 0, np.arange(len(source))), causal=False)
    if c.norm_position == "pre":
        memory = _norm(model.encoder_norm, None, memory, c)
    x, decoder_maps, cross_maps = _stack(c, model.decoder, _embed(model, target, 0, np.arange(len(target))),
                                         causal=True, memory=memory)
    if c.norm_position == "pre":
        x = _norm(model.decoder_norm, None, x, c)
    table = model.embeddings.token if c.tie_embeddings else model.embeddings.output
    return x @ array(table).T, (encoder_maps, decoder_maps, cross_maps)
