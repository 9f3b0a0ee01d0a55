"""Resume points: what a run needs to go on, whose they are, and whether they are whole."""
