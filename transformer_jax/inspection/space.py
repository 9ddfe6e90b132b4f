"""The embedding space: neighbours, analogies and principal components of static and of contextual
vectors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.decoding.embed import similarity
from transformer_jax.models.functional import Model

__all__ = ["PCA", "analogy", "nearest", "pca", "read_analogies", "similarity", "static_embeddings"]

Rows = int | Int[Array | np.ndarray, "*Q"]


def static_embeddings(model: Model) -> Float[Array, "V D"]:
    """The table of token embeddings, float32 ``[V, D]``; contextual ones are
    :func:`transformer_jax.embed`'s."""
    return model.embeddings.token[...].astype(jnp.float32)


def nearest(vectors_VD: Float[Array | np.ndarray, "V D"], queries_QD: Float[Array | np.ndarray, "*Q D"],
            top_k: int = 10, *, exclude: Int[Array | np.ndarray, "*#Q X"] | Sequence[int] | None = None,
            ) -> tuple[Int[Array, "*Q K"], Float[Array, "*Q K"]]:
    """The vectors at the smallest angles to given ones.

    Args:
      vectors_VD: what is searched, such as :func:`static_embeddings`.
      queries_QD: ``[Q, D]``, or one vector ``[D]``.
      top_k: how many.
      exclude: rows of ``vectors_VD`` that are not wanted, ``[X]`` for all queries or ``[Q, X]``.

    Returns:
      Rows of ``vectors_VD`` ``[Q, K]``, the nearest first, and their cosines; without the axis that
      a single query lacks.
    """
    cosines = similarity(jnp.asarray(queries_QD), jnp.asarray(vectors_VD))
    if exclude is not None:
        excluded = (jnp.asarray(exclude)[..., None] == jnp.arange(cosines.shape[-1])).any(-2)
        cosines = jnp.where(excluded, -jnp.inf, cosines)
    cosines, rows = jax.lax.top_k(cosines, top_k)
    return rows, cosines


def analogy(vectors_VD: Float[Array | np.ndarray, "V D"], a: Rows, b: Rows, c: Rows,
            top_k: int = 5) -> tuple[Int[Array, "*Q K"], Float[Array, "*Q K"]]:
    """What is to c as a is to b: the rows nearest to a - b + c, unit vectors all, these three left
    out.

    king - man + woman: ``a`` is king, ``b`` man and ``c`` woman.

    Source: Mikolov et al. (2013); 3CosAdd of Levy and Goldberg (2014).

    Args:
      vectors_VD: such as :func:`static_embeddings`.
      a: a row of them, or several ``[Q]``; so are ``b`` and ``c``.
      b: see ``a``.
      c: see ``a``.
      top_k: how many.

    Returns:
      As :func:`nearest`.
    """
    a, b, c = map(jnp.asarray, (a, b, c))
    unit_VD = vectors_VD / jnp.maximum(jnp.linalg.norm(vectors_VD, axis=-1, keepdims=True), 1e-12)
    return nearest(unit_VD, unit_VD[a] - unit_VD[b] + unit_VD[c], top_k, exclude=jnp.stack([a, b, c], axis=-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PCA:
    """Principal components.

    Attributes:
      projected: the vectors in the new axes ``[X, C]``.
      components: the axes, orthonormal ``[C, D]``.
      explained: the share of the variance along each ``[C]``.
      mean: of the vectors ``[D]``.
    """

    projected: Float[Array, "X C"]
    components: Float[Array, "C D"]
    explained: Float[Array, " C"]
    mean: Float[Array, " D"]


def pca(vectors_XD: Float[Array | np.ndarray, "X D"], num_components: int = 2) -> PCA:
    """The directions in which vectors vary most; the largest entry of each axis is positive.

    Source: Pearson (1901).

    Raises:
      ValueError: for more components than there are vectors or dimensions.
    """
    vectors_XD = jnp.asarray(vectors_XD, jnp.float32)
    if not 1 <= num_components <= min(vectors_XD.shape):
        raise ValueError(f"num_components={num_components} must be from 1 to {min(vectors_XD.shape)}, for vectors "
                         f"{vectors_XD.shape}")
    mean_D = vectors_XD.mean(0)
    _, lengths, axes_CD = jnp.linalg.svd(vectors_XD - mean_D, full_matrices=False)
    largest_C1 = jnp.take_along_axis(axes_CD, jnp.abs(axes_CD).argmax(-1, keepdims=True), axis=-1)
    axes_CD = (axes_CD * jnp.sign(largest_C1))[:num_components]
    shares_C = jnp.square(lengths) / jnp.maximum(jnp.square(lengths).sum(), 1e-30)
    return PCA((vectors_XD - mean_D) @ axes_CD.T, axes_CD, shares_C[:num_components], mean_D)


def read_analogies(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the analogies of word2vec: lines of four words under lines ``: section``.

    Source: Mikolov et al. (2013), questions-words.txt.

    Returns:
      For each section an array of words ``[X, 4]``: as the first is to the second, so is the third
      to the fourth; for :func:`analogy` ``a`` is the second, ``b`` the first and ``c`` the third.

    Raises:
      ValueError: for a line of other than four words, or one before any section.
    """
    sections: dict[str, list[list[str]]] = {}
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        words = line.split()
        if words[:1] == [":"]:
            questions = sections.setdefault(" ".join(words[1:]), [])
        elif words and (len(words) != 4 or not sections):
            raise ValueError(f"{path}, line {number}: {line!r} is neither ': section' nor four words of a section")
        elif words:
            questions.append(words)
    return {name: np.array(questions).reshape(-1, 4) for name, questions in sections.items()}
