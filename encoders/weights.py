"""Weights on disk: the safetensors format, read here so that no sixth package is needed; published folders.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and
the tensors' bytes without gaps. The header's "__metadata__" holds strings.

A published folder is config.json and one file of weights, or several ("shards") with an index. Its files are
not trusted: a header is checked against the file's size before anything that it claims is allocated, and .bin
files (torch.save) are read as weights only, so that no code in them runs.
"""
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.files import remove_parts, written_whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILES = (  # of a published folder; the first that exists counts
    "model.safetensors", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin",
)


def write(path, tensors, metadata=None):
    """Writes {name: tensor} and metadata {name: string} to `path`; the file appears complete or not at all.
    OSError, naming it, if it cannot be written (the disk may be full)."""
    header, blobs, end = {"__metadata__": metadata or {}}, [], 0
    for name, tensor in tensors.items():
        blobs.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        start, end = end, end + blobs[-1].size
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    try:
        remove_parts(Path(path).parent)
        with written_whole(path) as part, open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for blob in blobs:
                file.write(blob)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from None


def read(path):
    """Returns ({name: tensor}, metadata). ValueError, naming the file, if it is damaged or something else."""
    entries, metadata = header_of(path)
    return dict(tensors_of(path, entries)), metadata


def header_of(path):
    """Returns ({name: (dtype, shape, start, size)}, metadata), start and size in bytes. ValueError as in
    `read`. The rules are the package's, and two more: no name occurs twice, and torch can hold each shape."""
    total = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(total - 8, 100_000_000):  # the package's limit
            raise ValueError(f"{path} is not a safetensors file, or it was cut short: {total} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_twins)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are not strings")
        entries, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, position = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *position))
            if not isinstance(shape, list) or len(shape) > 64 or not whole:
                raise ValueError(f"the shape or position of tensor {name!r} is not possible")
            if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:  # zeros would hide an overflow
                raise ValueError(f"tensor {name!r} is too large")
            start, size = end, math.prod(shape) * dtype.itemsize
            end = start + size
            if position != [start, end]:
                raise ValueError(f"tensor {name!r} does not fit its bytes, overlaps another or leaves a gap")
            entries[name] = dtype, shape, 8 + length + start, size
        if 8 + length + end != total:
            raise ValueError(f"the tensors do not fill the file's {total} bytes; was it cut short?")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from None
    return entries, metadata


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


def tensors_of(path, names):
    """Yields (name, tensor) of a .safetensors or .bin file for each of `names`, one at a time. ValueError as
    in header_of and unpickled, or if the file lacks one of them."""
    pickled = Path(path).suffix == ".bin"
    entries = unpickled(path) if pickled else header_of(path)[0]
    for name in names:
        if name not in entries:
            raise ValueError(f"{path} has no tensor {name!r}")
        if pickled:
            yield name, entries[name].detach()
        else:
            dtype, shape, start, size = entries[name]
            data = torch.from_numpy(np.fromfile(path, np.uint8, size, offset=start))
            flat = data.view(dtype) if size else torch.empty(0, dtype=dtype)
            yield name, flat.reshape(shape)


def json_object(path):
    """A JSON file that holds a dictionary → the dictionary. ValueError, naming the file, if it does not."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def file_in(folder, name):
    """Path of a file in a published folder. ValueError if there is no such file or folder."""
    path = Path(folder) / name
    if not path.parent.is_dir():
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


KINDS = {  # of a value in config.json, by its default's: what it is called
    int: "a whole number above 0", float: "a number", bool: "true or false", dict: "a dictionary",
    tuple: "a list of whole numbers above 0",
}


def of_kind(value, kind):
    """Whether a value of config.json is of one of KINDS. Numbers are below a million."""
    if kind is tuple:
        return type(value) is list and len(value) > 0 and all(of_kind(one, int) for one in value)
    if kind is int:
        return type(value) is int and 0 < value < 1_000_000
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1_000_000  # nor is it NaN
    return type(value) is kind


def read_values(folder, config, **known):
    """Values in config.json; known: name here=(published name, default). ValueError, naming the folder and
    the published name, if one is not of its default's kind."""
    values = {ours: config.get(key, default) for ours, (key, default) in known.items()}
    for ours, (key, default) in known.items():
        if values[ours] is not default and not of_kind(values[ours], type(default)):
            found = repr(values[ours])[:100]
            raise ValueError(f"{folder}/config.json: {key} is {found}, not {KINDS[type(default)]}")
    return values


def check_values(folder, config, **built):
    """ValueError if config.json asks for what is not built here. built: key=[values], its default first."""
    for key, values in built.items():
        value = config.get(key, values[0])
        if value not in values:
            only = " or ".join(map(repr, values))
            raise ValueError(f"{folder}/config.json: {key} is {value!r}; only {only} is built here")


def renamed(name, names):
    """A tensor's name with parts replaced in the order of `names`, {theirs: ours}; None if one is None."""
    for theirs, ours in names.items():
        if theirs in name:
            if ours is None:
                return None
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
            files = json_object(index).get("weight_map")
            beside = lambda file: Path(str(file)).name == file and file.endswith(path.suffix)
            if not isinstance(files, dict) or not all(map(beside, files.values())):
                raise ValueError(f"{index} does not say which tensor is in which {path.suffix} file there")
            return {name: path.with_name(file) for name, file in files.items()}
    raise ValueError(f"no weights in {folder}: none of {', '.join(FILES)}")


def load_into(module, folder, names, dtype=torch.float32, device="cpu"):
    """Fills a module, on any device or "meta", from a published folder, in `dtype`; returns it. Memory holds
    the module and one tensor. names: as in `renamed`; None leaves a tensor out. Of two with one name (T5
    lists its embedding twice), the alphabetically last counts. ValueError, naming the folder or file, if the
    tensors are not the module's or a file is missing or damaged; the module is then unchanged."""
    files, expected = files_of(folder), module.state_dict()
    source = {ours: name for name in sorted(files) if (ours := renamed(name, names)) is not None}
    missing = [name for name in expected if name not in source]
    unknown = [name for ours, name in source.items() if ours not in expected]
    if missing or unknown:
        lists = f"missing {missing[:3]}, unknown {unknown[:3]}"
        raise ValueError(f"{folder} does not hold the model's {len(expected)} tensors: {lists}")
    state = {}
    for path in sorted({files[name] for name in source.values()}):
        if not path.exists():
            raise ValueError(f"{path} is missing: the index beside it lists it")
        wanted = {name: ours for ours, name in source.items() if files[name] == path}
        for name, tensor in tensors_of(path, wanted):
            shape = expected[wanted[name]].shape
            if tensor.shape not in (shape, (*shape, 1, 1)):  # a linear layer may be a 1×1 convolution there
                found = f"has the shape {tuple(tensor.shape)}, the model has {tuple(shape)}"
                raise ValueError(f"{path}: tensor {name!r} {found}")
            tensor = tensor.reshape(shape)
            state[wanted[name]] = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    module.load_state_dict(state, assign=True)
    return module


def load_frozen(kind, config, pieces, folder, names, dtype, device):
    """kind(config), a text encoder, filled and frozen. ValueError as in load_into, or if it lacks pieces."""
    if pieces > config.vocabulary:
        raise ValueError(f"{folder}: the tokenizer has {pieces} pieces, the model {config.vocabulary}")
    with torch.device("meta"):  # no memory and no random numbers: every parameter is replaced
        encoder = kind(config)
    return load_into(encoder, folder, names, dtype, device).eval().requires_grad_(False)
