"""The command `push`: SAEs on the Hugging Face hub, with a model card."""
