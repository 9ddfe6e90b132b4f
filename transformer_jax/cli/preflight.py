"""Says what a training run needs before it starts: memory, the largest batch, operations. Nothing
is allocated.

python -m experiments.preflight --config=gpt2_small --config.mesh.fsdp=4 --device=v5e

The devices need not be here. With libtpu installed the step is compiled for the TPUs themselves;
else for as many simulated CPU devices, whose compiler keeps more activations than that of an
accelerator: an upper bound.
"""

from __future__ import annotations

import importlib.util
import math
import os

from absl import flags

from transformer_jax.cli.flags import define_config, run
from transformer_jax.config import MeshConfig
from transformer_jax.training.chips import CHIPS

_CONFIG = define_config()
_DEVICE = flags.DEFINE_enum("device", "cpu", [*CHIPS, "cpu"], "The device to plan for.")
_DEVICES = flags.DEFINE_integer("devices", None, "How many there are; by default as many as config.mesh multiplies to.")
_SEARCH = flags.DEFINE_bool("search", True, "Find the largest batch too, which compiles the step a few times.")

# Chips -> how libtpu calls that many in one slice.
_TOPOLOGIES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def _main() -> None:
    config = _CONFIG()
    mesh = config.mesh
    axes = (mesh.data or 1, mesh.fsdp, mesh.sequence, mesh.tensor)
    count = math.prod(axes) if _DEVICES.value is None else _DEVICES.value
    if count < 1:
        raise ValueError(f"--devices={count} must be at least 1")
    is_tpu, has_libtpu = _DEVICE.value in ("v5e", "v6e"), importlib.util.find_spec("libtpu") is not None
    if is_tpu and has_libtpu and count in _TOPOLOGIES:
        # Of one chip libtpu has no topology: the first of four is one.
        from transformer_jax.training.topologies import devices_of

        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs: other programs may use theirs
        devices = devices_of(f"{_DEVICE.value}:{_TOPOLOGIES[max(count, 4)]}")[:count]
    else:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices()
    from transformer_jax.runs.preflight import preflight
    from transformer_jax.sharding import make_mesh

    made = make_mesh(MeshConfig(mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence), devices)
    print(preflight(config, mesh=made, device=_DEVICE.value, search=_SEARCH.value))
    if is_tpu and not has_libtpu:
        print("\nlibtpu is not installed (pip install 'jax[tpu]'), so these are a CPU program's bytes: an upper bound")


def main() -> None:
    """``transformer-jax preflight``."""
    run(_main)


if __name__ == "__main__":
    main()
