"""The order in which the streams' tokens stand in the LLM's sequence, one layout a file."""
