import json

import pytest
import safetensors.torch
import torch

import weights


def samples():
    values = torch.tensor([[0, 1, 2], [3, 4, 5]])
    tensors = {f"t.{name}": values.to(dtype) for name, dtype in weights.DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": values.float().T}


def test_the_package_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.write(path, samples(), {"config": "{}", "name": "ä"})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"config": "{}", "name": "ä"}
        assert set(file.keys()) == set(samples())
        for name, tensor in samples().items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_we_read_what_the_package_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {name: t.contiguous() for name, t in samples().items()}
    safetensors.torch.save_file(tensors, path, {"x": "y"})
    read, metadata = weights.read(path)
    assert metadata == {"x": "y"} and set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def bad_header(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 16


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        (10**15).to_bytes(8, "little") + b"{}",
        bad_header(b"not json"),
        bad_header([1, 2]),
        bad_header({"a": dict(dtype="F32", shape=[100], data_offsets=[0, 400])}),
        bad_header({"a": dict(dtype="F32", shape=[4], data_offsets=[0, 8])}),
        bad_header({"a": dict(dtype="F99", shape=[4], data_offsets=[0, 16])}),
        bad_header({"a": dict(dtype="F32", shape=[4], data_offsets=[-16, 0])}),
        bad_header({"a": dict(dtype="F32", shape=[4])}),
    ],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.safetensors is not a"):
        weights.read(path)
