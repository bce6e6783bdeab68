"""Pictures and clips with captions: drawn here, from folders, from tar shards, and as a cache of latents."""
