"""Export plans: into the weights of a checkpoint or of a live model, or as an adapter (docs/serving.md)."""
