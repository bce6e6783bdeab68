"""Byte-pair encoding as CLIP does it (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019 and 2021): text → ids.

    lower-case text → words → the bytes of each word → the two neighbours that were merged earliest in training are
    merged, again and again, until no two neighbours are in the list of merges → ids of what is left.

The last byte of a word carries the mark </w>, so that "art" alone and in "party" differ. Working on bytes, nothing is
unknown. Equal to the tokenizer of the hub's CLIP folders, in which accents are composed (NFC) and every character is
lower-cased by itself; CLIP's first release repaired broken encodings and HTML entities (&amp;) instead.
"""
import functools
import re
import unicodedata
from pathlib import Path

from encoders.weights import json_object

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern is  <|startoftext|> | <|endoftext|> | 's | 't | 're | 've | 'm | 'll | 'd | \p{L}+ | \p{N} | [^\s\p{L}\p{N}]+
# The module re has no \p{L}: `words` puts A for each letter, 0 for each number and - for the rest beyond ASCII.
PATTERN = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+", re.ASCII)
SPACES = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # Unicode's White_Space
INFINITE = float("inf")


def byte_letters():
    """A letter for each byte: its own where that can be seen, the next one from U+0100 on for the others."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def words(text):
    """Text → list of words: runs of letters, single numbers, runs of what is neither, and English endings like 's."""
    text = SPACES.sub(" ", unicodedata.normalize("NFC", text))
    text = "".join(character.lower() for character in text)  # one by one: a final capital sigma becomes σ, not ς
    kinds = "".join(c if c < "\x80" else {"L": "A", "N": "0"}.get(unicodedata.category(c)[0], "-") for c in text)
    return [text[match.start() : match.end()] for match in PATTERN.finditer(kinds)]


class BytePairs:
    """vocabulary: {piece: id}; merges: list of pairs of pieces, the first merged in training first."""

    def __init__(self, vocabulary, merges):
        self.vocabulary = vocabulary
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.letters = byte_letters()
        self.pieces = functools.lru_cache(1 << 16)(self.pieces)  # captions repeat their words

    @classmethod
    def read(cls, folder):
        """From vocab.json and merges.txt of a published folder. ValueError, naming the file, if one is missing, cannot
        be read, or the vocabulary has no start or end of text."""
        for name in ("vocab.json", "merges.txt"):
            if not (Path(folder) / name).is_file():
                raise ValueError(f"no {name} in {folder}")
        vocabulary = json_object(Path(folder) / "vocab.json")
        if not {START, END} <= vocabulary.keys() or not all(type(number) is int for number in vocabulary.values()):
            raise ValueError(f"{folder}/vocab.json is not a list of CLIP's pieces with their numbers")
        try:
            lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            lines = ["no text in UTF-8"]
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        if not all(len(pair) == 2 for pair in merges):
            raise ValueError(f"{folder}/merges.txt is not a text of two pieces a line")
        return cls(vocabulary, merges)

    def pieces(self, word):
        """Word → list of pieces."""
        letters = "".join(self.letters[byte] for byte in word.encode("utf-8"))
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while len(parts) > 1:
            first, second = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, INFINITE))
            if (first, second) not in self.ranks:
                break
            merged = []
            for part in parts:  # merges the pair wherever it stands, from the left
                if merged and (merged[-1], part) == (first, second):
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return parts

    def encode(self, text):
        """Text → list of ids, without start and end. A piece that the vocabulary lacks becomes the end of text, which is
        what CLIP's folders name as their unknown piece."""
        found = []
        for word in words(text):
            found += [word] if word in (START, END) else self.pieces(word)
        return [self.vocabulary.get(piece, self.vocabulary[END]) for piece in found]
