"""Benchmarks on a CPU."""
