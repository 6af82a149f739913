"""Commands for single sentences and features: `try`, `features` and `serve`."""
