"""Fusions, one a file: let media act inside the LLM, beside its sequence."""
