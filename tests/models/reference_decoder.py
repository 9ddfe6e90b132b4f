"""Random decoders, and the decoder in plain float64 NumPy, one sequence at a time, written from the
papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import transformer_jax as tj

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def abstract_decoder(config):
    """A decoder whose arrays have shapes but no values."""
    return jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))


def random_decoder(config, seed=0):
    """Makes a decoder whose weights are all random; those of norms are near 1 (NumPy's generator
    compiles nothing)."""
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        mean = 1.0 if ".scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(weight, abstract_decoder(config))


def array(parameter, layer=None):
    values = np.asarray(parameter[...], np.float64)
    return values if layer is None else values[layer]


def linear(module, layer, x):
    y = x @ array(module.kernel, layer)
    return y if module.bias is None else y + array(module.bias, layer)


def norm(module, layer, x, kind, epsilon):
    if kind != "rmsnorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    if kind == "layernorm_without_weights":
        return y
    y = y * array(module.scale, layer)
    return y if module.bias is None else y + array(module.bias, layer)


def sinusoids(positions, dim):
    angles = positions[:, None] / 10_000.0 ** (2 * np.arange(dim // 2) / dim)
    table = np.zeros((len(positions), dim))
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)
    return table


def rotate_part(x, positions, config):
    """Rotates the channels that the config's layout names, after putting pairs into halves."""
    layout = config.rope_layout
    width = x.shape[-1] if layout.dim is None else layout.dim
    order = np.arange(width)
    if layout.pairs == "interleaved":
        order = np.concatenate([order[::2], order[1::2]])
    y = x.copy()
    y[..., order] = rotate(x[..., order], positions, config.rope_base)
    return y


def rotate(x, positions, base):
    half = x.shape[-1] // 2
    turns = np.exp(1j * positions[:, None, None] * base ** (-np.arange(half) / half))
    numbers = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def slopes(num_heads):
    if num_heads & (num_heads - 1) == 0:
        return [2 ** (-8 * (i + 1) / num_heads) for i in range(num_heads)]
    power = 1 << (num_heads.bit_length() - 1)
    return slopes(power) + slopes(2 * power)[::2][: num_heads - power]


def run(model, tokens, positions=None):
    """Logits ``[T, V]`` and attention maps ``[L, N, T, T]`` of one sequence."""
    c = model.config
    T = len(tokens)
    positions = np.arange(T) if positions is None else positions
    x = array(model.embeddings.token)[tokens]
    if c.positions == "learned":
        x = x + array(model.embeddings.position)[positions]
    if c.positions == "sinusoidal":
        x = x + sinusoids(positions, c.model_dim)
    maps = np.zeros((c.num_layers, c.num_heads, T, T))
    blocks = model.stack.blocks
    for layer in range(c.num_layers):
        h = norm(blocks.attention_norm, layer, x, c.norm, c.norm_epsilon) if c.norm_position == "pre" else x
        q = linear(blocks.attention.query, layer, h).reshape(T, c.num_heads, c.head_dim)
        k = linear(blocks.attention.key, layer, h).reshape(T, c.num_kv_heads, c.head_dim)
        v = linear(blocks.attention.value, layer, h).reshape(T, c.num_kv_heads, c.head_dim)
        if c.use_qk_norm:
            q = norm(blocks.attention.query_norm, layer, q, "rmsnorm", c.norm_epsilon)
            k = norm(blocks.attention.key_norm, layer, k, "rmsnorm", c.norm_epsilon)
        if c.positions == "rope":
            q, k = rotate_part(q, positions, c), rotate_part(k, positions, c)
        heads = np.zeros((T, c.num_heads, c.head_dim))
        for n in range(c.num_heads):
            shared = n // (c.num_heads // c.num_kv_heads)
            for t in range(T):
                first = 0 if c.sliding_window is None else max(0, t - c.sliding_window + 1)
                scores = k[first : t + 1, shared] @ q[t, n] / math.sqrt(c.head_dim)
                if c.positions == "alibi":
                    scores = scores - slopes(c.num_heads)[n] * (t - np.arange(first, t + 1))
                weights = np.exp(scores - scores.max())
                maps[layer, n, t, first : t + 1] = weights / weights.sum()
            heads[:, n] = maps[layer, n] @ v[:, shared]
        before = x
        x = x + linear(blocks.attention.output, layer, heads.reshape(T, -1))
        if c.norm_position == "post":
            x = norm(blocks.attention_norm, layer, x, c.norm, c.norm_epsilon)
        if c.residual == "parallel_shared":
            pass  # the feed-forward layer reads what attention reads
        elif c.norm_position == "pre":
            read = before if c.residual == "parallel" else x
            h = norm(blocks.mlp_norm, layer, read, c.norm, c.norm_epsilon)
        else:
            h = x
        up = linear(blocks.mlp.up, layer, h)
        if c.activation == "swiglu":
            gate = linear(blocks.mlp.gate, layer, h)
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = ACTIVATIONS[c.activation](up)
        x = x + linear(blocks.mlp.down, layer, hidden)
        if c.norm_position == "post":
            x = norm(blocks.mlp_norm, layer, x, c.norm, c.norm_epsilon)
    if c.norm_position == "pre":
        x = norm(model.final_norm, None, x, c.norm, c.norm_epsilon)
    table = model.embeddings.token if c.tie_embeddings else model.embeddings.output
    logits = x @ array(table).T
    if c.use_output_bias:
        logits = logits + array(model.embeddings.output_bias)
    return logits, maps
