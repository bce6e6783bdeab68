"""Published text encoders: the same numbers and the same token ids as transformers, from folders that it
wrote itself, with random weights (no published weights are at hand)."""
import html
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import transformers
from oracles import SPIECE, clip, save, t5, whole_clip

from conditioning import last_token
from encoders import weights
from encoders.clip import END, NAMES, START, CLIPConfig, CLIPTextEncoder, CLIPTokenizer, load_clip, words
from encoders.t5 import T5Config, Tokenizer, load_t5

PROMPTS = [
    "a striped red circle above a blue square", "", "two cats, don't they look 3½ years?",
    "a very long prompt " * 90,
]


def close(ours, theirs, mask=None):
    ours, theirs = (ours, theirs) if mask is None else (ours[mask], theirs[mask])
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert theirs.std() > 0.1


# The encoders


@pytest.mark.parametrize(
    "size",
    [
        {},
        dict(hidden_act="gelu", hidden_size=48, num_attention_heads=4),
        dict(num_hidden_layers=3, num_attention_heads=1, intermediate_size=80, max_position_embeddings=20),
        dict(eos_token_id=2),
    ],
)
def test_clip_gives_what_transformers_gives(tmp_path, byte_pairs, size):
    model = clip(**size)
    tokenizer, encoder = load_clip(save(model, tmp_path, byte_pairs))
    tokens, mask = tokenizer(PROMPTS)
    assert tokens.shape == (4, size.get("max_position_embeddings", 77))
    assert encoder.config.width == model.config.hidden_size
    with torch.no_grad():
        theirs, hidden = model(tokens, attention_mask=mask.long()), encoder(tokens, mask)
        unmasked = model(tokens)  # as many pipelines call it: the words see no padding either way
    close(hidden, theirs.last_hidden_state, mask)
    close(hidden, unmasked.last_hidden_state, mask)
    close(last_token(hidden, mask), theirs.pooler_output)


@pytest.mark.parametrize(
    "size",
    [
        {},
        dict(d_model=40, d_kv=12, num_heads=3, num_layers=1),
        dict(relative_attention_num_buckets=16, relative_attention_max_distance=40, num_layers=3, d_ff=64),
    ],
)
def test_t5_gives_what_transformers_gives(tmp_path, byte_pairs, size):
    model = t5(**size)
    tokenizer, encoder = load_t5(save(model, tmp_path, byte_pairs), torch.float32)
    tokens, mask = tokenizer(PROMPTS)
    assert tokens.shape == (4, 256) and encoder.config.width == model.config.d_model
    with torch.no_grad():
        close(encoder(tokens, mask), model(tokens, attention_mask=mask.long()).last_hidden_state, mask)


def test_t5_runs_in_bf16_and_not_in_fp16(tmp_path, byte_pairs):
    folder = save(t5(), tmp_path, byte_pairs)
    tokenizer, encoder = load_t5(folder)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    tokens, mask = tokenizer(PROMPTS[:3])
    exact = load_t5(folder, torch.float32)[1](tokens, mask)
    assert (encoder(tokens, mask) - exact)[mask].abs().max() < 0.05 * exact.abs().max()
    with pytest.raises(ValueError, match="overflows in fp16"):
        encoder.half()(tokens, mask)


def test_every_published_size_is_read(tmp_path):
    """Widths, depths, heads and MLPs of T5 1.1 and Flan-T5, and the text tower of CLIP ViT-L/14 in both its
    spellings."""
    small, base, large = (512, 8, 6, 1024), (768, 12, 12, 2048), (1024, 24, 16, 2816)
    for width, depth, heads, mlp in (small, base, large, (2048, 24, 32, 5120), (4096, 24, 64, 10240)):
        config = dict(model_type="t5", d_model=width, d_kv=64, num_layers=depth, num_heads=heads, d_ff=mlp)
        config |= dict(vocab_size=32128, feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert T5Config.read(tmp_path) == T5Config(32128, width, depth, heads, 64, mlp)
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    text |= dict(projection_dim=768)
    old = dict(text_config=dict(hidden_size=512), text_config_dict=text | dict(eos_token_id=2))
    for config in (old, dict(text_config=text)):
        (tmp_path / "config.json").write_text(json.dumps(config | dict(model_type="clip")))
        assert CLIPConfig.read(tmp_path) == CLIPConfig()
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="clip_text_model")))
    assert CLIPConfig.read(tmp_path) == CLIPConfig(width=512, heads=8, mlp_width=2048)
    (tmp_path / "config.json").write_text(json.dumps(dict(_class_name="clip")))
    assert CLIPConfig.read(tmp_path) == CLIPConfig(width=512, heads=8, mlp_width=2048)


# The folders


def pickled(folder, model, shards=1, old=False, prefix=""):
    """Puts .bin files in place of the folder's safetensors."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        return torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    places = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(state)}
    for place in set(places.values()):
        torch.save({name: state[name] for name in places if places[name] == place}, folder / place)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))


def same(encoder, other):
    assert encoder.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    return True


def test_every_layout_of_a_t5_folder_gives_the_same(tmp_path, byte_pairs):
    model = t5(transformers.T5ForConditionalGeneration)
    reference = load_t5(save(model, tmp_path / "whole", byte_pairs), torch.float32)[1]
    sharded = save(model, tmp_path / "sharded", byte_pairs, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert same(load_t5(sharded, torch.float32)[1], reference)
    for shard, names in shards_of(sharded).items():
        if all(name.startswith("decoder.") for name in names):
            (sharded / shard).unlink()
    assert same(load_t5(sharded, torch.float32)[1], reference)  # what the encoder does not need is not opened
    for shards, old in ((1, False), (1, True), (3, False)):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"bin{shards}{old}")
        pickled(folder, model, shards, old)  # with the embedding three times, and lm_head
        assert same(load_t5(folder, torch.float32)[1], reference)
    encoder = transformers.T5EncoderModel(model.config)
    names = encoder.state_dict().keys()
    encoder.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    assert same(load_t5(save(encoder, tmp_path / "encoder", byte_pairs), torch.float32)[1], reference)
    pickled(folder, encoder.encoder)  # names without "encoder.", the embedding as embed_tokens
    (folder / "pytorch_model.bin.index.json").unlink()
    assert same(load_t5(folder, torch.float32)[1], reference)


def test_every_layout_of_a_clip_folder_gives_the_same(tmp_path, byte_pairs):
    model = whole_clip()
    reference = load_clip(save(model, tmp_path / "whole", byte_pairs))[1]
    sharded = save(model, tmp_path / "sharded", byte_pairs, max_shard_size="100KB")
    assert same(load_clip(sharded)[1], reference)
    tower = transformers.CLIPTextModel(model.config.text_config)
    tower.load_state_dict(model.text_model.state_dict())
    folder = save(tower, tmp_path / "tower", byte_pairs)
    assert same(load_clip(folder)[1], reference)
    tower.register_buffer("position_ids", torch.arange(77)[None])  # as in files of before 2023
    for prefix, old in (("text_model.", False), ("", True)):
        pickled(folder, tower, old=old, prefix=prefix)
        assert same(load_clip(folder)[1], reference)


def shards_of(folder):
    """{file: names of its tensors}"""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {place: [name for name in places if places[name] == place] for place in places.values()}


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_key(folder, key):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))


def change_weights(folder, change, file="model.safetensors"):
    tensors = weights.read(folder / file)[0]
    change(tensors)
    weights.write(folder / file, tensors)


def add_index(folder, **places):
    """Makes the folder one with an index of one shard, but for the tensors in `places`."""
    names = weights.header_of(folder / "model.safetensors")[0]
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = dict(weight_map={name: "part.safetensors" for name in names} | places)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "encoder.final_layer_norm.weight"
ERRORS = {  # what is done to the folder of a T5: what is said of it, beside the folder's name
    "the model's 21 tensors: missing ['norm.weight'], unknown []": lambda f: change_weights(f, lambda t: t.pop(NORM)),
    "missing [], unknown ['encoder.block.2.x']": lambda f: change_weights(
        f, lambda t: t.update({"encoder.block.2.x": t[NORM]})
    ),
    "has the shape (5,), the model has (24,)": lambda f: change_weights(
        f, lambda t: t.update({NORM: torch.zeros(5)})
    ),
    "is not a whole safetensors file": lambda f: os.truncate(f / "model.safetensors", 3_000_000),
    "is not a safetensors file": lambda f: os.truncate(f / "model.safetensors", 100),
    "config.json is of a model of type 'umt5', not t5": lambda f: change_config(f, model_type="umt5"),
    "feed_forward_proj is 'relu'; only 'gated-gelu' is built": lambda f: drop_key(f, "feed_forward_proj"),
    "feed_forward_proj is 'gated-silu'; only 'gated-gelu' is built": lambda f: change_config(
        f, feed_forward_proj="gated-silu"
    ),
    "layer_norm_epsilon is 1e-05; only 1e-06 is built": lambda f: change_config(f, layer_norm_epsilon=1e-5),
    "d_model is 'wide', not a whole number": lambda f: change_config(f, d_model="wide"),
    "the tokenizer has 32100 pieces, the model 100": lambda f: change_config(f, vocab_size=100),
    "config.json does not hold a JSON object": lambda f: (f / "config.json").write_text("[" * 100_000),
    "no config.json in": lambda f: (f / "config.json").unlink(),
    "there is no folder": lambda f: shutil.rmtree(f),
    "no spiece.model in": lambda f: (f / "spiece.model").unlink(),
    "spiece.model is not a sentencepiece model": lambda f: (f / "spiece.model").write_bytes(b"text"),
    "model is not a sentencepiece model": lambda f: (f / "spiece.model").write_bytes(b""),
    "no weights in": lambda f: (f / "model.safetensors").unlink(),
    "gone.safetensors is missing: the index beside it lists it": lambda f: add_index(
        f, **{NORM: "gone.safetensors"}
    ),
    "part.safetensors has no tensor 'encoder.final_layer_norm.weight'": lambda f: (
        add_index(f), change_weights(f, lambda t: t.pop(NORM), "part.safetensors")
    ),
    "does not say which tensor is in which": lambda f: add_index(f, x="../model.safetensors"),
    "is not a file of tensors alone": lambda f: (
        (f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(pickle.dumps(Program(f)))
    ),
    "pytorch_model.bin is not a file of tensors alone": lambda f: (
        pickled(f, t5()), os.truncate(f / "pytorch_model.bin", 3_000_000)
    ),
}


class Program:
    """A pickle that writes a file when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "it ran"),)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, byte_pairs):
    return save(t5(), tmp_path_factory.mktemp("t5") / "model", byte_pairs)


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path, t5_folder, message):
    folder = shutil.copytree(t5_folder, tmp_path / "folder")
    ERRORS[message](folder)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_t5(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "folder" / "it ran").exists()


def test_what_is_wrong_with_a_clip_folder_is_said(tmp_path, byte_pairs):
    folder = save(clip(), tmp_path / "clip", byte_pairs)
    with pytest.raises(ValueError, match="of type 'clip_text_model', not t5"):
        load_t5(folder)
    change_config(folder, hidden_act="relu")
    message = "config.json: hidden_act is 'relu'; only 'quick_gelu' or 'gelu' is built"
    with pytest.raises(ValueError, match=message):
        load_clip(folder)
    change_config(folder, hidden_act="gelu")
    for name, content, message in (
        ("merges.txt", "a b\nc\n", "merges.txt is not a text of two pieces a line"),
        ("vocab.json", "{}", "vocab.json is not a list of CLIP's pieces"),
        ("vocab.json", json.dumps({START: 0, END: 1, "a": -1}), "vocab.json is not a list of CLIP's pieces"),
        ("vocab.json", None, "no vocab.json in"),
    ):
        (folder / name).write_text(content) if content else (folder / name).unlink()
        with pytest.raises(ValueError, match=message) as error:
            load_clip(folder)
        assert str(folder) in str(error.value)


HOSTILE_SIZES = (0, -2, 2.0, True, "2", [2], None, 10**30)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size", "max_position_embeddings"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_size_of_clip_that_is_none_is_named(tmp_path, key, nested):
    for value in HOSTILE_SIZES:
        text = dict(model_type="clip_text_model") | {key: value}
        config = dict(model_type="clip", text_config=text, text_config_dict=None) if nested else text
        (tmp_path / "config.json").write_text(json.dumps(config))
        named_in_one_line(tmp_path, CLIPConfig.read, f"{key} is {value!r}, not a whole number above 0")


def named_in_one_line(folder, read, message):
    with pytest.raises(ValueError, match=re.escape(f"{folder}/config.json: {message}")) as error:
        read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_attention_heads=7), "num_attention_heads is 7, which does not divide 512, its hidden_size"),
        (dict(hidden_size=8, num_attention_heads=16), "num_attention_heads is 16, which does not divide 8"),
        (dict(max_position_embeddings=1), "max_position_embeddings is 1; start and end need 2"),
        (dict(model_type="clip", text_config="x"), "text_config is 'x', not a dictionary"),
        (dict(model_type="clip", text_config=[]), "text_config is [], not a dictionary"),
        (dict(model_type="clip", text_config_dict=0), "text_config_dict is 0, not a dictionary"),
        (dict(model_type="clip", text_config=dict(num_attention_heads=3)), "num_attention_heads is 3, which"),
    ],
)
def test_a_config_of_clip_that_does_not_fit_is_named(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="clip_text_model") | changes))
    named_in_one_line(tmp_path, CLIPConfig.read, message)


@pytest.mark.parametrize("key", ["vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff",
                                 "relative_attention_num_buckets", "relative_attention_max_distance"])
def test_a_size_of_t5_that_is_none_is_named(tmp_path, key):
    config = dict(model_type="t5", feed_forward_proj="gated-gelu")
    for value in HOSTILE_SIZES:
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        named_in_one_line(tmp_path, T5Config.read, f"{key} is {value!r}, not a whole number above 0")
    for buckets, distance in ((3, 128), (32, 8), (64, 16)):  # with these the buckets divide by zero
        sizes = dict(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
        (tmp_path / "config.json").write_text(json.dumps(config | sizes))
        message = f"relative_attention_max_distance is {distance}, which does not go with {buckets} buckets"
        named_in_one_line(tmp_path, T5Config.read, message)


def test_files_with_a_byte_order_mark_are_read(tmp_path, byte_pairs):
    folder = save(clip(), tmp_path, byte_pairs, max_shard_size="20KB")
    expected, encoder = load_clip(folder)
    for path in (*folder.glob("*.json"), folder / "merges.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    tokenizer, again = load_clip(folder)
    assert tokenizer.ranks == expected.ranks and tokenizer.vocabulary == expected.vocabulary
    assert same(again, encoder)


def test_a_module_is_as_before_where_loading_fails(tmp_path, byte_pairs):
    folder = save(clip(), tmp_path, byte_pairs)
    change_weights(folder, lambda tensors: tensors.update({"final_layer_norm.weight": torch.zeros(5)}))
    encoder = CLIPTextEncoder(CLIPConfig.read(folder))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="has the shape"):
        weights.load_into(encoder, folder, NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


MEASURE = """
import resource, sys, torch
from encoders.t5 import T5Config, T5Encoder, load_t5
lines = lambda: open("/proc/self/status").readlines()
peak = lambda: int(next(line for line in lines() if line.startswith("VmHWM")).split()[1]) / 1024
with torch.device("meta"):
    T5Encoder(T5Config())  # for this alone PyTorch imports 60 MB of modules
before = peak()
encoder = load_t5(sys.argv[1], torch.bfloat16)[1]
print(before, peak(), sum(p.numel() * p.element_size() for p in encoder.parameters()) / 2**20)
"""


@pytest.fixture
def large_t5(tmp_path):
    """Function from a depth to a T5's folder without weights, and {name: shape} of its encoder's tensors."""

    def make(depth):
        config = dict(model_type="t5", d_model=1024, d_kv=64, d_ff=2816, num_layers=depth, num_heads=16)
        config |= dict(vocab_size=32128, feed_forward_proj="gated-gelu")
        (tmp_path / "config.json").write_text(json.dumps(config))
        shutil.copy(SPIECE, tmp_path)
        with torch.device("meta"):
            model = transformers.T5EncoderModel(transformers.T5Config.from_pretrained(tmp_path))
        state = model.state_dict()
        return tmp_path, {name: state[name].shape for name in state if "embed_tokens" not in name}

    return make


def memory_of_loading(folder):
    """Megabytes at the highest while a process loads a T5 in bf16, beyond Python's and PyTorch's own; and the
    encoder's."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, folder]
    result = subprocess.run(command, cwd=Path(weights.__file__).parent.parent, capture_output=True, text=True)
    before, highest, size = map(float, result.stdout.split())
    return highest - before, size


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of memory")


@linux
def test_loading_needs_the_model_and_one_shard(large_t5):
    """210 MB in bf16 from shards in fp32, 420 MB of zeros in all, which take no room on the disk."""
    folder, shapes = large_t5(depth=6)
    places = {name: f"part-{i // 20}.safetensors" for i, name in enumerate(shapes)}
    for place in set(places.values()):
        header, end = {}, 0
        for name in (name for name in shapes if places[name] == place):
            start, end = end, end + 4 * shapes[name].numel()
            header[name] = dict(dtype="F32", shape=list(shapes[name]), data_offsets=[start, end])
        text = json.dumps(header).encode()
        (folder / place).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / place, 8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=places)))
    shard = max(os.path.getsize(folder / place) for place in set(places.values())) / 2**20
    highest, size = memory_of_loading(folder)
    assert 200 < size < 250 and shard < 230
    assert highest < size + shard + 40


@linux
def test_loading_does_not_read_the_decoder_of_a_pickle(large_t5):
    """90 MB in bf16 from one .bin in fp32 with 180 MB of encoder and 200 MB of decoder."""
    folder, shapes = large_t5(depth=1)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors["decoder.x"] = torch.zeros(50, 2**20)
    torch.save(tensors, folder / "pytorch_model.bin")
    highest, size = memory_of_loading(folder)
    assert 80 < size < 100
    assert highest < size + 2 * size + 40


# The tokenizers


def texts(count=600):
    """Varied texts, the same each time."""
    rng = random.Random(0)
    pools = [
        "a red circle above the blue square photo painting of Three dogs' "
        "it's we've I'LL don't THEY'RE she'd I'm".split(),
        "café naïve Ångström São_Paulo ÜBER straße İstanbul ıſK ΣΊΣΥΦΟΣ "
        "Привет e\u0301a\u0308 a\u0301 Đặng".split(),
        "日本語 猫が好き 中文字符 한국어 ภาษาไทย हिन्दी".split(),
        ["שלום", "مرحبا بالعالم", "אבג דהו", "\u202bسلام\u202c"],
        ["👩‍👩‍👧", "👍🏽", "🇫🇷", "☀", "🏳️‍🌈", "🤷‍♀️", "1️⃣"],
        "0 12 1,000.50 x² H₂O ½ Ⅷ ٣ ① 3rd 2024-01-31 10^-6 m³".split(),
        ["&amp;", "&lt;b&gt;", "&#39;", "&nbsp;", html.escape("<a href='x'>")],
        ["\t", "\n", "\r\n", "  ", "\xa0", "\u3000", "\u2028", "\u200b"]
        + ["\x00", "\x01", "\x1c", "\x7f", "\ufeff", "\ufffd"],
        list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "?!", "--", "''", "```", ":-)", "“q”", "…", "—"],
    ]
    found = ["", " ", "\n\t ", "a" * 10_000, "ab 12 " * 1_666, "word" * 300]
    found += ["".join(map(chr, range(32))), "é" * 200]
    while len(found) < count:
        some = rng.sample(pools, rng.randint(1, 4))
        parts = [rng.choice(rng.choice(some)) for _ in range(rng.randint(1, 25))]
        found.append("".join(part + rng.choice(["", " ", " "]) for part in parts))
    return found


def texts_with_marks(count=300):
    """Start and end of text, whole, in capitals and broken, next to whatever changes under normalisation."""
    rng = random.Random(1)
    parts = [START, END] * 4 + [START.upper(), "<|EndOfText|>", "<|ſtartoftext|>", "<|startof", "text|>", "<|", "|>"]
    parts += list(".!<|>'sA1½ \n\xa0\u200b\x00\ufeff\u0301\u0338\u0130\u03a3\u212a") + ["'s", "'ll", "red"]
    return [f".{END}", START.upper(), *("".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(count))]


def test_clip_tokens_are_those_of_transformers(byte_pairs):
    theirs = transformers.CLIPTokenizer.from_pretrained(byte_pairs)
    tokenizer = CLIPTokenizer.read(byte_pairs)
    many = [text.lstrip("\ufeff") for text in texts() + texts_with_marks()]  # we leave a byte-order mark out
    for text, ids in zip(many, theirs(many, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text[:200])
        assert tokenizer.encode("\ufeff" + text) == ids and not tokenizer.unknown(text)
        assert tokenizer.cut(text) == max(0, len(ids) - 75)
    letters = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    runs = ["a" + "1".join(letters[i : i + 50]) for i in range(0, len(letters), 50)]  # every named character
    for text, ids in zip(runs, theirs(runs, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


def test_clip_batches_are_cut_and_padded(byte_pairs):
    theirs = transformers.CLIPTokenizer.from_pretrained(byte_pairs)
    tokenizer = CLIPTokenizer.read(byte_pairs)
    for batch in (PROMPTS, PROMPTS[:3], [""]):
        tokens, mask = tokenizer(batch)
        expected = theirs(batch, padding=True, truncation=True, max_length=77, return_tensors="pt")
        assert torch.equal(tokens, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"].bool())
    assert tokenizer(PROMPTS)[0].shape == (4, 77) and len(tokenizer) == 49408 and mask.dtype == torch.bool
    assert (tokens[0, 0], tokens[0, mask.sum() - 1]) == (49406, 49407)  # the end of text counts as a token


def test_words_by_hand():
    expected = ["don", "'t", "stop", "it", "'s", "½", "x", "2", "0", "!!", "οδοσ"]
    assert words("Don't  STOP it's ½ x20!!\u3000ΟΔΟΣ") == expected
    assert words("<|endoftext|>a<|èndoftext|>") == ["<|endoftext|>", "a", "<|", "èndoftext", "|>"]
    assert words(".<|endoftext|>!<|ENDOFTEXT|>") == [".", "<|endoftext|>", "!<|", "endoftext", "|>"]
    assert words("\ufeff\ufeffRed \ud800") == ["red", "\ufffd"] == words("red \udcff")


def test_clip_names_words_that_it_does_not_know(byte_pairs):
    tokenizer = CLIPTokenizer.read(byte_pairs, length=6)
    text = "Two cats, 3 dogs"
    assert tokenizer.unknown(text) == [] and tokenizer.cut(text) == 1 and tokenizer.cut("Two cats 3") == 0
    for piece in ("cats</w>", "3</w>"):
        del tokenizer.vocabulary[piece]
    assert tokenizer.unknown(text) == ["cats", "3"] and tokenizer.unknown(f"two {END}") == []


def test_t5_tokens_are_those_of_transformers():
    """transformers has its own reading of the sentencepiece model. The two part where a text holds U+0085 (a
    space for it), a character that stands for others followed by a joiner, several marks on one letter, and
    where two ways to cut a word have the same score; there ours is sentencepiece's own, with which T5 was
    trained."""
    theirs = transformers.T5Tokenizer.from_pretrained(SPIECE.parent)  # from tokenizer.json, without protobuf
    tokenizer = Tokenizer(SPIECE.read_bytes(), length=256, extra=100)
    many = texts() + ["fill <extra_id_0> and<extra_id_99>in </s> it <pad><unk>."]
    many += ["<extra_id_100> <EXTRA_ID_0>"]
    for text, ids in zip(many, theirs(many)["input_ids"], strict=True):
        assert tokenizer.encode(text) + [1] == ids, repr(text[:200])
    for batch in (PROMPTS, PROMPTS[:3], [""]):
        tokens, mask = tokenizer(batch)
        expected = theirs(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        assert torch.equal(tokens, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"].bool())
    assert len(tokenizer) == len(theirs) == 32100
