"""The corpus: sources of texts, languages, cleaning, splitting, and token budgets."""
