"""Runs from Python: train, evaluate, and preflight."""
