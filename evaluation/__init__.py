"""The judge of evaluate.py, the benchmark of speed, the dry run, and the published DiT."""
