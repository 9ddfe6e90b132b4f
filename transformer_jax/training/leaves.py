"""Name the leaves of a pytree by their paths, and compute a digest of all of them."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.training.manifest import CheckpointError


def tree_digest(tree: Any) -> str:
    """Computes the SHA-256 of the paths, dtypes, shapes and bytes of all leaves of a pytree.

    Args:
      tree: a pytree of arrays that this process can read completely. The data of typed PRNG keys is
        used.

    Returns:
      The digest in hexadecimal, which does not depend on the order of the leaves.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        digest.update(f"{name} {describe(leaf)}\n".encode())
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf).tobytes())
    return digest.hexdigest()


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by their paths.

    Args:
      tree: a pytree.

    Returns:
      A dict from paths, such as ``params/blocks/0/kernel``, to leaves, in the order of
      ``jax.tree.leaves``.

    Raises:
      CheckpointError: if two leaves have the same path.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError("two leaves of the state have the same path, because a dict key contains '/' or exists "
                              "both as a str and as an int; rename the key")
    return leaves


def is_key(leaf: Any) -> bool:
    """Returns True if an array holds typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> str:
    """Returns the dtype and shape of an array as text, such as ``float32[2, 3]``."""
    return f"{leaf.dtype}{list(leaf.shape)}"
