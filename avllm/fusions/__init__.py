"""Ways for media to act inside the LLM, beside its sequence, one fusion a file."""
