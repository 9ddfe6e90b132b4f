"""Measurements of this library beside its peers; no part of what is installed: run them from a
checkout."""
