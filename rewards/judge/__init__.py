"""`reward=judge`: a language model behind an OpenAI-compatible endpoint judges responses."""
