"""The command `compare`: two SAEs, or two states of the repository, side by side."""
