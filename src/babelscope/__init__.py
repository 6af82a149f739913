"""Babelscope: find which features inside a language model belong to which language, and prove it."""

import os

# OpenMP's threads wait awake for 10,000 turns, then sleep. Beside a busy core, threads that wait for libgomp's own
# 300,000 turns hold a stage up; on a quiet machine, threads that sleep at once do (`benchmarks/busy.py` compares them).
# libgomp reads the variable when torch is imported, hence here. A user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
