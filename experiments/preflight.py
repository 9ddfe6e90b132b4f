"""Says what a training run needs before it starts: memory, the largest batch, operations. Nothing
is allocated.

python -m experiments.preflight --config=gpt2_small --config.mesh.fsdp=4 --device=v5e

The devices need not be here. With libtpu installed the step is compiled for the TPUs themselves;
else for as many simulated CPU devices, whose compiler keeps more activations than that of an
accelerator: an upper bound.
"""

from transformer_jax.cli import preflight

if __name__ == "__main__":
    preflight.main()
