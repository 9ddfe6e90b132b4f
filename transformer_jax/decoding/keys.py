"""One PRNG key for every row of a batch, so that a row's samples depend on its own key alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_fold_in_rows = jax.jit(lambda key, num_rows: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows)),
                        static_argnums=1)


def row_keys(key: jax.Array | None, num_rows: int) -> jax.Array:
    """Keys ``[num_rows]``: those given, or made from a single one, or any where none is needed.

    Raises:
      ValueError: for what is not a PRNG key, or keys of another number of rows.
    """
    if key is None:
        key = jax.random.key(0)  # greedy: never read
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key={key!r} is no PRNG key; pass jax.random.key(seed)")
    if key.ndim == 0:
        return _fold_in_rows(key, num_rows)
    if key.shape != (num_rows,):
        raise ValueError(f"key has shape {key.shape}; pass one key, or one for each of the {num_rows} rows")
    return key
