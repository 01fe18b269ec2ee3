"""Benchmarks, one file each: examples() reads them, prompt() asks, score() judges."""
