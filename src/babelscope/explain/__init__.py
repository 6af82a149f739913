"""Explanations of features by a language model behind an OpenAI-compatible endpoint, and their scores."""
