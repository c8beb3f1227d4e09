"""Prune models in place (prune.py), and repair them without training (eora.py)."""
