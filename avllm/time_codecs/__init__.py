"""How times in a clip are written for the LLM, and read back out of its answers; one codec a file."""
