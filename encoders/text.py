"""The published text encoders by the names of their flags, and how the transformer takes them."""
from encoders.clip import CLIPConfig, load_clip
from encoders.t5 import T5Config, load_t5

LOADERS = {"clip": load_clip, "t5": load_t5}  # (folder, dtype, device) → tokenizer, encoder
CONFIGS = {"clip": CLIPConfig, "t5": T5Config}  # CONFIG.read(folder) → its sizes
NULL_TOKENS = {"clip": 77, "t5": 256}  # length of the null text, as in the paper's parameter count
POOLING = {"clip": "last", "t5": "mean"}  # as in conditioning.py
