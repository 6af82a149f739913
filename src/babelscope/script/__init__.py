"""Script or language: which features still fire on texts in Latin letters, and on texts with shuffled words."""
