"""The embedding space: nearest neighbours, analogies and principal components of static and
contextual embeddings."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.decoding.embed import similarity
from transformer_jax.inspection.parts import LanguageModel, check_count
from transformer_jax.models.output import resolve

__all__ = ["PCA", "analogy", "nearest", "pca", "read_analogies", "similarity", "static_embeddings"]

Rows = int | Int[Array | np.ndarray, "*Q"]


def static_embeddings(model: LanguageModel) -> Float[Array, "V D"]:
    """Returns the table of token embeddings; ``transformer_jax.embed`` computes contextual
    embeddings.

    Args:
      model: the model.

    Returns:
      float32 ``[V, D]``.
    """
    return model.embeddings.token[...].astype(jnp.float32)


def nearest(vectors_VD: Float[Array | np.ndarray, "V D"], queries_QD: Float[Array | np.ndarray, "*Q D"],
            top_k: int = 10, *, exclude: Int[Array | np.ndarray, "*#Q X"] | Sequence[int] | None = None,
            ) -> tuple[Int[Array, "*Q K"], Float[Array, "*Q K"]]:
    """Finds the vectors with the largest cosine similarity to each query.

    Args:
      vectors_VD: the vectors to search, such as the result of ``static_embeddings``.
      queries_QD: the query vectors ``[Q, D]``, or one vector ``[D]``.
      top_k: the number K of neighbours for each query.
      exclude: indices of rows of ``vectors_VD`` to leave out: ``[X]`` for all queries, or
        ``[Q, X]``.

    Returns:
      The row indices in ``vectors_VD``, nearest first, and their cosine similarities, both
      ``[Q, K]``; ``[K]`` for a single query.

    Raises:
      ValueError: if ``top_k`` exceeds the number of vectors, or if a row to exclude does not exist.
    """
    check_count("top_k", top_k, len(vectors_VD))
    cosines = similarity(jnp.asarray(queries_QD), jnp.asarray(vectors_VD))
    if exclude is not None and np.size(exclude):
        exclude = _rows("exclude", exclude, len(vectors_VD))
        excluded = (exclude[..., None] == jnp.arange(cosines.shape[-1])).any(-2)
        cosines = jnp.where(excluded, -jnp.inf, cosines)
    cosines, rows = jax.lax.top_k(cosines, top_k)
    return rows, cosines


def analogy(vectors_VD: Float[Array | np.ndarray, "V D"], a: Rows, b: Rows, c: Rows,
            top_k: int = 5) -> tuple[Int[Array, "*Q K"], Float[Array, "*Q K"]]:
    """Finds the rows nearest to a - b + c, where all vectors are scaled to unit length; rows a, b
    and c are left out.

    For king - man + woman, ``a`` is king, ``b`` is man and ``c`` is woman.

    Source: Mikolov et al. (2013); 3CosAdd of Levy and Goldberg (2014).

    Args:
      vectors_VD: the vectors to search, such as the result of ``static_embeddings``.
      a: the index of one row, or indices ``[Q]``.
      b: the index of one row, or indices ``[Q]``.
      c: the index of one row, or indices ``[Q]``.
      top_k: the number K of neighbours.

    Returns:
      The row indices in ``vectors_VD``, nearest first, and their cosine similarities, both
      ``[Q, K]``; ``[K]`` for a single query.

    Raises:
      ValueError: if a row does not exist, or if ``top_k`` exceeds the number of vectors.
    """
    a, b, c = (_rows(name, rows, len(vectors_VD)) for name, rows in (("a", a), ("b", b), ("c", c)))
    unit_VD = vectors_VD / jnp.maximum(jnp.linalg.norm(vectors_VD, axis=-1, keepdims=True), 1e-12)
    return nearest(unit_VD, unit_VD[a] - unit_VD[b] + unit_VD[c], top_k, exclude=jnp.stack([a, b, c], axis=-1))


def _rows(name: str, rows: Any, size: int) -> jax.Array:
    """Checks row indices and converts negative ones, because JAX would silently read the last row
    for an index that is out of range."""
    flat = jnp.asarray(resolve(name, rows if isinstance(rows, jax.Array) else np.ravel(rows), size)[0])
    return flat.reshape(np.shape(rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PCA:
    """The result of a principal component analysis.

    Attributes:
      projected: the coordinates of the vectors along the components, ``[X, C]``.
      components: the components, which are orthonormal, ``[C, D]``.
      explained: the fraction of the variance that each component explains, ``[C]``.
      mean: the mean of the vectors, ``[D]``.
    """

    projected: Float[Array, "X C"]
    components: Float[Array, "C D"]
    explained: Float[Array, " C"]
    mean: Float[Array, " D"]


def pca(vectors_XD: Float[Array | np.ndarray, "X D"], num_components: int = 2) -> PCA:
    """Computes the directions in which vectors vary most (principal component analysis).

    The sign of each component is chosen so that its entry of largest magnitude is positive.

    Source: Pearson (1901).

    Args:
      vectors_XD: the vectors, ``[X, D]``.
      num_components: the number C of components.

    Returns:
      The components, the projected vectors, and the explained fractions of the variance.

    Raises:
      ValueError: if ``num_components`` is less than 1 or exceeds the number of vectors or
        dimensions.
    """
    vectors_XD = jnp.asarray(vectors_XD, jnp.float32)
    if not 1 <= num_components <= min(vectors_XD.shape):
        raise ValueError(f"num_components={num_components} must be from 1 to {min(vectors_XD.shape)} for vectors of "
                         f"shape {vectors_XD.shape}")
    mean_D = vectors_XD.mean(0)
    _, lengths, axes_CD = jnp.linalg.svd(vectors_XD - mean_D, full_matrices=False)
    largest_C1 = jnp.take_along_axis(axes_CD, jnp.abs(axes_CD).argmax(-1, keepdims=True), axis=-1)
    axes_CD = (axes_CD * jnp.sign(largest_C1))[:num_components]
    shares_C = jnp.square(lengths) / jnp.maximum(jnp.square(lengths).sum(), 1e-30)
    return PCA((vectors_XD - mean_D) @ axes_CD.T, axes_CD, shares_C[:num_components], mean_D)


def read_analogies(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a file of analogies in word2vec's format: sections of lines with four words.

    Source: Mikolov et al. (2013), questions-words.txt.

    Args:
      path: the path of the file.

    Returns:
      For each section, an array of words ``[X, 4]``. The first word is to the second as the third
      is to the fourth. For ``analogy``, ``a`` is the second word, ``b`` the first and ``c`` the
      third.

    Raises:
      ValueError: if a line does not have four words, or stands before the first section.
    """
    sections: dict[str, list[list[str]]] = {}
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        words = line.split()
        if words[:1] == [":"]:
            questions = sections.setdefault(" ".join(words[1:]), [])
        elif words and (len(words) != 4 or not sections):
            raise ValueError(f"{path}, line {number}: {line!r}; expected ': section', or four words under a section")
        elif words:
            questions.append(words)
    return {name: np.array(questions).reshape(-1, 4) for name, questions in sections.items()}
