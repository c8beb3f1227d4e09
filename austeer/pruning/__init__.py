"""Prune a model in place, and what repairs one without training: prune.py, and a file per way."""
