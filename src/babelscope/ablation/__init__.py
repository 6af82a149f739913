"""Ablation: take units out of the forward pass, measure the NLL, and compare it with matched random controls."""
