"""Steering: generate text while the features of one language are amplified."""
