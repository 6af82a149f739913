"""Ablation: remove units from the forward pass, measure the NLL, and compare it with matched random controls."""
