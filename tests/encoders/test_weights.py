import json
import os
import tracemalloc

import pytest
import safetensors.torch
import torch

from encoders import weights


def samples():
    values = torch.tensor([[0, 1, 2], [3, 4, 5]])
    tensors = {f"t.{name}": values.to(dtype) for name, dtype in weights.DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": values.float().T}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype


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
    assert metadata == {"x": "y"}
    assert_same(read, tensors)


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


def entry(shape, start, end, dtype="F32", **more):
    return dict(dtype=dtype, shape=shape, data_offsets=[start, end]) | more


WHOLE = entry([4], 0, 16)
ONE = json.dumps(WHOLE)
HOSTILE = {
    "overlap": {"a": WHOLE, "b": WHOLE},
    "partial overlap": {"a": entry([3], 0, 12), "b": entry([2], 8, 16)},
    "gap": {"a": entry([1], 0, 4), "b": entry([2], 8, 16)},
    "gap before the first": {"a": entry([1], 12, 16)},
    "bytes after the last": {"a": entry([1], 0, 4)},
    "bytes without a tensor": {},
    "past the end": {"a": entry([8], 0, 32)},
    "backwards": {"a": entry([4], 16, 0)},
    "negative start": {"a": entry([8], -16, 16)},
    "negative shape": {"a": entry([-4], 0, 16)},
    "two negative": {"a": entry([-2, -2], 0, 16)},
    "fraction": {"a": entry([4.0], 0, 16)},
    "truth value": {"a": entry([True, 4], 0, 16)},
    "shape is text": {"a": entry("4", 0, 16)},
    "shape is a dictionary": {"a": entry({}, 0, 4), "b": entry([3], 4, 16)},
    "overflow": {"a": entry([2**63, 2**63, 0], 0, 0), "b": WHOLE},
    "overflow behind a zero": {"a": entry([0, 2**62, 2**62], 0, 0), "b": WHOLE},
    "beyond 64 bits": {"a": entry([2**64], 0, 16)},
    "more than there is memory": {"a": entry([2**48], 0, 2**50)},
    "a thousand dimensions": {"a": entry([1] * 1000, 0, 4), "b": entry([3], 4, 16)},
    "three offsets": {"a": dict(dtype="F32", shape=[4], data_offsets=[0, 16, 16])},
    "type is a list": {"a": entry([4], 0, 16, ["F32"])},
    "entry is text": {"a": "F32"},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": WHOLE},
    "metadata is a list": {"__metadata__": [], "a": WHOLE},
    "name twice": f'{{"a": {ONE}, "a": {ONE}}}'.encode(),
    "type twice": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    "metadata twice": f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {ONE}}}'.encode(),
    "UTF-16": json.dumps({"a": WHOLE}).encode("utf-16"),
    "not UTF-8": b'{"\xff": ' + ONE.encode() + b"}",
    "something behind": json.dumps({"a": WHOLE}).encode() + b"\0",
    "very deep": b"[" * 100_000,
    "text": b'"text"',
    "a name of two lines": {"a\nb": entry([-4], 0, 16)},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bad_header(HOSTILE[case]))
    with pytest.raises(ValueError, match="bad.safetensors is not a whole safetensors file") as error:
        weights.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if case not in ("name twice", "overflow behind a zero", "a thousand dimensions"):
        with pytest.raises(safetensors.SafetensorError):  # the package refuses it too
            safetensors.safe_open(path, "pt")


def test_unusual_files_are_read_as_the_package_reads_them(tmp_path):
    path = tmp_path / "a.safetensors"
    usual = json.dumps({"a": WHOLE}).encode()
    headers = [usual + b" " * n for n in range(9)] + [b" \n" + usual]  # of any length, aligned or not
    headers += [json.dumps(header).encode() for header in (
        {"b": entry([2], 8, 16), "a": entry([2], 0, 8)},
        {"b": entry([1], 0, 1, "U8"), "a": entry([3], 1, 13), "c": entry([3], 13, 16, "I8")},
        {"a": entry([], 0, 4), "b": entry([3], 4, 16), "e": entry([0, 3], 4, 4), "f": entry([0], 16, 16)},
        {"__metadata__": None, "a": WHOLE | dict(more=[1])},
    )]
    for header in headers:
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(16)))
        assert_same(weights.read(path)[0], safetensors.torch.load_file(path))


def test_nothing_is_allocated_before_it_is_checked(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes((150_000_000).to_bytes(8, "little") + b"{}")
    os.truncate(path, 200_000_000)  # as long as the header claims, and no room on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match="bad.safetensors is not a safetensors file"):
        weights.read(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_every_type_of_the_package_is_known():
    assert weights.DTYPES.items() >= safetensors.torch._TYPES.items()


def test_a_published_folder_of_diffusers_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(1, 3))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert weights.read_config(tmp_path, "AutoencoderKL") == {"_class_name": "AutoencoderKL"}
    with pytest.raises(ValueError, match="config.json is of a model of type 'AutoencoderKL', not t5"):
        weights.read_config(tmp_path, "t5")
    published = {f"vae.{name}": tensor for name, tensor in module.state_dict().items()}
    published["loss.w"] = torch.ones(1)
    for file, save in (
        ("diffusion_pytorch_model.bin", torch.save),
        ("diffusion_pytorch_model.safetensors", safetensors.torch.save_file),
    ):
        published["vae.0.bias"] += 1  # the second file, safetensors, is preferred: what is read has changed
        save(published, tmp_path / file)
        with torch.device("meta"):
            empty = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(1, 3))
        filled = weights.load_into(empty, tmp_path, {"loss.": None, "vae.": ""}, torch.bfloat16)
        assert {tensor.dtype for tensor in filled.state_dict().values()} == {torch.bfloat16}
        torch.testing.assert_close(filled[0].bias, published["vae.0.bias"].bfloat16())


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weights.write(path, {"a": torch.ones(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=f"{path} could not be written: .*No space left"):
        weights.write(path, {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == [path] and torch.equal(weights.read(path)[0]["a"], torch.ones(3))
