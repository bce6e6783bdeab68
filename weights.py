"""Weights on disk: the safetensors format, read and written without the package.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the raw
bytes of the tensors. Nothing in it can run code. Metadata (strings) stands in the header under "__metadata__".
"""
import json
import math
import os

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(path, tensors, metadata=None):
    """Writes a dictionary of tensors, and one of strings, to `path`; the file appears whole or not at all."""
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
    with open(f"{path}.tmp", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for blob in blobs:
            file.write(blob)
    os.replace(f"{path}.tmp", path)


def read(path):
    """Returns (tensors, metadata). ValueError, naming the file, if it is not a whole and consistent safetensors file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is not a safetensors file, or it was cut short: {size} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = {}
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
                if end - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= end <= size - 8 - length:
                    raise ValueError(f"tensor {name} does not fit its bytes; was the file cut short?")
                file.seek(8 + length + start)
                data = bytearray(file.read(end - start))
                flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                tensors[name] = flat.reshape(shape)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return tensors, metadata
