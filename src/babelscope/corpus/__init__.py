"""Texts per language: where they come from, and which of them are taken."""
