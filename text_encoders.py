"""Text → vectors: a T5 encoder (Raffel et al. 2020; gated GELU as in T5 1.1 and Flan-T5) and its tokenizer.

T5 in five lines: token embeddings without positions; blocks of self-attention and gated MLP, each x + f(RMSNorm(x));
no bias anywhere; queries and keys are not scaled by sqrt(d); the only sense of order is a learned number for every
bucket of distances, added to the attention scores of every block; one last RMSNorm.

The mini size trains along with the image model, on a sentencepiece model trained from the captions.
Letters: B batch, L text tokens, E width, H heads, d width of a head. Masks: True = a token, False = padding.
"""
import io
import math
from dataclasses import dataclass

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class T5Config:
    """Defaults: the mini size. The published sizes differ in nothing but these numbers."""

    vocabulary: int = 512
    width: int = 128
    depth: int = 2
    heads: int = 4
    head_width: int = 48
    mlp_width: int = 384
    buckets: int = 32
    max_distance: int = 128


def relative_buckets(length, buckets, max_distance, device=None):
    """Bucket of the distance from query i to key j, (L, L) integers in 0…buckets-1: half of them for keys to the right;
    in each half one bucket a distance for the near ones, then logarithmically wider up to max_distance."""
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]  # (L, L), key minus query
    half = buckets // 2
    near = half // 2
    far = near + (distance.abs().clamp(min=1) / near).log() / math.log(max_distance / near) * (half - near)
    bucket = torch.where(distance.abs() < near, distance.abs(), far.long().clamp(max=half - 1))
    return bucket + half * (distance > 0)


def directed_bias(buckets, max_distance, heads):
    """Starting values of the relative bias, (buckets, H): minus slope · distance, and 4 less for keys on the side that
    a head does not look at. The slope falls from 1 in the first pair of heads to 0.3 in the last."""
    near = buckets // 4
    k = torch.arange(2 * near)
    distance = torch.where(k < near, k, near * (max_distance / near) ** ((k - near) / near))  # a bucket's nearest
    distance, right = distance.repeat(2), torch.arange(buckets) >= 2 * near  # (buckets,)
    slope = 0.3 ** torch.linspace(0, 1, (heads + 1) // 2).repeat_interleave(2)[:heads]  # (H,)
    looks_right = torch.arange(heads) % 2 == 1  # (H,)
    away = (right[:, None] != looks_right) & (distance[:, None] > 0)  # (buckets, H)
    return -slope * distance[:, None] - 4.0 * away


class T5Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.norm1 = nn.RMSNorm(config.width, eps=1e-6)
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-6)
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x, bias):
        """x (B, L, E); bias (B, H, L, L), added to the scores, very negative at padding → (B, L, E)"""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, d)
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, L, E)
        y = self.norm2(x)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))  # (B, L, E)


class T5Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.relative_bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.initialise()

    def forward(self, tokens, mask):
        """tokens (B, L) integers, mask (B, L) True = a token → (B, L, E). What stands at padding is not meaningful."""
        buckets = relative_buckets(tokens.shape[1], self.config.buckets, self.config.max_distance, tokens.device)
        bias = self.relative_bias(buckets).permute(2, 0, 1)[None]  # (1, H, L, L)
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)  # (B, H, L, L)
        x = self.embedding(tokens)  # (B, L, E)
        for block in self.blocks:
            x = block(x, bias)  # (B, L, E)
        return self.norm(x)  # (B, L, E)

    @torch.no_grad()
    def initialise(self):
        """T5's own: every product of a vector with a matrix keeps its variance; queries are smaller by sqrt(d), in
        place of the scaling that the attention does not do. Ours: the relative bias starts as a preference for near
        tokens, on the left in the even heads and on the right in the odd ones, so that from the first step a noun's
        vector holds its adjectives, and whether "above" stands before or after it."""
        c = self.config
        nn.init.normal_(self.embedding.weight)
        self.relative_bias.weight.copy_(directed_bias(c.buckets, c.max_distance, c.heads))
        for block in self.blocks:
            nn.init.normal_(block.q.weight, std=(c.width * c.head_width) ** -0.5)
            for layer in (block.k, block.v, block.out, block.gate, block.up, block.down):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


class Tokenizer:
    """sentencepiece with T5's conventions: 0 is padding, 1 is </s> and ends every text, 2 is unknown."""

    def __init__(self, model):
        """model: the bytes of a sentencepiece model file."""
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, captions, vocabulary=4096):
        """A model of at most `vocabulary` pieces from a list of captions; the same captions give the same. Pieces are
        made by merging (BPE), so that in a small vocabulary every frequent word is one piece."""
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=file, vocab_size=vocabulary,
            hard_vocab_limit=False, model_type="bpe",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
        return cls(file.getvalue())

    def __len__(self):
        return len(self.pieces)

    def __call__(self, captions, length=64):
        """List of B texts → tokens (B, L) and mask (B, L), padded to the longest; longer than `length` is cut."""
        rows = [self.pieces.encode(caption)[: length - 1] + [1] for caption in captions]
        L = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (L - len(row)) for row in rows])  # (B, L)
        mask = torch.arange(L) < torch.tensor([[len(row)] for row in rows])  # (B, L)
        return tokens, mask
