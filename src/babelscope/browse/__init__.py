"""What the feature browser shows of every language-specific and shared feature."""
