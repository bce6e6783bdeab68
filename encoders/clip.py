"""CLIP's text tower (Radford et al. 2021, arXiv 2103.00020), and its tokenizer.

The tower: embeddings of tokens and of 77 positions; blocks of self-attention and MLP, each
x + f(LayerNorm(x)), in which a token sees itself and those before it; one last LayerNorm. So the last token,
the end of text, has seen all others: its vector stands for the text.

The tokenizer is byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909). It splits lower-case text into
words and these into bytes. Then it merges the two neighbours that training merged earliest, until no two
neighbours are in the list of merges. A word's last byte carries the mark </w>, so that "art" and the "art" of
"party" differ. The ids are those of the hub's CLIP folders. CLIP's first release also repaired text with
ftfy: curly quotes became straight, ligatures letters, full-width forms narrow, wrongly decoded text right;
and it resolved HTML's entities. For prompts with any of these its ids differ.
Letters: B batch, L text tokens, E width. Masks: True = a token, False = padding.
"""
import functools
import re
import unicodedata
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import fused_attention
from encoders.padding import padded, readable
from encoders.weights import check_values, file_in, json_object, load_frozen, read_config, read_values

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern is  MARKS | ENDINGS | \p{L}+ | \p{N} | [^\s\p{L}\p{N}]+. The module re has no \p{L}, so
# `words` writes A for each letter, 0 for each number, and - for the rest beyond ASCII.
MARKS, ENDINGS = r"<\|startoftext\|>|<\|endoftext\|>", "'s|'t|'re|'ve|'m|'ll|'d"
PATTERN = re.compile(f"{MARKS}|{ENDINGS}|[A-Za-z]+|[0-9]|" + r"[^\sA-Za-z0-9]+", re.ASCII)
SPACES = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # White_Space


def byte_letters():
    """A letter for each byte: its own where that can be seen, the next one from U+0100 on for the others."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def words(text):
    """Text → list of words: runs of letters, single numbers, runs of other characters, endings like 's; and
    START and END, which are split off first, exactly as written. A mark in capitals becomes three words."""
    found, kinds = [], {"L": "A", "N": "0"}
    for part in re.split(f"({MARKS})", readable(text)):
        if part in (START, END):
            found.append(part)
            continue
        part = SPACES.sub(" ", unicodedata.normalize("NFC", part))
        part = "".join(c.lower() for c in part)  # one by one: a final capital sigma becomes σ
        shape = "".join(c if c < "\x80" else kinds.get(unicodedata.category(c)[0], "-") for c in part)
        for match in PATTERN.finditer(shape):
            word = part[match.start() : match.end()]
            found += [word[:2], word[2:-2], word[-2:]] if word in (START, END) else [word]
    return found


class CLIPTokenizer:
    """Byte pairs between a start and an end of text. The end also pads; there the mask is False."""

    def __init__(self, vocabulary, merges, length=77):
        """vocabulary: {piece: id}. merges: list of pairs of pieces, the first merged in training first.
        length: where texts are cut, start and end included."""
        self.vocabulary, self.length = vocabulary, length
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.letters = byte_letters()
        self.pieces = functools.lru_cache(1 << 16)(self.pieces)  # captions repeat their words

    @classmethod
    def read(cls, folder, length=77):
        """From vocab.json and merges.txt of a published folder. ValueError, naming the file, if one is
        missing or cannot be read, or if the vocabulary has no start or end of text."""
        pieces, merges = file_in(folder, "vocab.json"), file_in(folder, "merges.txt")
        vocabulary = json_object(pieces)
        numbers = all(type(i) is int and i >= 0 for i in vocabulary.values())
        if not {START, END} <= vocabulary.keys() or not numbers:
            raise ValueError(f"{pieces} is not a list of CLIP's pieces with their numbers")
        try:
            lines = merges.read_text(encoding="utf-8-sig").split("\n")
            pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
            return cls(vocabulary, [(first, second) for first, second in pairs], length)
        except ValueError:  # no UTF-8, or another number of pieces
            raise ValueError(f"{merges} is not a text of two pieces a line") from None

    def pieces(self, word):
        """Word → list of pieces."""
        if word in (START, END):
            return [word]
        letters = "".join(self.letters[byte] for byte in word.encode("utf-8"))
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in self.ranks]:
            earliest = min(pairs, key=self.ranks.get)
            merged = []
            for part in parts:  # merges this pair wherever it stands, from the left
                if merged and (merged[-1], part) == earliest:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return parts

    def encode(self, text):
        """Text → list of ids, without start and end. An unknown piece becomes the end of text."""
        found = [piece for word in words(text) for piece in self.pieces(word)]
        return [self.vocabulary.get(piece, self.vocabulary[END]) for piece in found]

    def unknown(self, text):
        """The words of a text, lower-case, that have a piece which is not in the vocabulary."""
        return [word for word in words(text) if not self.vocabulary.keys() >= set(self.pieces(word))]

    def cut(self, text):
        """How many ids of a text are cut off at its end; 0 if it fits between start and end."""
        return max(0, len(self.encode(text)) + 2 - self.length)

    def __len__(self):
        return max(self.vocabulary.values()) + 1

    def __call__(self, captions):
        """B texts → tokens (B, L) and mask (B, L), padded to the longest."""
        start, end = self.vocabulary[START], self.vocabulary[END]
        rows = [[start, *self.encode(caption)[: self.length - 2], end] for caption in captions]
        return padded([torch.tensor(row) for row in rows], end)


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
        """From config.json of a published CLIP or its text tower. ValueError, naming it, if it is neither."""
        config = read_config(folder, "clip_text_model", "clip")
        if config.get("model_type") == "clip":  # if there is a "text_config_dict", it is the one that counts
            config = {key: value for key, value in config.items() if value is not None}
            key = "text_config_dict" if "text_config_dict" in config else "text_config"
            config = read_values(folder, config, text=(key, {}))["text"]
        check_values(folder, config, layer_norm_eps=[1e-5], hidden_act=["quick_gelu", "gelu"])
        sizes = read_values(
            folder, config, vocabulary=("vocab_size", 49408), width=("hidden_size", 512),
            depth=("num_hidden_layers", 12), heads=("num_attention_heads", 8),
            mlp_width=("intermediate_size", 2048), positions=("max_position_embeddings", 77),
        )
        if sizes["width"] % sizes["heads"]:
            wrong = f"num_attention_heads is {sizes['heads']}, which does not divide {sizes['width']}"
            raise ValueError(f"{folder}/config.json: {wrong}, its hidden_size")
        if sizes["positions"] < 2:
            raise ValueError(f"{folder}/config.json: max_position_embeddings is 1; start and end need 2")
        return cls(**sizes, activation=config.get("hidden_act", "quick_gelu"))


class CLIPBlock(nn.Module):
    def __init__(self, width, heads, mlp_width, activation):
        super().__init__()
        self.heads, self.quick = heads, activation == "quick_gelu"
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x, mask):
        """x (B, L, E); mask (B, 1, L, L) → (B, L, E)"""
        y = self.norm1(x)  # (B, L, E)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = fused_attention(q, k, v, mask)  # (B, H, L, d)
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, L, E)
        y = self.up(self.norm2(x))  # (B, L, mlp_width)
        y = y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y)
        return x + self.down(y)  # (B, L, E)


class CLIPTextEncoder(nn.Module):
    """Only ever filled with published weights, so it has no initialisation of its own."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.positions = nn.Embedding(c.positions, c.width)
        shape = c.width, c.heads, c.mlp_width, c.activation
        self.blocks = nn.ModuleList(CLIPBlock(*shape) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, tokens, mask):
        """tokens (B, L) integers, L at most the model's positions; mask (B, L) → (B, L, E), meaningless at
        padding."""
        L = tokens.shape[1]
        before = torch.ones(L, L, dtype=torch.bool, device=tokens.device).tril()  # (L, L), and itself
        mask = before & mask[:, None, None, :]  # (B, 1, L, L)
        x = self.embedding(tokens) + self.positions.weight[:L]  # (B, L, E)
        for block in self.blocks:
            x = block(x, mask)  # (B, L, E)
        return self.norm(x)  # (B, L, E)


NAMES = {  # part of a published name: its name here; None: outside of the text tower
    "vision_model.": None, "visual_projection.": None, "text_projection.": None, "logit_scale": None,
    "position_ids": None, "text_model.": "", "encoder.layers.": "blocks.",
    "embeddings.token_embedding": "embedding", "embeddings.position_embedding": "positions",
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "out",
    "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "up", "mlp.fc2": "down",
    "final_layer_norm": "norm",
}


def load_clip(folder, dtype=torch.float32, device="cpu"):
    """The folder of a published CLIP or of its text tower, as downloaded → (CLIPTokenizer, CLIPTextEncoder),
    frozen. Only the text tower is read. ValueError names what is wrong, and the folder or file."""
    config = CLIPConfig.read(folder)
    tokenizer = CLIPTokenizer.read(folder, config.positions)
    return tokenizer, load_frozen(CLIPTextEncoder, config, len(tokenizer), folder, NAMES, dtype, device)
