"""Check what a checkpoint folder holds before it is used: files, digests, names of parts."""
