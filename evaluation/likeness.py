"""Do the samples of a model of somebody's pictures look like what their captions name?

Of a folder of pictures, for the captions of training and those of its test split apart (of emoji: pairs of
emoji and style that training never saw):

    style    the nearest training picture lies in the same folder as the caption's own
    rank 1   of all originals in that folder, those of the test split included, the caption's own is nearest
    rank 5   it is among the five nearest

Distance is Euclidean, between latents of the autoencoder and, so that no one measure can be tuned to, between
pictures blurred to 16×16 pixels. The rows "shuffled" judge the same samples by each other's captions: chance.

Of a folder of clips: how far pixels change from frame to frame, over the same of the training clips; and
rank 5 of the first frame among the first frames of all clips, of the last among the last.

Letters: N samples, M originals, S pixels of a side, F frames.
"""
import random

import numpy as np
import torch
import torch.nn.functional as F

from common.figures import from_bytes, grid


def views(autoencoder, pictures):
    """Pictures (N, 3, S, S) uint8 → {name: (N, numbers)}: what distances are measured between."""
    device, latents, blurred = next(autoencoder.parameters()).device, [], []
    for part in pictures.split(256):
        part = from_bytes(part).to(device)
        with torch.no_grad():
            latents.append(autoencoder.encode(part).flatten(1).cpu())
        blurred.append(F.interpolate(part, (16, 16), mode="area").flatten(1).cpu())
    return {"latent": torch.cat(latents), "blurred": torch.cat(blurred)}


def hits(distance, wanted, captions, labels, trained):
    """distance (N, M) from samples to originals; wanted: the index of each sample's original; captions and
    labels of the M originals, of which the first `trained` are training pictures → shares style, rank 1, rank
    5. Another original of the same label and caption is right too."""
    labels, found = np.array(labels), []
    for row, i in zip(distance.numpy(), wanted):
        own = np.flatnonzero(labels == labels[i])
        nearest = [captions[k] for k in own[row[own].argsort()[:5]]]
        style = labels[row[:trained].argmin()] == labels[i]
        found.append((style, nearest[0] == captions[i], captions[i] in nearest))
    return np.mean(found, axis=0).tolist()


def of_pictures(autoencoder, train, test, generate, count, seed=0):
    """Scores of an image model, and a sheet: a Pillow image with samples, each beside its three nearest
    training pictures. train, test (or None): data sets of pictures. generate(captions, seeds) → (N, 3, S, S)
    uint8. Returns {"seen": {"style by latent": share, …}, "held out": …, "… shuffled": …, "diversity"}."""
    captions, labels, pictures = train.captions, train.labels, train.array
    if test:
        captions, labels = captions + test.captions, labels + test.labels
        pictures = torch.cat([pictures, test.array])
    originals, rng = views(autoencoder, pictures), random.Random(seed)
    groups = {"seen": rng.sample(range(len(train)), min(count, len(train)))}
    if test:
        groups["held out"] = rng.sample(range(len(train), len(captions)), min(count, len(test)))
    scores, shown, names = {}, [], []
    for group, wanted in groups.items():
        samples = generate([captions[i] for i in wanted], [seed] * len(wanted))
        seen = views(autoencoder, samples)
        distance = {view: torch.cdist(seen[view], originals[view]) for view in originals}  # (N, M) each
        for name, order in ((group, wanted), (f"{group}, shuffled", wanted[1:] + wanted[:1])):
            scores[name] = {}
            for view in distance:
                shares = hits(distance[view], order, captions, labels, len(train))
                keys = [f"{key} {view}" for key in ("style", "rank 1", "rank 5")]
                scores[name] |= dict(zip(keys, shares))
        nearest = distance["latent"][:, : len(train)].topk(min(3, len(train)), largest=False).indices
        for sample, i, row in list(zip(samples, wanted, nearest.tolist()))[:12]:
            shown += [sample, *train.array[row]]
            names += [captions[i], *(captions[k] for k in row)]
    some = rng.sample(range(len(train)), min(25, len(train)))
    asked = [(captions[i], seed + k) for i in some for k in range(4)]
    drawn = generate(*map(list, zip(*asked)))
    latents = views(autoencoder, drawn)["latent"].view(len(some), 4, -1)
    spread = torch.stack([F.pdist(four).mean() for four in latents]).mean()
    of_data = F.pdist(originals["latent"][rng.sample(range(len(train)), min(500, len(train)))]).mean()
    scores["diversity"] = (spread / of_data).item()
    return scores, grid(torch.stack(shown), names, columns=2 * (1 + nearest.shape[1]))


def of_clips(autoencoder, films, generate, count, seed=0):
    """Scores of a video model on captions of the clips that it was trained on. films: a data set of clips.
    generate(captions, seeds) → (N, F, 3, S, S) uint8."""
    wanted = random.Random(seed).sample(range(len(films)), min(count, len(films)))
    samples = generate([films.captions[i] for i in wanted], [seed] * len(wanted))
    change = lambda clips: clips.float().diff(dim=1).abs().mean().item()
    scores = {"change over the data's": change(samples) / change(films.array[wanted])}
    for name, k in (("first", 0), ("last", -1)):
        originals, seen = views(autoencoder, films.array[:, k]), views(autoencoder, samples[:, k])
        for view in originals:
            distance = torch.cdist(seen[view], originals[view])
            *_, share = hits(distance, wanted, films.captions, [""] * len(films), len(films))
            scores[f"rank 5 {view}, {name} frame"] = share
    return scores
