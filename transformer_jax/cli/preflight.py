"""Computes what a training run needs before it starts: the memory, the largest batch and the FLOPs.
Nothing is allocated.

python -m experiments.preflight --config=gpt2_small --config.mesh.fsdp=4 --device=v5e

This machine need not have the devices. If libtpu is installed, the step is compiled for the TPUs.
Otherwise it is compiled for the same number of simulated CPU devices. The compiler for CPUs keeps
more activations than the compiler for an accelerator, so that the memory is an upper bound.
"""

from __future__ import annotations

import importlib.util
import math
import os

from absl import flags

from transformer_jax.cli.flags import define_config, run
from transformer_jax.training.chips import CHIPS

_CONFIG = define_config()
_DEVICE = flags.DEFINE_enum("device", "cpu", [*CHIPS, "cpu"], "The device to plan for.")
_DEVICES = flags.DEFINE_integer("devices", None,
                                "The number of devices; by default the product of the axes of config.mesh.")
_SEARCH = flags.DEFINE_bool("search", True, "Also find the largest batch, which compiles the step several times.")

# The name that libtpu uses for a slice with this number of chips.
_TOPOLOGIES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def _main() -> None:
    config = _CONFIG()
    mesh = config.mesh
    axes = (mesh.data or 1, mesh.fsdp, mesh.expert, mesh.sequence, mesh.tensor)
    count = math.prod(axes) if _DEVICES.value is None else _DEVICES.value
    if count < 1:
        raise ValueError(f"--devices={count} must be at least 1")
    is_tpu, has_libtpu = _DEVICE.value in ("v5e", "v6e"), importlib.util.find_spec("libtpu") is not None
    if is_tpu and has_libtpu and count in _TOPOLOGIES:
        # libtpu has no topology of a single chip, so the first of four chips is used.
        from transformer_jax.training.topologies import devices_of

        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the TPUs are not used here
        devices = devices_of(f"{_DEVICE.value}:{_TOPOLOGIES[max(count, 4)]}")[:count]
    else:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices()
    from transformer_jax.runs.preflight import preflight
    from transformer_jax.sharding import make_mesh

    device_mesh = make_mesh(mesh, devices)
    print(preflight(config, mesh=device_mesh, device=_DEVICE.value, search=_SEARCH.value))
    if is_tpu and not has_libtpu:
        print("\nlibtpu is not installed (pip install 'jax[tpu]'), so the step was compiled for CPUs; the memory is an "
              "upper bound")


def main() -> None:
    """Runs ``transformer-jax preflight``."""
    run(_main)


if __name__ == "__main__":
    main()
