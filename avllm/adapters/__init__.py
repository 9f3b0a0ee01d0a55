"""Trainable steps of the connector, one adapter a file; the file's name is its key."""
