"""Training: optimizers, the training step and loop, checkpoints."""
