"""Sampling from decoders: pure logit processors, a compiled token loop, streaming, scoring."""
