"""Settings of the layers: limits of values inside the model, and layers that differ by a pattern."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.ranges import check_fields
from transformer_jax.config.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that keep values inside a model in a range.

    Attributes:
      scores: The cap of the attention scores: a score ``s`` becomes ``cap * tanh(s / cap)`` (Gemma
        2). Position biases are added afterwards. ``None``: no limit.
      logits: The cap of the logits of the model, in the same way. ``None``: no limit.
      projections: Queries, keys and values are clipped to the range from minus this number to this
        number, before they are normalized and rotated (OLMo 1). ``None``: no limit.
      neurons: In a feed-forward layer or an expert with a gate, the gate is clipped above this
        number before its activation, and the up projection to the range from minus this number to
        this number (gpt-oss). ``None``: no limit.
    """

    scores: float | None = None
    logits: float | None = None
    projections: float | None = None
    neurons: float | None = None

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the layers of one kind do differently from other layers of the model.

    Attributes:
      sliding_window: The number of last positions that a token attends to in these layers, its own
        included. ``None``: all. The cache of such a layer holds only its window.
      use_rope: Whether these layers rotate queries and keys. Without rotation they have no
        positions, as every fourth layer of SmolLM3.
      rope_base: The base of the wavelengths in these layers. ``None``: ``ModelConfig.rope_base``.
      rope_scaling: How the rotation of these layers is scaled. ``None``:
        ``ModelConfig.rope_scaling``.
      use_experts: Whether these layers have the experts of ``ModelConfig.moe``. Otherwise their
        feed-forward layer is dense, with the ``mlp_dim`` of the model.
    """

    sliding_window: int | None = None
    use_rope: bool = True
    rope_base: float | None = None
    rope_scaling: RopeScaling | None = None
    use_experts: bool = True

    def __post_init__(self):
        check_fields(self)


def shortest_period(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """Finds the shortest pattern that gives the kinds of all layers.

    Args:
      kinds: The kind of each layer.

    Returns:
      The first kinds, which repeat until the last layer. The last repetition may be incomplete.
    """
    return next(kinds[:size] for size in range(1, len(kinds) + 1)
                if all(kind == kinds[index % size] for index, kind in enumerate(kinds)))
