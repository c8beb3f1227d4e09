"""The tasks: those of the paper on their datasets, those of the embedded models, and a user's own pairs."""
