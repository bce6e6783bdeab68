"""A CLIP and a T5 in miniature, each trained as its paper did, on the captions of one data set, then frozen.

    CLIP   contrastive (Radford et al. 2021): of the captions of a batch, which one belongs to this picture? A
           small transformer over latent patches looks at the pictures, and is thrown away.
    T5     masked language modelling: pieces of a caption are hidden, and predicted in their places. (T5's own
           task, spans predicted by a decoder, is the same with a decoder.) It never sees a picture.

Each is written as a published folder, for --clip and --t5. claims.py compares them. Their sizes are those of
the mini T5 that trains along with the image model.

Letters: B batch, L text tokens, N latent patches, E width.
"""
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.figures import from_bytes
from encoders import weights
from encoders.clip import END, START, CLIPConfig, CLIPTextEncoder, CLIPTokenizer, byte_letters, words
from encoders.t5 import T5Config, T5Encoder, Tokenizer

WIDTH, DEPTH, HEADS, MLP_WIDTH, LENGTH = 128, 2, 4, 384, 64
HIDDEN = 0.3  # share of a caption's pieces that T5 predicts
UNKNOWN = 2  # the piece that stands for a hidden one


def byte_pairs(captions, merges=2000):
    """Captions → vocabulary {piece: id} and merges, a list of pairs: the most frequent neighbours become one
    piece, again and again (Sennrich et al. 2016), until every word is one."""
    letters = byte_letters()
    counts = Counter(word for caption in captions for word in words(caption))
    pairs = []
    while len(pairs) < merges:
        tokenizer, found = CLIPTokenizer({}, pairs), Counter()
        for word in counts:
            for pair in pairwise(tokenizer.pieces(word)):
                found[pair] += counts[word]
        if not found:
            break
        pairs.append(max(found, key=lambda pair: (found[pair], pair)))
    pieces = [*letters.values(), *(f"{letter}</w>" for letter in letters.values()), *map("".join, pairs)]
    return {piece: i for i, piece in enumerate([*pieces, START, END])}, pairs


class PictureTower(nn.Module):
    """Latents (B, C, h, w) → (B, E): 2×2 patches, learned positions, a transformer, the mean."""

    def __init__(self, channels, patches):
        super().__init__()
        self.patch = nn.Conv2d(channels, WIDTH, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, WIDTH))
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, latents):
        x = self.patch(latents).flatten(2).transpose(1, 2)  # (B, N, E)
        return self.blocks(x + self.positions).mean(1)  # (B, E)


def contrastive_loss(pictures, captions, log_scale):
    """The mean of two cross-entropies over the B×B cosines: which caption of this picture, which picture of
    this caption? pictures, captions (B, E)."""
    cosines = F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T  # (B, B)
    logits, own = log_scale.exp() * cosines, torch.arange(len(cosines))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def masked_loss(encoder, tokens, mask, hidden):
    """The cross-entropy of the hidden pieces, predicted in their places by the embedding turned around.
    tokens (B, L); mask (B, L), True = a token; hidden (B, L), True = hidden."""
    seen = tokens.masked_fill(hidden, UNKNOWN)
    found = encoder(seen, mask)[hidden] / WIDTH**0.5  # (hidden pieces, E)
    return F.cross_entropy(found @ encoder.embedding.weight.T, tokens[hidden])


def optimise(title, parameters, steps, loss_of, lr=1e-3):
    """AdamW with a linear warm-up and cool-down. loss_of(step) → a loss. Returns the last loss."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    rising = lambda step: min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rising)
    for step in (bar := tqdm(range(steps), title, disable=None)):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def pretrain_clip(out, dataset, autoencoder, seed=0, steps=600, batch_size=128):
    """Writes a CLIP text tower trained on a data set's pictures and captions to the folder `out`."""
    torch.manual_seed(seed)
    vocabulary, pairs = byte_pairs(dataset.captions)
    tokenizer = CLIPTokenizer(vocabulary, pairs, LENGTH)
    text = CLIPTextEncoder(CLIPConfig(len(tokenizer), WIDTH, DEPTH, HEADS, MLP_WIDTH, LENGTH))
    for table in (text.embedding, text.positions):
        nn.init.normal_(table.weight, std=0.02)
    side = dataset.size // autoencoder.factor // 2
    picture, log_scale = PictureTower(autoencoder.config.channels, side**2), nn.Parameter(torch.tensor(2.66))

    def loss_of(step):
        indices = torch.randint(len(dataset), (batch_size,)).tolist()
        with torch.no_grad():
            latents = autoencoder.encode(from_bytes(dataset.pictures(indices)))
        tokens, mask = tokenizer([dataset.captions[i] for i in indices])
        ends = text(tokens, mask)[torch.arange(len(tokens)), mask.sum(1) - 1]  # (B, E), at the end of text
        return contrastive_loss(picture(latents), ends, log_scale)

    loss = optimise("CLIP", [*text.parameters(), *picture.parameters(), log_scale], steps, loss_of)
    config = dict(
        model_type="clip_text_model", vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=MLP_WIDTH, max_position_embeddings=LENGTH,
    )
    lines = "\n".join(["#version: 0.2", *map(" ".join, pairs)])
    files = {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": lines.encode()}
    write_folder(out, config, text, files)
    return loss


def pretrain_t5(out, captions, seed=0, steps=1000, batch_size=128):
    """Writes a T5 encoder trained on captions to the folder `out`."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(captions)
    encoder = T5Encoder(T5Config(len(tokenizer) + 100, WIDTH, DEPTH, HEADS, mlp_width=MLP_WIDTH))

    def loss_of(step):
        tokens, mask = tokenizer([captions[i] for i in torch.randint(len(captions), (batch_size,)).tolist()])
        hidden = (torch.rand(tokens.shape) < HIDDEN) & mask
        hidden[:, 0] = True  # never none
        return masked_loss(encoder, tokens, mask, hidden)

    loss = optimise("T5", encoder.parameters(), steps, loss_of)
    config = dict(
        model_type="t5", vocab_size=len(tokenizer) + 100, d_model=WIDTH, num_layers=DEPTH, num_heads=HEADS,
        d_kv=encoder.config.head_width, d_ff=MLP_WIDTH, feed_forward_proj="gated-gelu",
    )
    write_folder(out, config, encoder, {"spiece.model": tokenizer.model})
    return loss


def write_folder(out, config, encoder, files):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in (files | {"config.json": json.dumps(config).encode()}).items():
        (out / name).write_bytes(data)
    weights.write(out / "model.safetensors", encoder.state_dict())
