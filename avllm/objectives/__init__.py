"""Objectives, one a file: the terms of the loss."""
