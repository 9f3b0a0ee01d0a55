"""Read media files as frames and sound on one clock; no other room opens them."""
