"""Weights from and to Hugging Face's files: no torch, no pickle."""
