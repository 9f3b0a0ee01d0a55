"""Frozen backbones, one family a file: its name is its key (``siglip``, ``whisper``, ...)."""
