"""The judge of evaluate.py: what is in a picture, what moves in a clip, and does it agree with the words? It looks at
pixels alone: it finds the things in a picture and says what each is; only then is that compared with what was asked.
"""
import itertools

import numpy as np

from data import shapes
from data.clips import MOTIONS
from data.shapes import CELLS, COLOURS, SHAPES, SIZES, TEXTURES, Thing, distance, texture_share


def components(mask):
    """Connected regions (8 neighbours) of a boolean picture: a list of (row indices, column indices)."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes its neighbours' largest label until nothing changes
        padded = np.pad(label, 1)
        height, width = label.shape
        largest = np.max([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
        largest = np.where(mask, largest, 0)
        if (largest == label).all():
            return [np.nonzero(label == value) for value in np.unique(label) if value]
        label = largest


def eroded(mask):
    """The pixels of a boolean picture whose four neighbours belong to it too; all of them if that leaves too few."""
    p = np.pad(mask, 1, constant_values=True)
    inner = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return inner if inner.sum() > 3 else mask


def name_colour(pixels):
    """The nearest name to the brighter half (the other half may be a texture's dark tone) of pixels (K, 3)."""
    value = pixels.max(1)
    colour = np.median(pixels[value >= np.median(value)], axis=0)
    hue = {name: np.array(c) / max(c) for name, c in COLOURS.items()}  # blurred textures are darker, of the same hue
    return min(hue, key=lambda name: np.square(colour / max(colour.max(), 1) - hue[name]).sum())


def look(picture):
    """What is in a picture? (S, S, 3) uint8 → a list of Things, from pixels alone.

    Background: the median colour of the border. Foreground: what differs from it, in connected regions of some size.
    Colour: the nearest name to a region's inner pixels. Shape: the outline that fits its silhouette best. Texture:
    the pattern that fits its brightness best. Size: by area.
    """
    S = len(picture)
    image = picture.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.abs(image - background).max(-1)
    found = []
    # a pixel at an edge, which two near things may share, is much paler than its neighbours: it parts the things
    strongest = np.max([np.roll(contrast, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
    for rows, columns in components((contrast > 48) & (contrast > 0.45 * strongest)):
        if len(rows) < 0.006 * S * S:
            continue
        top, bottom = max(0, rows.min() - 1), min(S, rows.max() + 2)
        left, right = max(0, columns.min() - 1), min(S, columns.max() + 2)
        window = image[top:bottom, left:right]
        own = np.zeros(window.shape[:2], bool)
        own[rows - top, columns - left] = True
        colour = name_colour(window[eroded(own)])
        # how much of each pixel in and beside the region it covers, 0…1
        full = np.abs(np.array(COLOURS[colour]) - background).max()
        beside = ~eroded(~own)
        cover = np.where(beside, contrast[top:bottom, left:right] / full, 0).clip(0, 1)
        x = (left + right) / 2
        y = (top + bottom) / 2
        r = np.sqrt(cover.sum() / np.pi)
        shape, x, y, r = best_shape(cover, left, top, x, y, r)
        texture = best_texture(window, left, top, shape, x, y, r, colour, S)
        size = min(SIZES, key=lambda s: abs(np.log(SIZES[s] * S / r)))
        found.append(Thing(shape, colour, texture, size, x / S, y / S, r / S))
    return found


def grid(window, left, top, x, y):
    """Pixel centres of a window (h, w) relative to candidates' centres x, y (K, 1, 1): two arrays (K, h, w)."""
    u = np.arange(left, left + window.shape[1], dtype=np.float32)[None, None, :] + 0.5 - x
    v = np.arange(top, top + window.shape[0], dtype=np.float32)[None, :, None] + 0.5 - y
    return np.broadcast_arrays(u, v)


def candidates(*choices):
    """All combinations, as one (K, 1, 1) array for each list of choices."""
    return (np.array(c, np.float32)[:, None, None] for c in zip(*itertools.product(*choices)))


def best_shape(cover, left, top, x, y, r):
    """The shape, centre and radius whose outline is nearest to a silhouette `cover` (h, w)."""
    dx, dy, scale = candidates((-0.6, 0, 0.6), (-0.6, 0, 0.6), (0.94, 1.0, 1.06))
    u, v = grid(cover, left, top, x + dx, y + dy)
    best = (np.inf, None)
    for shape in SHAPES:
        outline = (0.5 - distance(shape, u / (r * scale), v / (r * scale)) * r * scale).clip(0, 1)
        error = np.square(outline - cover).sum((1, 2))  # (K,)
        k = error.argmin()
        if error[k] < best[0]:
            best = (error[k], (shape, x + dx[k, 0, 0], y + dy[k, 0, 0], r * scale[k, 0, 0]))
    return best[1]


def best_texture(window, left, top, shape, x, y, r, colour, S):
    """The texture whose pattern is nearest to a window (h, w, 3), well inside the outline."""
    dx, dy = candidates((-0.7, 0, 0.7), (-0.7, 0, 0.7))
    u, v = grid(window[..., 0], left, top, x + dx, y + dy)
    inside = distance(shape, u[4] / r, v[4] / r) * r < -1.0  # candidate 4 of 9 is the middle
    if not inside.any():
        return "solid"
    dark = ((1 - window.max(-1) / max(COLOURS[colour])) / 0.72).clip(0, 1)
    errors = {
        texture: np.square(texture_share(texture, u, v, shapes.PERIOD * S) - dark)[:, inside].mean(1).min()
        for texture in TEXTURES
    }
    return min(errors, key=errors.get)


def judge(found, prompt, column):
    """1.0 if a list of Things, as look() gives it, is what the prompt says in what the column asks for, else 0.0."""
    named = prompt.things
    if len(found) != len(named):
        return 0.0
    asked = {"color": ["colour"], "shape": ["shape"], "texture": ["texture"], "complex": ["colour", "shape", "texture"]}
    asked = asked.get(column, ["colour", "shape"])
    other = [key for key in ("shape", "colour") if key not in asked] or ["shape", "colour"]

    def agree(pairs, keys):
        return sum(getattr(a, key) == getattr(b, key) for a, b in pairs for key in keys)

    # name the found things by the other attributes first; where that leaves a choice, do not choose in favour
    orders = (list(zip(named, order)) for order in itertools.permutations(found))
    pairs = max(orders, key=lambda p: (agree(p, other), -agree(p, asked)))
    if agree(pairs, asked) < len(named) * len(asked):
        return 0.0
    matched = [b for _, b in pairs]
    if column == "complex" and any(a.size and a.size != b.size for a, b in pairs):
        return 0.0
    return float(prompt.relation is None or shapes.holds(prompt.relation, *matched[:2]))


# ------------------------------------------------------------------------------------------------------------- clips


def follow(found, things):
    """Tracks of the named things through a clip. found: for each frame, the Things that look() found; things: those that
    the words name. In the first frame each named thing takes the found one that agrees with it most in colour and shape;
    from then on tracks go where the sum of squared ways is least, and unlikeness counts (0.1 each). Returns a list
    of tracks, each a list of F Things, or None if a frame has not as many things as were named."""
    if any(len(frame) != len(things) for frame in found):
        return None
    unlike = lambda a, b: (a.colour != b.colour) + (a.shape != b.shape)
    tracks = [min(itertools.permutations(found[0]), key=lambda order: sum(map(unlike, things, order)))]
    for frame in found[1:]:
        cost = lambda a, b: (a.x - b.x) ** 2 + (a.y - b.y) ** 2 + 0.1 * unlike(a, b)
        tracks.append(min(itertools.permutations(frame), key=lambda order: sum(map(cost, tracks[-1], order))))
    return [list(track) for track in zip(*tracks)]


def motion_of(track):
    """The name of the motion of a track of F Things, by its whole way (half a cell or more counts) and growth; None for a
    way that is not straight or steady: a frame more than 0.8 cells away from the line through all."""
    i = np.arange(len(track)) - (len(track) - 1) / 2
    paths = np.array([[thing.x * CELLS, thing.y * CELLS] for thing in track])  # (F, 2), in cells
    slope = (i[:, None] * paths).sum(0) / np.square(i).sum()  # a frame
    if np.abs(paths - paths.mean(0) - i[:, None] * slope).max() > 0.8:
        return None
    way = paths[-1] - paths[0]
    x, y = np.sign(way) * (np.abs(way) > 0.5)
    size = np.round(np.log(track[-1].r / track[0].r) / np.log(SIZES["big"] / SIZES["small"])).clip(-1, 1)
    moved = (int(x), int(y), 0 if x or y else int(size))
    return next(name for name, motion in MOTIONS.items() if motion == moved)


def judge_clip(clip, things, motions):
    """A clip (F, S, S, 3) uint8 against its words. Returns (scores, found): found is what look() saw in each frame, and
    the scores, each 0…1:

    motion     1 if the named things are there and each moves as told
    identity   share of the frames in which a thing has the colour, shape and texture that it mostly has
    flicker    change from a frame to the next, mean over pixels, that what the things do does not explain
    amount     how far things go, as a share of the way from the first cell of a row to its last
    """
    found = [look(frame) for frame in clip]
    rest = clip.astype(np.float32) - np.stack([shapes.draw(frame, clip.shape[1]) for frame in found])
    scores = dict(motion=0.0, identity=0.0, flicker=float(np.abs(np.diff(rest, axis=0)).mean() / 255), amount=0.0)
    tracks = follow(found, things)
    if tracks is not None:
        scores["motion"] = float(all(motion_of(track) == motion for track, motion in zip(tracks, motions)))
        kinds = [[(thing.colour, thing.shape, thing.texture) for thing in track] for track in tracks]
        scores["identity"] = float(np.mean([max(map(kind.count, kind)) / len(kind) for kind in kinds]))
        ways = [np.hypot(track[-1].x - track[0].x, track[-1].y - track[0].y) for track in tracks]
        scores["amount"] = float(min(1.0, np.mean(ways) * CELLS / (CELLS - 1)))
    return scores, found
