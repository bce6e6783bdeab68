"""T5: text → vectors (Raffel et al. 2020, arXiv 1910.10683), and its tokenizer.

Token embeddings without positions; blocks of self-attention and gated MLP (as in T5 1.1 and Flan-T5), each
x + f(RMSNorm(x)); no bias; queries and keys are not scaled by sqrt(d). Order enters only through a learned
number per bucket of distances, added to the attention scores of every block. One last RMSNorm.

The mini T5 trains along with the image model, its tokenizer on the captions. `load_t5` reads published ones.
Both work alike: tokens, mask = tokenizer(texts); encoder(tokens, mask) → (B, L, E), E = encoder.config.width.
Letters: B batch, L text tokens, E width, H heads, d width of a head. Masks: True = a token, False = padding.
"""
import io
import math
import re
from collections import Counter
from dataclasses import dataclass

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

from encoders.padding import padded, readable
from encoders.weights import check_values, file_in, load_frozen, read_config, read_values


@dataclass
class T5Config:
    """Defaults: the mini size. The published sizes differ only in these values."""

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
        """From config.json of a published T5 1.1 or Flan-T5. ValueError, naming it, if it is neither."""
        config = {"feed_forward_proj": "relu"} | read_config(folder, "t5")
        check_values(folder, config, feed_forward_proj=["gated-gelu"], layer_norm_epsilon=[1e-6])
        sizes = read_values(
            folder, config, vocabulary=("vocab_size", 32128), width=("d_model", 512), depth=("num_layers", 6),
            heads=("num_heads", 8), head_width=("d_kv", 64), mlp_width=("d_ff", 2048),
            buckets=("relative_attention_num_buckets", 32),
            max_distance=("relative_attention_max_distance", 128),
        )
        buckets, distance = sizes["buckets"], sizes["max_distance"]
        if not 1 <= buckets // 4 < distance:  # else relative_buckets divides by zero
            wrong = f"relative_attention_max_distance is {distance}, which does not go with {buckets} buckets"
            raise ValueError(f"{folder}/config.json: {wrong}")
        return cls(**sizes)


def relative_buckets(length, buckets, max_distance, device=None):
    """Bucket of the distance from query i to key j, (L, L) integers in 0…buckets-1; the upper half for keys
    to the right. In each half, near keys have one per distance; then they widen up to max_distance."""
    position = torch.arange(length, device=device)
    distance = position - position.unsqueeze(1)  # (L, L), key minus query
    half = buckets // 2
    near = half // 2
    far = near + (distance.abs().clamp(min=1) / near).log() / math.log(max_distance / near) * (half - near)
    bucket = torch.where(distance.abs() < near, distance.abs(), far.long().clamp(max=half - 1))
    return bucket + half * (distance > 0)


def directed_bias(buckets, max_distance, heads):
    """Starting values of the relative bias, ours, (buckets, H): -slope · distance, and 4 less on one side:
    even heads look left, odd ones right. The slope falls from 1 in the first two heads to 0.3 in the last."""
    near = buckets // 4
    k = torch.arange(2 * near)
    distance = torch.where(k < near, k, near * (max_distance / near) ** ((k - near) / near))  # the nearest
    distance = distance.repeat(2)  # (buckets,), left and right
    right = torch.arange(buckets) >= 2 * near  # (buckets,)
    slope = 0.3 ** torch.linspace(0, 1, (heads + 1) // 2).repeat_interleave(2)[:heads]  # (H,)
    looks_right = torch.arange(heads) % 2 == 1  # (H,)
    away = (right[:, None] != looks_right) & (distance[:, None] > 0)  # (buckets, H)
    return -slope * distance[:, None] - 4.0 * away


class T5Block(nn.Module):
    def __init__(self, width, heads, head_width, mlp_width):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, heads * head_width, bias=False)
        self.v = nn.Linear(width, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x, bias):
        """x (B, L, E); bias (B, H, L, L), added to the scores, very negative at padding → (B, L, E)"""
        y = self.norm1(x)  # (B, L, E)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, d)
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, L, E)
        y = self.norm2(x)  # (B, L, E)
        y = F.gelu(self.gate(y), approximate="tanh") * self.up(y)  # (B, L, mlp_width)
        return x + self.down(y)  # (B, L, E)


class T5Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.relative_bias = nn.Embedding(c.buckets, c.heads)
        shape = c.width, c.heads, c.head_width, c.mlp_width
        self.blocks = nn.ModuleList(T5Block(*shape) for _ in range(c.depth))
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.initialise()

    def forward(self, tokens, mask):
        """tokens (B, L) integers, mask (B, L) → (B, L, E), meaningless at padding. ValueError in fp16."""
        if self.embedding.weight.dtype is torch.float16:
            raise ValueError("T5 overflows in fp16: it runs in bf16 or fp32")
        c, L = self.config, tokens.shape[1]
        buckets = relative_buckets(L, c.buckets, c.max_distance, tokens.device)  # (L, L)
        bias = self.relative_bias(buckets).permute(2, 0, 1).unsqueeze(0)  # (1, H, L, L)
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)  # (B, H, L, L)
        x = self.embedding(tokens)  # (B, L, E)
        for block in self.blocks:
            x = block(x, bias)  # (B, L, E)
        return self.norm(x)  # (B, L, E)

    @torch.no_grad()
    def initialise(self):
        """T5's own: products keep a vector's variance; queries are smaller by sqrt(d), because the attention
        does not scale its scores. Ours: the relative bias starts directed, so that from the first step a
        noun's vector holds its adjectives, and whether "above" stands before or after it."""
        c = self.config
        nn.init.normal_(self.embedding.weight)
        self.relative_bias.weight.copy_(directed_bias(c.buckets, c.max_distance, c.heads))
        for block in self.blocks:
            nn.init.normal_(block.q.weight, std=(c.width * c.head_width) ** -0.5)
            for layer in (block.k, block.v, block.out, block.gate, block.up, block.down):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


class Tokenizer:
    """sentencepiece with T5's conventions: 0 is padding, 1 is </s> and ends every text, 2 is unknown."""

    def __init__(self, model, length=64, extra=0):
        """model: the bytes of a sentencepiece model file. length: where texts are cut. extra: how many
        <extra_id_0>, … follow the pieces, numbered from the last one down. A published T5 has 100, and reads
        them, <pad>, </s> and <unk> where a text contains them."""
        self.model, self.length = model, length
        self.pieces = sentencepiece.SentencePieceProcessor()
        self.pieces.LoadFromSerializedProto(model)
        self.size = len(self.pieces) + extra
        self.marks = {f"<extra_id_{i}>": self.size - 1 - i for i in range(extra)}
        if extra:
            self.marks |= {"<pad>": 0, "</s>": 1, "<unk>": 2}

    @classmethod
    def train(cls, captions):
        """A model of at most 4096 pieces from a list of captions, which reads capitals as small letters;
        deterministic. It merges pieces (BPE), so that in a small vocabulary every frequent word is one piece.
        Other characters than the captions' are unknown. But if these have more than 2048, the rarest of them
        and all others are read as their bytes. ValueError if no caption has a character."""
        rule, file = "nmt_nfkc_cf", io.BytesIO()
        normalizer = sentencepiece.SentencePieceNormalizer(rule_name=rule, remove_extra_whitespaces=True)
        # sentencepiece skips captions with its own ▅; at most 64 pieces of 16 characters are ever read
        texts = normalizer.normalize([readable(text).replace("▅", " ") for text in captions])
        texts = [text[:1024] for text in texts]
        counts = Counter("".join(texts))
        if not counts.keys() - {" "}:
            raise ValueError("no caption has a character that a tokenizer could learn")
        rare = {ord(character): " " for character, _ in counts.most_common()[2048:]}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.translate(rare) for text in texts), model_writer=file, vocab_size=4096,
            model_type="bpe", hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1,
            minloglevel=2, normalization_rule_name=rule, character_coverage=1.0, byte_fallback=bool(rare),
        )
        return cls(file.getvalue())

    def __len__(self):
        return self.size

    def encode(self, text):
        """Text → list of ids, without the end."""
        text, ids = readable(text), []
        if not self.marks:
            return self.pieces.encode(text)
        for part in re.split(f"({'|'.join(self.marks)})", text):
            ids += [self.marks[part]] if part in self.marks else self.pieces.encode(part)
        return ids

    def unknown(self, text):
        """The words of a text that have a piece which the tokenizer does not know."""
        return [word for word in text.split() if 2 in self.encode(word)]

    def cut(self, text):
        """How many ids of a text are cut off at its end; 0 if it fits before the end of text."""
        return max(0, len(self.encode(text)) + 1 - self.length)

    def __call__(self, captions):
        """B texts → tokens (B, L) and mask (B, L), padded to the longest."""
        return padded([torch.tensor([*self.encode(text)[: self.length - 1], 1]) for text in captions])


NAMES = {  # part of a published name: its name here; None: outside of the encoder
    "decoder.": None, "lm_head.": None, "encoder.": "",
    "block.0.layer.0.SelfAttention.relative_attention_bias": "relative_bias", "block.": "blocks.",
    "layer.0.SelfAttention.o.": "out.", "layer.0.SelfAttention.": "", "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "gate", "layer.1.DenseReluDense.wi_1": "up",
    "layer.1.DenseReluDense.wo": "down", "layer.1.layer_norm": "norm2", "final_layer_norm": "norm",
    "shared.": "embedding.", "embed_tokens.": "embedding.",
}


def load_t5(folder, dtype=torch.bfloat16, device="cpu"):
    """The folder of a published T5 1.1 or Flan-T5 → (Tokenizer, T5Encoder), frozen. dtype: bf16 or fp32.
    ValueError names what is wrong, and the folder or file."""
    config, pieces = T5Config.read(folder), file_in(folder, "spiece.model")
    try:
        tokenizer = Tokenizer(pieces.read_bytes(), length=256, extra=100)
    except RuntimeError:
        raise ValueError(f"{pieces} is not a sentencepiece model") from None
    return tokenizer, load_frozen(T5Encoder, config, len(tokenizer), folder, NAMES, dtype, device)
