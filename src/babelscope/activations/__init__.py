"""Extracting activations, keeping them on disk, and counting what fires on which language."""
