"""Frozen backbones: one family a file, the file's name is its key (``siglip``, ``whisper``, ...)."""
