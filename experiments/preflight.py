"""Computes what a training run needs before it starts: the memory, the largest batch and the FLOPs.
Nothing is allocated.

python -m experiments.preflight --config=gpt2_small --config.mesh.fsdp=4 --device=v5e

This machine need not have the devices. If libtpu is installed, the step is compiled for the TPUs.
Otherwise it is compiled for the same number of simulated CPU devices, so that the memory is an
upper bound.
"""

from transformer_jax.cli import preflight

if __name__ == "__main__":
    preflight.main()
