"""What a feature stands for, in words: asked of a language model behind an OpenAI-compatible endpoint, and scored."""
