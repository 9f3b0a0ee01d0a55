"""Benchmarks, metrics and their runner."""
