"""Turn samples into rows, one row maker a file."""
