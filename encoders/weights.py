"""Weights on disk: the safetensors format, read here so that no sixth package is needed; published folders.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and
the tensors' bytes without gaps. Nothing in it can run code. The header's "__metadata__" holds strings.

A published folder is config.json and one file of weights, or several ("shards") with an index. Its files are
not trusted: a header is checked against the file's size before anything that it claims is allocated, and .bin
files (torch.save) are read as weights only, so that nothing in them runs.
"""
import json
import math
import os
import zipfile
from pathlib import Path

import torch

from common.files import written_whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, the package's own limit
FILES = (  # of a published folder; the first that exists counts
    "model.safetensors", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin",
)


def write(path, tensors, metadata=None):
    """Writes {name: tensor} and metadata {name: string} to `path`; the file appears complete or not at all.
    OSError, naming it, if it cannot be written (the disk may be full)."""
    header, blobs, offset = {"__metadata__": metadata or {}}, [], 0
    for name, tensor in tensors.items():
        blob = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        end = offset + blob.size
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[offset, end])
        blobs.append(blob)
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    try:
        with written_whole(path) as part, open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for blob in blobs:
                file.write(blob)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from None


def read(path):
    """Returns ({name: tensor}, metadata). ValueError, naming the file, if it is damaged or something else."""
    return dict(tensors_of(path)), header_of(path)[1]


def header_of(path):
    """Returns ({name: (dtype, shape, start, end)}, metadata), start and end in bytes. ValueError as in
    `read`. The rules are the package's, and one more: no name may occur twice."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise ValueError(f"{path} is not a safetensors file, or it was cut short: {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_twins)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are not strings")
        entries = {name: checked_entry(name, entry, 8 + length) for name, entry in header.items()}
        spans = sorted((start, end) for _, _, start, end in entries.values())
        if [8 + length, *(end for _, end in spans)] != [*(start for start, _ in spans), size]:
            raise ValueError(f"tensors overlap, leave a gap, or do not fill {size} bytes; was it cut short?")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from None
    return entries, metadata


def checked_entry(name, entry, data):
    """A tensor's entry in the header → (dtype, shape, start, end). data: where the tensors begin."""
    dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 64:
        raise ValueError(f"the shape of tensor {name!r} is not a list of at most 64 numbers")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)):
        raise ValueError(f"the shape or position of tensor {name!r} is not possible")
    size = math.prod(max(n, 1) for n in shape) * dtype.itemsize  # without zeros, which would hide an overflow
    if size >= 2**63 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} does not fit its bytes")
    return dtype, shape, data + start, data + end


def without_twins(pairs):
    """(name, value) pairs of a JSON object → dictionary. ValueError if a name occurs twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in the header twice")
    return dict(pairs)


def unpickled(path):
    """{name: tensor} of a .bin file, as torch.save writes a state_dict, mapped into memory and not yet read.
    ValueError, naming the file, if it holds anything but tensors."""
    try:
        # files from before 2020 are no zip files, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception:  # a damaged pickle fails in any way, and PyTorch's message advises to load it unsafely
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{path} is not a file of tensors alone, as torch.save writes, or it was cut short")
    return tensors


def tensors_of(path, names=None):
    """Yields (name, tensor) of a .safetensors or .bin file, one at a time; only those in `names` if given.
    ValueError as in header_of and unpickled, or if the file lacks one of the names."""
    pickled = str(path).endswith(".bin")
    entries = unpickled(path) if pickled else header_of(path)[0]
    with open(path, "rb") as file:
        for name in entries if names is None else names:
            if name not in entries:
                raise ValueError(f"{path} has no tensor {name!r}")
            if pickled:
                yield name, entries[name].detach()
                continue
            dtype, shape, start, end = entries[name]
            data = bytearray(end - start)
            file.seek(start)
            if file.readinto(data) < len(data):
                raise ValueError(f"{path} was cut short while it was read")
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            yield name, flat.reshape(shape)


def json_object(path):
    """A JSON file that holds a dictionary → the dictionary. ValueError, naming the file, if it does not."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def file_in(folder, name):
    """Path of a file in a published folder. ValueError if there is no such file or folder."""
    path = Path(folder) / name
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    if not path.is_file():
        raise ValueError(f"no {name} in {folder}")
    return path


def read_config(folder, *kinds):
    """config.json of a published folder → dictionary. ValueError, naming the folder or file, if it is missing
    or its "model_type" ("_class_name" if diffusers wrote it) is not one of `kinds`."""
    path = file_in(folder, "config.json")
    config = json_object(path)
    kind = config.get("model_type", config.get("_class_name"))
    if kind not in kinds:
        raise ValueError(f"{path} is of a model of type {kind!r}, not {' or '.join(kinds)}")
    return config


def whole_numbers(folder, config, **known):
    """Sizes in config.json; known: name here=(published name, default). ValueError if one is not above 0."""
    for name, default in known.values():
        value = config.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{folder}/config.json: {name} is {value!r}, not a whole number above 0")
    return {ours: config.get(name, default) for ours, (name, default) in known.items()}


def check_values(folder, config, **known):
    """ValueError if config.json asks for what is not built here; known: name=(default, values built)."""
    for name, (default, built) in known.items():
        value = config.get(name, default)
        if value not in built:
            built = " or ".join(map(repr, built))
            raise ValueError(f"{folder}/config.json: {name} is {value!r}; only {built} is built here")


def replaced(name, parts):
    """The name with each of `parts` {theirs: ours} replaced, in this order."""
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def files_of(folder):
    """{name of a tensor: path of the file that holds it} for a published folder; safetensors go before .bin.
    ValueError, naming the folder or file, if there are no weights or the index cannot be read."""
    for name in FILES:
        path, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
        if path.exists():
            return dict.fromkeys(unpickled(path) if path.suffix == ".bin" else header_of(path)[0], path)
        if index.exists():
            files, suffix = json_object(index).get("weight_map"), path.suffix
            if not isinstance(files, dict) or not all(is_shard(file, suffix) for file in files.values()):
                raise ValueError(f"{index} does not say which tensor is in which {suffix} file beside it")
            return {name: path.with_name(file) for name, file in files.items()}
    raise ValueError(f"no weights in {folder}: none of {', '.join(FILES)}")


def is_shard(file, suffix):
    """Whether an index's value names a file with this suffix in the index's own folder."""
    return isinstance(file, str) and file.endswith(suffix) and not set(file) & set("/\\:\0")


def load_into(module, folder, rename, dtype=torch.float32, device="cpu"):
    """Fills a module, on any device or "meta", from a published folder; returns it. Memory holds the module
    and one tensor. Floating-point tensors become `dtype`. rename: published name → name here, or None to
    leave a tensor out; of two with one name (T5 lists its embedding twice), the alphabetically last counts.
    ValueError, naming the folder or file, if a tensor or shard is missing, a tensor has another shape or no
    place in the module, or a file is damaged; the module is then unchanged."""
    files, expected = files_of(folder), module.state_dict()
    source = {ours: name for name in sorted(files) if (ours := rename(name)) is not None}
    missing = [name for name in expected if name not in source]
    if missing:
        counts = f"{len(missing)} of the model's {len(expected)}"
        raise ValueError(f"{folder} lacks {counts} tensors, {missing[0]!r} for one")
    extra = [name for ours, name in source.items() if ours not in expected]
    if extra:
        tensors = f"{len(extra)} tensors that have no place in the model"
        raise ValueError(f"{folder} holds {tensors}, {extra[0]!r} for one")
    state = {}
    for path in sorted({files[name] for name in source.values()}):
        if not path.exists():
            raise ValueError(f"{path} is missing: the index beside it lists it")
        names = {name: ours for ours, name in source.items() if files[name] == path}
        for name, tensor in tensors_of(path, names):
            shape, found = tuple(expected[names[name]].shape), tuple(tensor.shape)
            if found not in (shape, (*shape, 1, 1)):  # a linear layer may be written as a 1×1 convolution
                raise ValueError(f"{path}: tensor {name!r} has the shape {found}, the model has {shape}")
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.reshape(shape)
            state[names[name]] = tensor.to(device, kind, copy=True, memory_format=torch.contiguous_format)
    module.load_state_dict(state, assign=True)
    return module


def load_frozen(kind, config, pieces, folder, rename, dtype, device):
    """kind(config), a text encoder, filled and frozen. ValueError as in load_into, or if it lacks pieces."""
    if pieces > config.vocabulary:
        raise ValueError(f"{folder}: the tokenizer has {pieces} pieces, the model {config.vocabulary}")
    with torch.device("meta"):  # no memory and no random numbers: every parameter is replaced
        encoder = kind(config)
    return load_into(encoder, folder, rename, dtype, device).eval().requires_grad_(False)
