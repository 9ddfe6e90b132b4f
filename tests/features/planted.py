"""Activations that are sums of few directions of a known dictionary."""

import numpy as np


def planted(num_rows, dim, num_features, k, seed=0):
    """Returns activations ``[num_rows, dim]``, and the directions ``[num_features, dim]`` of which
    each row adds k, with factors from 0.5 to 1.5."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(num_features, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = np.argsort(random.random((num_rows, num_features)), axis=1)[:, :k]
    factors = random.uniform(0.5, 1.5, (num_rows, k))
    return np.einsum("nk,nkd->nd", factors, directions[chosen]).astype(np.float32), directions


def mean_maximum_cosine(directions, model):
    """The mean, over the planted directions, of the largest cosine with a row of the decoder."""
    decoder = np.asarray(model.decoder[...])
    decoder = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    return float((directions @ decoder.T).max(1).mean())
