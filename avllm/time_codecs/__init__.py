"""Time codecs, one a file: write times of a clip for the LLM, and read them back out of its answers."""
