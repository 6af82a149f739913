"""SAE quality: how much of the loss the reconstruction recovers."""
