"""Settings of the training of sentence embeddings."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Settings of contrastive learning on pairs of texts, with the other pairs of a batch as
    negative examples.

    Attributes:
      pooling: How the hidden states of the tokens become the vector of a text: ``mean``, ``first``
        or ``last``, as in ``tj.embed``.
      temperature: The divisor of the cosines. A lower value gives the nearest negative examples
        more weight.
      dims: Widths below that of the model, such as ``(64, 32)``. The first numbers of a vector are
        then trained to be a shorter vector of the text (Matryoshka embeddings, Kusupati et al.,
        2022).
    """

    pooling: str = "mean"
    temperature: float = 0.05
    dims: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "pooling", ("mean", "first", "last"))
        object.__setattr__(self, "dims", tuple(self.dims))
        require(all(isinstance(dim, int) and not isinstance(dim, bool) and dim > 0 for dim in self.dims),
                f"contrastive.dims={self.dims!r} must be positive integers")
