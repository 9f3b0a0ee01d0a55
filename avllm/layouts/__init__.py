"""Layouts, one a file: the order of the streams' tokens in the LLM's sequence."""
