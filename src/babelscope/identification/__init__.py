"""Language identification: the language whose units fire most in a text, compared with fastText."""
