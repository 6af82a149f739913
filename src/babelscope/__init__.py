"""Babelscope: find which features inside a language model belong to which language, and prove it."""

import os

# OpenMP's threads sleep while they wait: beside one busy core, spinning ones make a stage ten times slower. libgomp
# reads the variable when torch is imported, hence here. A user's own setting wins, also GOMP_SPINCOUNT.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
