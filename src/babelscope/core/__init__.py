"""Errors, logging, files and resuming: code that all stages share and that cannot change a result."""
