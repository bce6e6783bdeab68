"""What measures: the benchmark's prompts and judge, speed, the dry run, and the published DiT."""
