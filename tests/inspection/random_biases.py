"""Models in which no weight has its usual first value."""

import jax
import numpy as np


def with_random_biases(model):
    """Adds noise to the biases and the scales of norms, which are 0 and 1 in a new model."""
    rng = np.random.default_rng(2)

    def noisy(path, leaf):
        flat = any(name in jax.tree_util.keystr(path) for name in (".bias", ".scale"))
        return leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32) if flat else leaf

    return jax.tree_util.tree_map_with_path(noisy, model)
