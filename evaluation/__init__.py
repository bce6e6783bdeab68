"""What measures: the benchmark's prompts and judge, retrieval, speed, the dry run, and the published DiT."""
