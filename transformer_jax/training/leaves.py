"""The arrays of a pytree by their paths, and a digest of all of them."""

import hashlib
from typing import Any

import jax
import numpy as np

from transformer_jax.training.manifest import CheckpointError


def tree_digest(tree: Any) -> str:
    """Returns the SHA-256, in hex, of a pytree's leaves: path, dtype, shape and bytes of each,
    ordered by path.

    Args:
      tree: pytree of arrays that this process can read whole; typed PRNG keys count by their data.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        digest.update(f"{name} {describe(leaf)}\n".encode())
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf).tobytes())
    return digest.hexdigest()


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as "params/blocks/0/kernel", in the order of
    `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError("two leaves of the state have the same path: a key holds '/', or is there as str and int")
    return leaves


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> str:
    """The type and shape of an array, as in ``float32[2, 3]``."""
    return f"{leaf.dtype}{list(leaf.shape)}"
