"""Text → vectors: a T5 encoder (Raffel et al. 2020; gated GELU as in T5 1.1 and Flan-T5), the text tower of CLIP
(Radford et al. 2021), and their tokenizers.

T5 in five lines: token embeddings without positions; blocks of self-attention and gated MLP, each x + f(RMSNorm(x));
no bias anywhere; queries and keys are not scaled by sqrt(d); the only sense of order is a learned number for every
bucket of distances, added to the attention scores of every block; one last RMSNorm.

CLIP's tower in three: embeddings of tokens and of 77 positions; blocks of self-attention and MLP, each
x + f(LayerNorm(x)), in which a token sees itself and those before it; one last LayerNorm. So the last token, the end of
text, has seen all others: its vector stands for the text.

The mini T5 trains along with the image model, on a sentencepiece model trained from the captions. Published models are
read by load_t5 and load_clip. All are used alike: tokens, mask = tokenizer(texts); encoder(tokens, mask) → (B, L, E),
with E = encoder.config.width. One vector for a text is made of these in conditioning.py.
Letters: B batch, L text tokens, E width, H heads, d width of a head. Masks: True = a token, False = padding.
"""
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

from attention import MultiHeadAttention
from encoders.clip import END, START, BytePairs
from encoders.weights import check_values, load_into, read_config, whole_number


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

    @classmethod
    def read(cls, folder):
        """From config.json of a published T5 1.1 or Flan-T5. ValueError, naming the file, if it is of something else."""
        config = read_config(folder, "t5")
        check_values(folder, config, feed_forward_proj=("relu", ["gated-gelu"]), layer_norm_epsilon=(1e-6, [1e-6]))
        names = dict(
            vocabulary=("vocab_size", 32128), width=("d_model", 512), depth=("num_layers", 6), heads=("num_heads", 8),
            head_width=("d_kv", 64), mlp_width=("d_ff", 2048), buckets=("relative_attention_num_buckets", 32),
            max_distance=("relative_attention_max_distance", 128),
        )  # fmt: skip
        return cls(**{ours: whole_number(folder, config, *theirs) for ours, theirs in names.items()})


def relative_buckets(length, buckets, max_distance, device=None):
    """Bucket of the distance from query i to key j, (L, L) integers in 0…buckets-1: half of them for keys to the right;
    in each half one bucket a distance for the near ones, then logarithmically wider up to max_distance."""
    position = torch.arange(length, device=device)
    distance = position - position.unsqueeze(1)  # (L, L), key minus query
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
        """tokens (B, L) integers, mask (B, L) True = a token → (B, L, E). What stands at padding is not meaningful.
        ValueError in fp16."""
        if self.embedding.weight.dtype is torch.float16:
            raise ValueError("T5 overflows in fp16: it runs in bf16 or fp32")
        buckets = relative_buckets(tokens.shape[1], self.config.buckets, self.config.max_distance, tokens.device)
        bias = self.relative_bias(buckets).permute(2, 0, 1).unsqueeze(0)  # (1, H, L, L)
        bias = bias.masked_fill(mask.logical_not().view(len(mask), 1, 1, -1), torch.finfo(bias.dtype).min)  # (B, H, L, L)
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


def padded(rows, padding):
    """List of B lists of ids → tokens (B, L) and mask (B, L), padded on the right to the longest."""
    L = max(map(len, rows))
    tokens = torch.tensor([row + [padding] * (L - len(row)) for row in rows])  # (B, L)
    mask = torch.arange(L) < torch.tensor([[len(row)] for row in rows])  # (B, L)
    return tokens, mask


class Tokenizer:
    """sentencepiece with T5's conventions: 0 is padding, 1 is </s> and ends every text, 2 is unknown."""

    def __init__(self, model, length=64, extra=0):
        """model: the bytes of a sentencepiece model file. length: where texts are cut. extra: how many <extra_id_0>, …
        follow the pieces, numbered from the last one down (the published models have 100, for their training; there
        these and the three marks are also read where they are written in a text)."""
        self.model, self.length = model, length
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.marks = {f"<extra_id_{i}>": len(self.pieces) + extra - 1 - i for i in range(extra)}
        self.marks |= {"<pad>": 0, "</s>": 1, "<unk>": 2} if extra else {}
        self.split = re.compile(f"({'|'.join(self.marks)})") if extra else None

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
        return len(self.pieces) + max(len(self.marks) - 3, 0)

    def encode(self, text):
        """Text → list of ids, without the end."""
        if self.split is None:
            return self.pieces.encode(text)
        parts = self.split.split(text)
        return sum(([self.marks[part]] if part in self.marks else self.pieces.encode(part) for part in parts), [])

    def __call__(self, captions, length=None):
        """List of B texts → tokens (B, L) and mask (B, L), padded to the longest; longer than `length` is cut."""
        return padded([self.encode(caption)[: (length or self.length) - 1] + [1] for caption in captions], 0)


@dataclass
class CLIPConfig:
    """Defaults: the text tower of ViT-L/14."""

    vocabulary: int = 49408
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    positions: int = 77
    activation: str = "quick_gelu"  # or gelu

    @classmethod
    def read(cls, folder):
        """From config.json of a published CLIP, whole or its text tower alone. ValueError, naming the file, if it is of
        something else."""
        config = read_config(folder, "clip_text_model", "clip")
        if config["model_type"] == "clip":  # where a "text_config_dict" is, it is the one that counts
            config = config.get("text_config_dict") or config.get("text_config") or {}
        check_values(folder, config, layer_norm_eps=(1e-5, [1e-5]), hidden_act=("quick_gelu", ["quick_gelu", "gelu"]))
        names = dict(
            vocabulary=("vocab_size", 49408), width=("hidden_size", 512), depth=("num_hidden_layers", 12),
            heads=("num_attention_heads", 8), mlp_width=("intermediate_size", 2048),
            positions=("max_position_embeddings", 77),
        )  # fmt: skip
        numbers = {ours: whole_number(folder, config, *theirs) for ours, theirs in names.items()}
        return cls(**numbers, activation=config.get("hidden_act", "quick_gelu"))


class CLIPBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = MultiHeadAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x, mask):
        """x (B, L, E); mask (B, 1, L, L) → (B, L, E)"""
        x = x + self.attention(self.norm1(x), mask=mask)  # (B, L, E)
        y = self.up(self.norm2(x))  # (B, L, mlp_width)
        y = y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y)
        return x + self.down(y)  # (B, L, E)


class CLIPTextEncoder(nn.Module):
    """Always filled with published weights, so it has no initialisation of its own."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.blocks = nn.ModuleList(CLIPBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens, mask):
        """tokens (B, L) integers, mask (B, L) True = a token → (B, L, E), the last hidden state after the last LayerNorm.
        What stands at padding is not meaningful. ValueError if L is more than the model has positions."""
        L = tokens.shape[1]
        if L > self.config.positions:
            raise ValueError(f"{L} tokens, but this CLIP has {self.config.positions} positions")
        before = torch.ones(L, L, dtype=torch.bool, device=tokens.device).tril()  # (L, L), itself and those before it
        mask = before & mask.view(len(mask), 1, 1, -1)  # (B, 1, L, L)
        x = self.embedding(tokens) + self.positions(torch.arange(L, device=tokens.device))  # (B, L, E)
        for block in self.blocks:
            x = block(x, mask)  # (B, L, E)
        return self.norm(x)  # (B, L, E)


class CLIPTokenizer:
    """Byte pairs between a start and an end of text; the end also fills up, and there the mask is False."""

    def __init__(self, pairs, length=77):
        """pairs: a BytePairs. length: where texts are cut, start and end included."""
        self.pairs, self.length = pairs, length
        self.start, self.end = (pairs.vocabulary[mark] for mark in (START, END))

    def __len__(self):
        return max(self.pairs.vocabulary.values()) + 1

    def __call__(self, captions, length=None):
        """List of B texts → tokens (B, L) and mask (B, L), padded to the longest; longer than `length` is cut."""
        room = (length or self.length) - 2
        return padded([[self.start, *self.pairs.encode(caption)[:room], self.end] for caption in captions], self.end)


T5_NAMES = {
    "block.0.layer.0.SelfAttention.relative_attention_bias": "relative_bias", "block.": "blocks.",
    "layer.0.SelfAttention.o.": "out.", "layer.0.SelfAttention.": "", "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "gate", "layer.1.DenseReluDense.wi_1": "up", "layer.1.DenseReluDense.wo": "down",
    "layer.1.layer_norm": "norm2", "final_layer_norm": "norm", "shared.": "embedding.", "embed_tokens.": "embedding.",
}  # fmt: skip
CLIP_NAMES = {
    "embeddings.token_embedding": "embedding", "embeddings.position_embedding": "positions", "encoder.layers.": "blocks.",
    "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v",
    "self_attn.out_proj": "attention.out", "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "up",
    "mlp.fc2": "down", "final_layer_norm": "norm",
}  # fmt: skip


def renamed(name, names):
    """The name with each of the parts in `names` replaced, in their order."""
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def t5_name(name):
    """A tensor's name in a published T5, whole or its encoder alone → its name here, or None if it is of the rest."""
    if name.startswith(("decoder.", "lm_head.")):
        return None
    return renamed(name.removeprefix("encoder."), T5_NAMES)


def clip_name(name):
    """A tensor's name in a published CLIP, whole or its text tower alone → its name here, or None if it is of the rest."""
    if name.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_scale")):
        return None
    return None if name.endswith("position_ids") else renamed(name.removeprefix("text_model."), CLIP_NAMES)


def load_t5(folder, dtype=torch.bfloat16, device="cpu"):
    """A published T5 1.1 or Flan-T5, of any size: its folder, as downloaded → (Tokenizer, T5Encoder), frozen. The decoder
    is not read. dtype: bf16 or fp32; in fp16 T5 overflows. ValueError names what is wrong, and the folder or file."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"T5 runs in bf16 or fp32, not in {dtype}")
    config, pieces = T5Config.read(folder), Path(folder) / "spiece.model"
    if not pieces.is_file():
        raise ValueError(f"no spiece.model in {folder}")
    try:
        tokenizer = Tokenizer(pieces.read_bytes(), length=256, extra=100)
    except RuntimeError:
        raise ValueError(f"{pieces} is not a sentencepiece model") from None
    return tokenizer, filled(T5Encoder, config, tokenizer, folder, t5_name, dtype, device)


def load_clip(folder, dtype=torch.float32, device="cpu"):
    """A published CLIP: its folder, as downloaded, whole or the text tower alone → (CLIPTokenizer, CLIPTextEncoder),
    frozen. Nothing but the text tower is read. ValueError names what is wrong, and the folder or file."""
    config = CLIPConfig.read(folder)
    tokenizer = CLIPTokenizer(BytePairs.read(folder), config.positions)
    return tokenizer, filled(CLIPTextEncoder, config, tokenizer, folder, clip_name, dtype, device)


def filled(kind, config, tokenizer, folder, rename, dtype, device):
    """The encoder with the folder's weights, frozen. ValueError if the tokenizer has ids that it has no vector for."""
    if len(tokenizer) > config.vocabulary:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} pieces, the model {config.vocabulary}")
    with torch.device("meta"):  # no memory and no random numbers: every parameter is replaced
        encoder = kind(config)
    return load_into(encoder, folder, rename, dtype, device).eval().requires_grad_(False)
