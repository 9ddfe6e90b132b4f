"""flax.nnx modules that own weights and little else."""
