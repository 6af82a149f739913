"""Babelscope: find which features inside a language model belong to which language, and prove it."""

import os

# OpenMP's threads wait awake for 10,000 turns (some 20 microseconds), then sleep. With libgomp's own 300,000 a stage
# beside one busy core is ten times slower; threads that sleep at once cost a training step a third of its speed
# (`benchmarks/busy.py`). libgomp reads the variable when torch is imported, hence here. A user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
