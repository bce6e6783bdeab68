"""A score for models of any pictures: do samples look most like the training picture of their own caption?"""
import random

import numpy as np
import torch

from common.figures import from_bytes


@torch.no_grad()
def retrieval(autoencoder, dataset, generate, count=100, seed=0):
    """For `count` random training captions: the share of samples whose nearest training picture has the same
    caption. Distance is Euclidean, between latents. generate: list of B prompts → (B, 3, S, S) uint8."""
    captions = dataset.captions
    chosen = random.Random(seed).sample(range(len(captions)), min(count, len(captions)))
    device = next(autoencoder.parameters()).device

    def encode(pictures):
        """(N, 3, S, S) uint8 → (N, C·h·w)."""
        parts = (from_bytes(part).to(device) for part in pictures.split(256))
        return torch.cat([autoencoder.encode(part).flatten(1) for part in parts])

    training = encode(dataset.pictures(range(len(captions))))
    samples = encode(generate([captions[i] for i in chosen]))
    nearest = torch.cdist(samples, training).argmin(1).tolist()  # (count,)
    return float(np.mean([captions[n] == captions[i] for n, i in zip(nearest, chosen)]))
