"""Media files as frames and sound on one clock; only this room opens them."""
