"""Extracting activations, storing them on disk, and reading them in training batches."""
