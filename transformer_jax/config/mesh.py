"""Settings of the mesh of devices. They stand apart from the other settings of training because
every model imports them."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.ranges import check_fields


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    Attributes:
      data: Devices that share the rows of a batch. ``None`` uses all devices that the other axes
        leave.
      fsdp: Devices that share the rows of a batch and also shard the weights and the optimizer
        state. Each layer gathers its weights when it needs them.
      tensor: Devices that shard heads, hidden units and the vocabulary.
      sequence: Devices that shard the tokens of a row, for long contexts. Each layer gathers keys
        and values.
      expert: Devices that share the rows of a batch and also shard the experts of a mixture. Each
        layer exchanges the tokens of these devices.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1

    def __post_init__(self):
        check_fields(self)
