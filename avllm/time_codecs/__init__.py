"""Time codecs, one a file: write times of a clip for the LLM and read them from its answers."""
