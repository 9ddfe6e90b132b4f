"""The other sides of the benchmarks: the same work in PyTorch, transformers and TRL."""
