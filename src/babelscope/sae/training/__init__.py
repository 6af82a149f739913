"""Training an SAE: the learner, its step, the Lightning module and the loop; the stages `train` and `retrain`."""
