"""Weights on disk: the safetensors format, read and written without the package, and folders as published on the hub.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the raw
bytes of the tensors, one after another without gaps. Nothing in it can run code. Metadata (strings) stands in the
header under "__metadata__".

A published folder is config.json beside one file of weights, or several ("shards") with an index that says which
tensor is in which. load_into fills a module from it one tensor at a time: no more memory is needed than the module's
own and one tensor's. Files from others are not trusted: a header is checked against the file's size before anything
that it claims is allocated, and .bin files (torch.save) are read as weights alone, so that nothing in them runs.
"""
import json
import math
import os
import zipfile
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, the package's own limit


def write(path, tensors, metadata=None):
    """Writes a dictionary of tensors, and one of strings, to `path`; the file appears whole or not at all. OSError, naming
    it, if it cannot be written (the disk may be full)."""
    header, blobs, offset = {"__metadata__": metadata or {}}, [], 0
    for name, tensor in tensors.items():
        blob = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header[name] = dict(
            dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, offset + blob.size]
        )
        blobs.append(blob)
        offset += blob.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for blob in blobs:
                file.write(blob)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None


def read(path):
    """Returns (tensors, metadata). ValueError, naming the file, if it is not a whole and consistent safetensors file."""
    return dict(tensors_of(path)), header_of(path)[1]


def header_of(path):
    """Returns ({name: (dtype, shape, start, end)}, metadata) of a safetensors file, start and end in bytes of the file.
    ValueError as in `read`. The rules are the package's: tensors lie one after another, from the header to the end of
    the file; the header may have any length. Names given twice, which the package lets pass, are refused."""
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
        entries = {}
        for name, entry in header.items():
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not isinstance(shape, list) or len(shape) > 64:
                raise ValueError(f"the shape of tensor {name!r} is not a list of at most 64 numbers")
            if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)):
                raise ValueError(f"the shape or place of tensor {name!r} is not possible")
            if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
                raise ValueError(f"tensor {name!r} is too large to count")
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} does not fit its bytes")
            entries[name] = dtype, shape, 8 + length + start, 8 + length + end
        position = 8 + length
        for name, (_, _, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if start != position:
                raise ValueError(f"tensor {name!r} overlaps the one before it, or leaves a gap")
            position = end
        if position != size:
            raise ValueError(f"its tensors need {position} bytes, it has {size}; was the file cut short?")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {' '.join(str(error).split())[:300]}") from None
    return entries, metadata


def without_twins(pairs):
    """Pairs of a JSON object → dictionary. ValueError if a name stands there twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in the header twice")
    return dict(pairs)


def unpickled(path):
    """{name: tensor} of a .bin file, as torch.save writes a state_dict; its bytes are mapped, not yet read. ValueError,
    naming the file, if it holds anything but tensors."""
    try:
        # files from before 2020 are no zip files, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        whole = isinstance(tensors, dict) and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    except OSError:
        raise
    except Exception:  # a damaged pickle may fail in any way; PyTorch's text advises to execute it, which we do not repeat
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a file of tensors alone, as torch.save writes them, or it was cut short")
    return tensors


def tensors_of(path, names=None):
    """Yields (name, tensor), one by one, of a .safetensors or .bin file; of those in `names` alone if given. The tensors of
    a .bin are views of the mapped file. ValueError as in header_of and unpickled, or if the file lacks one of the names."""
    pickle = str(path).endswith(".bin")
    entries = unpickled(path) if pickle else header_of(path)[0]
    with open(path, "rb") as file:
        for name in entries if names is None else names:
            if name not in entries:
                raise ValueError(f"{path} has no tensor {name!r}")
            if pickle:
                yield name, entries[name].detach()
                continue
            dtype, shape, start, end = entries[name]
            data = bytearray(end - start)
            file.seek(start)
            if file.readinto(data) < len(data):
                raise ValueError(f"{path} was cut short while it was read")
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            yield name, flat.reshape(shape)


def read_config(folder, *kinds):
    """config.json of a published folder, as a dictionary. ValueError, naming the folder or file, if there is none, or its
    "model_type" (or "_class_name", where diffusers wrote it) is not one of `kinds`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"no config.json in {folder}" if Path(folder).is_dir() else f"there is no folder {folder}")
    config = json_object(path)
    kind = config.get("model_type", config.get("_class_name"))
    if kind not in kinds:
        raise ValueError(f"{path} is of a model of type {kind!r}, not {' or '.join(kinds)}")
    return config


def whole_number(folder, config, name, default):
    """A number of config.json; default: what it means if it is left out. ValueError if it is not a whole one above 0."""
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{folder}/config.json: {name} is {value!r}, not a whole number above 0")
    return value


def check_values(folder, config, **known):
    """ValueError where config.json has another value than those that are built here; known: name=(default, values)."""
    for name, (default, values) in known.items():
        if config.get(name, default) not in values:
            values = " or ".join(map(repr, values))
            raise ValueError(f"{folder}/config.json: {name} is {config.get(name, default)!r}; only {values} is built here")


def json_object(path):
    """A JSON file that holds a dictionary. ValueError, naming the file, if it does not."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def places_of(folder):
    """{name of a tensor: path of the file that holds it} for a published folder. safetensors are preferred to .bin.
    ValueError, naming the folder or file, if there are no weights or the index cannot be read."""
    kinds = "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin"
    for path in (Path(folder) / kind for kind in kinds):
        index = path.with_name(f"{path.name}.index.json")
        if path.exists():
            return dict.fromkeys(unpickled(path) if path.suffix == ".bin" else header_of(path)[0], path)
        if index.exists():
            places = json_object(index).get("weight_map")
            if not isinstance(places, dict) or not all(is_plain(place, path.suffix) for place in places.values()):
                raise ValueError(f"{index} does not say which tensor is in which {path.suffix} file beside it")
            return {name: path.with_name(place) for name, place in places.items()}
    raise ValueError(f"no weights in {folder}: none of {', '.join(kinds)}")


def is_plain(place, suffix):
    """Whether an index names a file in its own folder, and of its own kind."""
    return isinstance(place, str) and place.endswith(suffix) and not set(place) & set("/\\:\0")


def load_into(module, folder, rename, dtype=torch.float32, device="cpu"):
    """Fills a module, made on the meta device or any other, from a published folder, and returns it.

    rename: function from a published name to ours, or to None for a tensor to leave out; where two come to the same name
    (T5 lists its embedding twice), the last in alphabetical order is read. What is floating point becomes dtype.
    ValueError, in one line that names the folder or file: a tensor is missing, has another shape or no place in the
    module; a shard is missing; a file is damaged. The module is then as before."""
    places, expected = places_of(folder), module.state_dict()
    source = {ours: name for name in sorted(places) if (ours := rename(name)) is not None}
    missing = [name for name in expected if name not in source]
    extra = [name for ours, name in source.items() if ours not in expected]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's {len(expected)} tensors, {missing[0]!r} for one")
    if extra:
        raise ValueError(f"{folder} holds {len(extra)} tensors that have no place in the model, {extra[0]!r} for one")
    state = {}
    for path in sorted({places[name] for name in source.values()}):
        if not path.exists():
            raise ValueError(f"{path} is missing: the index beside it lists it")
        here = {name: ours for ours, name in source.items() if places[name] == path}
        for name, tensor in tensors_of(path, here):
            wanted = expected[here[name]].shape
            if tensor.shape == (*wanted, 1, 1):  # a linear layer, written as a convolution
                tensor = tensor.reshape(wanted)
            if tensor.shape != wanted:
                raise ValueError(f"{path}: tensor {name!r} has the shape {tuple(tensor.shape)}, the model has {tuple(wanted)}")
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            state[here[name]] = tensor.to(device, kind, copy=True, memory_format=torch.contiguous_format)
    module.load_state_dict(state, assign=True)
    return module
