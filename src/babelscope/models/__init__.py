"""Loading causal language models; reading and changing their activations at named hookpoints."""
