"""Importers, one a file: checkpoints out of the weights that other projects publish."""
