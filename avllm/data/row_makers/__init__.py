"""How a sample becomes rows, one row maker a file."""
