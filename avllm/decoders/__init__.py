"""Ways to choose the tokens of an answer, one decoder a file."""
