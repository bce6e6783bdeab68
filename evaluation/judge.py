"""The judge of evaluate.py. It finds the things in a picture, and how they move in a clip, from pixels alone.
Only then does it compare them with the prompt.

Letters: S pixels of a side, F frames, h and w a window in pixels, K candidates of a fit.
"""
import itertools

import numpy as np

from data import shapes
from data.moving_shapes import MOTIONS
from data.shapes import CELLS, COLOURS, PERIOD, SHAPES, SIZES, TEXTURES, Thing, distance, texture_share
from evaluation.prompts import COLUMNS


def look(picture):
    """What is in a picture: (S, S, 3) uint8 → list of Things.

    Background: the median colour of the border. Foreground: connected regions that differ from it.
    Colour: the nearest name to a region's inner pixels. Shape: the outline that fits its silhouette best.
    Texture: the pattern that fits its brightness best. Size: by its radius."""
    S = len(picture)
    image = picture.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.abs(image - background).max(-1)  # (S, S)
    # an edge pixel, which two close things may share, is much paler than its neighbours: without it they part
    strongest = np.max([np.roll(contrast, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
    found = []
    for region in regions((contrast > 48) & (contrast > 0.45 * strongest), 0.006 * S * S):
        rows, columns = np.nonzero(region)
        top, bottom = max(0, rows.min() - 1), min(S, rows.max() + 2)
        left, right = max(0, columns.min() - 1), min(S, columns.max() + 2)
        part = np.s_[top:bottom, left:right]  # (h, w)
        colour = nearest_colour(image[part][eroded(region[part])])
        full = np.abs(np.array(COLOURS[colour]) - background).max()  # contrast of a pixel covered completely
        grown = ~eroded(~region[part])  # with the pale edge
        cover = np.where(grown, contrast[part] / full, 0).clip(0, 1)  # (h, w)
        r = np.sqrt(cover.sum() / np.pi)
        shape, x, y, r = best_shape(cover, left, top, (left + right) / 2, (top + bottom) / 2, r)
        texture = best_texture(image[part], left, top, shape, x, y, r, colour, PERIOD * S)
        size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] * S / r)))
        found.append(Thing(shape, colour, texture, size, x / S, y / S, r / S))
    return found


def regions(mask, least):
    """The connected regions (8 neighbours) of a boolean picture with at least `least` pixels, each a mask."""
    height, width = mask.shape
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the largest label among its neighbours, until nothing changes
        padded = np.pad(label, 1)
        largest = np.max([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
        largest = np.where(mask, largest, 0)
        if (largest == label).all():
            counts = zip(*np.unique(label, return_counts=True))
            return [label == value for value, count in counts if value and count >= least]
        label = largest


def eroded(mask):
    """The pixels of a boolean picture whose four neighbours belong to it too; all pixels if at most 3 do."""
    p = np.pad(mask, 1, constant_values=True)
    inner = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return inner if inner.sum() > 3 else mask


def nearest_colour(pixels):
    """The colour's name, by the brighter half of pixels (K, 3): the other may be a texture's dark tone."""
    value = pixels.max(1)
    colour = np.median(pixels[value >= np.median(value)], axis=0)
    hue = {name: np.array(c) / max(c) for name, c in COLOURS.items()}  # a blurred texture keeps its hue
    return min(hue, key=lambda name: np.square(colour / max(colour.max(), 1) - hue[name]).sum())


def candidates(window, left, top, x, y, shifts, scales=(1.0,)):
    """Places for a centre near (x, y), and scales, in all K combinations: three arrays (K, 1, 1). With them
    the pixel centres of a window (h, w, …), relative to these places: two arrays (K, h, w)."""
    choices = np.array(list(itertools.product(shifts, shifts, scales)), np.float32)  # (K, 3)
    dx, dy, scale = choices.T[:, :, None, None]
    x, y = x + dx, y + dy
    height, width = window.shape[:2]
    u = np.arange(left, left + width, dtype=np.float32) + 0.5 - x
    v = np.arange(top, top + height, dtype=np.float32)[:, None] + 0.5 - y
    return x, y, scale, *np.broadcast_arrays(u, v)


def best_shape(cover, left, top, x, y, r):
    """Shape, centre and radius whose outline is nearest to a silhouette (h, w); x, y, r: a first guess."""
    x, y, scale, u, v = candidates(cover, left, top, x, y, (-0.6, 0, 0.6), (0.94, 1.0, 1.06))
    r = r * scale
    fits = []
    for shape in SHAPES:
        outline = (0.5 - distance(shape, u / r, v / r) * r).clip(0, 1)
        error = np.square(outline - cover).sum((1, 2))  # (K,)
        k = error.argmin()
        fits.append((error[k], shape, x[k, 0, 0], y[k, 0, 0], r[k, 0, 0]))
    return min(fits, key=lambda fit: fit[0])[1:]


def best_texture(window, left, top, shape, x, y, r, colour, period):
    """The texture whose pattern is nearest to a window (h, w, 3), well inside the outline."""
    *_, u, v = candidates(window, left, top, x, y, (-0.7, 0, 0.7))
    inside = distance(shape, u[4] / r, v[4] / r) * r < -1.0  # candidate 4 of 9 is the middle
    if not inside.any():
        return "solid"
    dark = ((1 - window.max(-1) / max(COLOURS[colour])) / 0.72).clip(0, 1)
    errors = {t: np.square(texture_share(t, u, v, period) - dark)[:, inside].mean(1).min() for t in TEXTURES}
    return min(errors, key=errors.get)


def judge(found, prompt, column):
    """1.0 if the Things that look() found show what the column asks of the prompt, else 0.0."""
    named = prompt.things
    if len(found) != len(named):
        return 0.0
    asked, known_by = COLUMNS[column]
    agreement = lambda pairs, keys: sum(getattr(a, key) == getattr(b, key) for a, b in pairs for key in keys)
    # which found thing is which, by the attributes in known_by; a tie is decided against the picture
    orders = [list(zip(named, order)) for order in itertools.permutations(found)]
    pairs = max(orders, key=lambda pairs: (agreement(pairs, known_by), -agreement(pairs, asked)))
    right = agreement(pairs, asked) == len(named) * len(asked)
    sizes = column != "complex" or all(a.size in ("", b.size) for a, b in pairs)
    related = prompt.relation is None or shapes.holds(prompt.relation, pairs[0][1], pairs[1][1])
    return float(right and sizes and related)


def follow(found, things):
    """Tracks of the named things through a clip, each a list of F Things; None if a frame has not as many.
    found: what look() found in each frame. In the first frame, colour and shape tell which is which. Then
    tracks take the shortest squared distances, plus 0.1 for each change of colour or shape."""
    if any(len(frame) != len(things) for frame in found):
        return None
    unlike = lambda a, b: (a.colour != b.colour) + (a.shape != b.shape)
    cost = lambda a, b: (a.x - b.x) ** 2 + (a.y - b.y) ** 2 + 0.1 * unlike(a, b)
    frames = [min(itertools.permutations(found[0]), key=lambda order: sum(map(unlike, things, order)))]
    for frame in found[1:]:
        frames.append(min(itertools.permutations(frame), key=lambda order: sum(map(cost, frames[-1], order))))
    return [list(track) for track in zip(*frames)]


def motion_of(track):
    """The motion's name, by how far a track of F Things goes (more than half a cell counts) and how it grows.
    None if it is not straight and steady: some frame lies more than 0.8 cells from the line fitted to all."""
    i = np.arange(len(track)) - (len(track) - 1) / 2
    position = np.array([[thing.x * CELLS, thing.y * CELLS] for thing in track])  # (F, 2), in cells
    slope = (i[:, None] * position).sum(0) / np.square(i).sum()  # (2,), cells a frame
    if np.abs(position - position.mean(0) - i[:, None] * slope).max() > 0.8:
        return None
    way = position[-1] - position[0]
    x, y = np.sign(way) * (np.abs(way) > 0.5)
    growth = np.round(np.log(track[-1].r / track[0].r) / np.log(SIZES["big"] / SIZES["small"])).clip(-1, 1)
    signs = (int(x), int(y), 0 if x or y else int(growth))
    return next(name for name, motion in MOTIONS.items() if motion == signs)


def judge_clip(clip, things, motions):
    """The scores, each 0…1, of a clip (F, S, S, 3) uint8 against the named things and their motions:

    motion     1 if all named things are there and move as named
    identity   share of the frames in which a thing has the colour, shape and texture that it mostly has
    flicker    mean change of a pixel between frames that the found things do not explain
    amount     how far things go, as a share of the way from the first cell of a row to the last"""
    found = [look(frame) for frame in clip]
    rest = clip.astype(np.float32) - np.stack([shapes.draw(frame, clip.shape[1]) for frame in found])
    flicker = float(np.abs(np.diff(rest, axis=0)).mean() / 255)
    tracks = follow(found, things)
    if tracks is None:
        return dict(motion=0.0, identity=0.0, flicker=flicker, amount=0.0)
    motion = float(all(motion_of(track) == name for track, name in zip(tracks, motions)))
    kinds = [[(thing.colour, thing.shape, thing.texture) for thing in track] for track in tracks]
    identity = float(np.mean([max(map(kind.count, kind)) / len(kind) for kind in kinds]))
    ways = [np.hypot(track[-1].x - track[0].x, track[-1].y - track[0].y) for track in tracks]
    amount = float(min(1.0, np.mean(ways) * CELLS / (CELLS - 1)))
    return dict(motion=motion, identity=identity, flicker=flicker, amount=amount)
