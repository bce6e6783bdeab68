"""The score of a model of somebody's pictures: known answers for known samples."""
from types import SimpleNamespace

import pytest
import torch

from encoders.autoencoder import Autoencoder, AutoencoderConfig
from evaluation.likeness import hits, of_clips, of_pictures, views


def data_set(styles, count, seed):
    """Random pictures, as easy to tell apart as can be. Caption: style and number."""
    pictures = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    labels = [styles[i % len(styles)] for i in range(count)]
    captions = [f"{label} {seed} {i}" for i, label in enumerate(labels)]
    return SimpleNamespace(captions=captions, labels=labels, array=pictures)


class Data(SimpleNamespace):
    def __len__(self):
        return len(self.captions)


@pytest.fixture(scope="module")
def autoencoder():
    model = Autoencoder(AutoencoderConfig(48))
    model.start_from(torch.rand(64, 3, 16, 16) * 2 - 1)
    return model


@pytest.fixture
def sets():
    return [Data(**vars(data_set(("flat", "noto"), count, seed))) for count, seed in ((60, 1), (20, 2))]


def drawn(sets):
    """A generator that gives each caption's own picture."""
    own = {caption: picture for data in sets for caption, picture in zip(data.captions, data.array)}
    return lambda captions, seeds: torch.stack([own[caption] for caption in captions])


def test_a_perfect_model_and_chance(autoencoder, sets):
    scores, sheet = of_pictures(autoencoder, *sets, drawn(sets), count=60)
    assert set(scores["seen"].values()) == {1.0}
    held_out = scores["held out"]
    assert held_out["rank 1 latent"] == held_out["rank 1 blurred"] == held_out["rank 5 latent"] == 1
    assert held_out["style latent"] < 1  # the nearest training picture is another emoji
    assert max(scores["seen, shuffled"]["rank 1 latent"], scores["held out, shuffled"]["rank 1 blurred"]) <= 0.1
    assert 0.2 < scores["seen, shuffled"]["style blurred"] < 0.8
    assert scores["diversity"] == 0 and sheet.size[0] > 8 * 32
    alone, _ = of_pictures(autoencoder, sets[0], None, drawn(sets), count=9)
    assert set(alone) == {"seen", "seen, shuffled", "diversity"}


def test_ranks_and_styles_by_hand():
    captions, labels = ["a 1", "a 2", "a 2", "b 1", "a 3", "b 2"], ["a", "a", "a", "b", "a", "b"]
    distance = torch.tensor([[3.0, 2.0, 9.0, 1.0, 4.0, 0.5]])  # the last two are held out
    # within a: 2, 1, 3, 2'; nearest training picture: b 1
    assert hits(distance, [0], captions, labels, 4) == [0, 0, 1]
    assert hits(distance, [2], captions, labels, 4) == [0, 1, 1]  # its twin is as right
    assert hits(distance, [3], captions, labels, 4) == [1, 0, 1]  # b 2 is nearer, but held out
    many = torch.arange(9.0)[None]
    assert hits(many, [5], list("abcdefghi"), ["x"] * 9, 9) == [1, 0, 0]
    assert hits(many, [4], list("abcdefghi"), ["x"] * 9, 9) == [1, 0, 1]


def test_blurring_is_a_mean_over_squares(autoencoder):
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    picture[..., ::2, ::2] = 255
    assert torch.allclose(views(autoencoder, picture)["blurred"], torch.tensor(-0.5))


def test_clips(autoencoder):
    films = Data(captions=[f"clip {i}" for i in range(12)], array=torch.randint(0, 256, (12, 4, 3, 16, 16), dtype=torch.uint8))
    scores = of_clips(autoencoder, films, drawn([films]), count=12)
    assert set(scores.values()) == {1.0} and len(scores) == 5
    still = lambda captions, seeds: drawn([films])(captions, seeds)[:, :1].expand(-1, 4, -1, -1, -1)
    scores = of_clips(autoencoder, films, still, count=12)
    assert scores["change over the data's"] == 0 and scores["rank 5 latent, first frame"] == 1
    assert scores["rank 5 latent, last frame"] < 1
