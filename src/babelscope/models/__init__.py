"""Causal language models: loading, tokens, forward passes, and activations read and changed at named hookpoints."""
