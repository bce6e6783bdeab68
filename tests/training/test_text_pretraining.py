"""The small CLIP and T5 that claims.py trains."""
import math

import pytest
import torch

from data.shapes import Shapes
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from encoders.clip import load_clip
from encoders.t5 import T5Config, T5Encoder, load_t5
from training.text_pretraining import byte_pairs, contrastive_loss, masked_loss, pretrain_clip, pretrain_t5


def test_every_word_becomes_one_piece():
    captions = Shapes(32, count=500).captions
    vocabulary, pairs = byte_pairs(captions)
    words = {word for caption in captions for word in caption.replace(",", " ,").split()}
    assert all(f"{word}</w>" in vocabulary for word in words) and len(pairs) < 400
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert byte_pairs(["a cat", "a hat at a mat"])[1][:2] == [("a", "t</w>"), ("m", "at</w>")]  # at: 4 times; then a tie


def test_the_contrastive_loss_by_hand():
    pictures, captions = torch.tensor([[2.0, 0], [0, 3.0]]), torch.tensor([[5.0, 0], [0, 1.0]])
    right = contrastive_loss(pictures, captions, torch.tensor(1.0)).item()
    assert right == pytest.approx(math.log(1 + math.exp(-math.e)), rel=1e-5)
    wrong = contrastive_loss(pictures, captions.flip(0), torch.tensor(1.0)).item()
    assert wrong == pytest.approx(math.log(1 + math.exp(math.e)), rel=1e-5)


def test_hidden_pieces_are_not_seen():
    encoder = T5Encoder(T5Config(50, 128, 1))
    tokens, mask = torch.randint(3, 50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[:, 2] = True
    logits = encoder(torch.where(hidden, 2, tokens), mask)[:, 2] / 128**0.5 @ encoder.embedding.weight.T
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 2])
    assert torch.allclose(masked_loss(encoder, tokens, mask, hidden), expected)


def test_they_learn_and_load_as_published_ones(tmp_path):
    dataset = Shapes(32, count=64)
    autoencoder = Autoencoder(AutoencoderConfig(4, 16))
    first = pretrain_clip(tmp_path / "clip", dataset, autoencoder, steps=1, batch_size=16)
    last = pretrain_clip(tmp_path / "clip", dataset, autoencoder, steps=80, batch_size=16)
    assert last < 0.9 * first
    first = pretrain_t5(tmp_path / "t5", dataset.captions, steps=1, batch_size=16)
    last = pretrain_t5(tmp_path / "t5", dataset.captions, steps=60, batch_size=16)
    assert last < 0.6 * first
    for load, name in ((load_clip, "clip"), (load_t5, "t5")):
        tokenizer, encoder = load(tmp_path / name, torch.float32)
        tokens, mask = tokenizer(dataset.captions[:3])
        assert encoder(tokens, mask).shape == (3, tokens.shape[1], 128) and not tokenizer.unknown(dataset.captions[0])
