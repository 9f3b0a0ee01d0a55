"""Benchmarks: samples, prompt and score, one a file."""
