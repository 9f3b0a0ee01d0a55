"""The check of manifests and media, and statistics; training imports nothing of it."""
