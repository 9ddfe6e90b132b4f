"""A separate PRNG key for every row of a batch, so that the samples of a row do not depend on other
rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

Keys = Key[Array, "..."]  # one key, or one per row

_fold_in_rows = jax.jit(lambda key, num_rows: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows)),
                        static_argnums=1)


_seeded_rows = jax.jit(lambda seed, num_rows: jax.random.key_data(_fold_in_rows(jax.random.key(seed), num_rows)),
                       static_argnums=1)


def seeded_key_data(seed: int, num_rows: int) -> UInt32[np.ndarray, "B W"]:
    """Returns the data of the keys ``row_keys(jax.random.key(seed), num_rows)``.

    Plain numbers pass into and out of a compiled function much faster than keys do, which matters
    to a server that makes keys for every request.

    Args:
      seed: the seed; its lowest 32 bits count.
      num_rows: the number of rows.
    """
    return np.asarray(_seeded_rows(np.uint32(seed % 2**32), num_rows))


def row_keys(key: Keys | None, num_rows: int) -> Key[Array, " B"]:
    """Returns one PRNG key per row, ``[num_rows]``.

    Args:
      key: keys for all rows, or a single key, from which the key of row i is ``fold_in(key, i)``;
        ``None`` if decoding is greedy and needs no key.
      num_rows: the number of rows.

    Raises:
      ValueError: if ``key`` is not a PRNG key, or if the number of keys is not the number of rows.
    """
    if key is None:
        key = jax.random.key(0)  # greedy decoding does not use the key
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key={key!r} is not a PRNG key; pass jax.random.key(seed)")
    if key.ndim == 0:
        return _fold_in_rows(key, num_rows)
    if key.shape != (num_rows,):
        raise ValueError(f"key has shape {key.shape}; pass one key, or one for each of the {num_rows} rows")
    return key
