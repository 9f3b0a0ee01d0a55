"""Manifests, media and loading: from rows of JSONL to tensors on one clock."""
