"""A plan leaves the project: folded into a checkpoint, or as an adapter for an engine that others maintain."""
