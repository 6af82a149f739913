"""Babelscope: find which features inside a language model belong to which language, and prove it."""
