"""The other sides: the same work in PyTorch, transformers and TRL."""
