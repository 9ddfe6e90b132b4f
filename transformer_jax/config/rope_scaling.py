"""Settings of rotary position embeddings: how they are scaled, and which channels they rotate."""

from __future__ import annotations

import dataclasses
import math

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary position embeddings are scaled for texts longer than those of the original
    training.

    Attributes:
      kind: ``none``, ``linear``, ``dynamic``, ``yarn``, ``llama3`` or ``longrope``. ``linear``
        divides every frequency by ``factor`` (Chen et al., 2023). ``dynamic`` raises the base by
        how far a text exceeds ``original_max_len``. ``yarn`` (Peng et al., 2023) divides by
        ``factor`` the frequencies that turn fewer than ``beta_slow`` times in
        ``original_max_len``, keeps those that turn more than ``beta_fast`` times, and interpolates
        between the two. ``longrope`` (Ding et al., 2024) divides each frequency by its own number,
        from ``long_factors`` for a text longer than ``original_max_len``, else from
        ``short_factors``. ``llama3`` (Dubey et al., 2024) divides only the frequencies whose
        wavelength is above ``original_max_len / low_frequency_factor``. It keeps those whose
        wavelength is below ``original_max_len / high_frequency_factor``, and interpolates between
        the two.
      factor: The divisor of the frequencies, at least 1. For ``longrope`` it only determines the
        default of ``attention_factor``.
      low_frequency_factor: Defines the longest wavelengths for ``llama3``.
      high_frequency_factor: Defines the shortest wavelengths for ``llama3``; must be the greater
          one.
      original_max_len: The longest text of the original training, in tokens.
      attention_factor: The factor of rotated queries and keys for ``yarn`` and ``longrope``.
        ``None``: the value that the papers recommend for ``factor``.
      beta_fast: Defines the shortest wavelengths for ``yarn``.
      beta_slow: Defines the longest wavelengths for ``yarn``; must be the smaller one.
      truncate: Whether ``yarn`` rounds the first and the last interpolated pair of channels to
        whole numbers.
      short_factors: One divisor for each pair of channels, for ``longrope``.
      long_factors: The same for texts longer than ``original_max_len``.
    """

    kind: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_len: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "kind", ("none", "linear", "dynamic", "yarn", "llama3", "longrope"))
        require(self.low_frequency_factor < self.high_frequency_factor,
                f"rope_scaling.low_frequency_factor={self.low_frequency_factor} must be positive and below "
                f"high_frequency_factor={self.high_frequency_factor}")
        require(self.beta_slow < self.beta_fast,
                f"rope_scaling.beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}")
        for field in ("short_factors", "long_factors"):
            values = getattr(self, field)
            require(all(isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
                        for value in values), f"rope_scaling.{field}={values!r} must be positive numbers")
            object.__setattr__(self, field, tuple(map(float, values)))

    def check_width(self, rotated: int) -> None:
        """Checks that the factors of ``longrope`` fit the channels that are rotated.

        Args:
          rotated: The number of rotated channels of a head.

        Raises:
          ValueError: If there is not one factor for each pair of channels.
        """
        if self.kind == "longrope":
            sizes = len(self.short_factors), len(self.long_factors)
            require(sizes == (rotated // 2, rotated // 2),
                    f"rope_scaling has {sizes[0]} short_factors and {sizes[1]} long_factors; expected one for each of "
                    f"the {rotated // 2} pairs of channels that are rotated")
        require(self.kind != "dynamic" or rotated > 2,
                f"rope_scaling.kind='dynamic' needs more than {rotated} rotated channels")

    @property
    def boundary(self) -> int | None:
        """The length beyond which all positions of a text are rotated differently; ``None`` if there
        is no such length."""
        return self.original_max_len if self.kind == "longrope" else None

    @property
    def magnitude(self) -> float:
        """The factor of rotated queries and keys."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn" or self.factor == 1.0:
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_len))


@dataclasses.dataclass(frozen=True)
class RopeLayout:
    """Which channels of a head rotary position embeddings rotate, and how these form pairs.

    Attributes:
      dim: The number of channels of each head that are rotated: the first ones, or the last ones in
        latent attention. It is even and below the width of a head. ``None`` rotates all channels.
      pairs: ``halves`` pairs channel i with channel i + dim / 2, as GPT-NeoX and Llama do.
        ``interleaved`` pairs channels 2i and 2i + 1, as GPT-J does.
    """

    dim: int | None = None
    pairs: str = "halves"

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "pairs", ("halves", "interleaved"))
        require(self.dim is None or self.dim % 2 == 0, f"rope_layout.dim={self.dim} must be even: rope rotates pairs")

    def check(self, positions: str, head_dim: int) -> None:
        """Checks that a model can have this layout.

        Args:
          positions: The name of the position encoding.
          head_dim: The width of a head.

        Raises:
          ValueError: If the encoding does not rotate, or if a head has no such channels.
        """
        require(positions == "rope" or self == RopeLayout(),
                f"rope_layout={self} is for positions='rope', not {positions!r}")
        require(self.dim is None or self.dim < head_dim,
                f"rope_layout.dim={self.dim} must be below head_dim={head_dim}; None rotates all channels")
        require(positions != "rope" or self.dim is not None or head_dim % 2 == 0,
                f"positions='rope' rotates pairs: head_dim={head_dim} must be even")
