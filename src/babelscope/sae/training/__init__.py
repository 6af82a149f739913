"""Training an SAE: the learner, its step, the Lightning module."""
