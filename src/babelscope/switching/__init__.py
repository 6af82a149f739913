"""Sentences that switch from one language to another: what a language's features do there, and what they are for."""
