import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import folder, tar_shards
from training.batches import Step

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number, size=16, kind="PNG"):
    """The bytes of a picture of one colour, which tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 77)).save(file, kind)
    return file.getvalue()


def pack(path, files, kind="pax"):
    """Writes a tar: files is a list of (name, bytes), or of TarInfos for what has no content."""
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for entry in files:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                member = tarfile.TarInfo(entry[0])
                member.size = len(entry[1])
                tar.addfile(member, io.BytesIO(entry[1]))


def sample(key, number=0):
    return [(f"{key}.png", picture(number)), (f"{key}.txt", f"number {number}".encode())]


def make(folder, counts):
    """Shards of so many samples each, numbered through: sample i has the colour and the caption of i."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        files = sum((sample(f"{i:06d}", i) for i in range(number, number + count)), [])
        pack(folder / f"{shard:03d}.tar", files)
        number += count
    return tar_shards.TarShards(folder, 8)


def read(dataset, indices):
    """Pictures and captions."""
    return dataset[list(indices)][1:3]


def batches(dataset, steps, batch_size, seed=0, rank=0, world=1):
    """The indices of one process's rows of each of the steps."""
    rows = slice(batch_size // world * rank, batch_size // world * (rank + 1))
    return [Step(seed, step, rows, batch_size).indices(len(dataset), order=dataset.order).tolist() for step in steps]


def numbers(pictures, captions):
    """Which samples were read, by their captions; their pictures must say the same."""
    found = [int(caption.split()[1]) for caption in captions]
    assert found == (pictures[:, 0, 0, 0].long() + 256 * pictures[:, 1, 0, 0].long()).tolist()
    return found


def reasons(dataset):
    return {name.rsplit(": ", 1)[1]: reason for name, reason in dataset.skipped if ": " in name}


# ------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_an_epoch_for_any_ranks_and_workers(tmp_path, world, workers):
    dataset = make(tmp_path / "shards", [5, 1, 9, 4, 6, 3, 7, 2, 4, 6])  # 47 samples in batches of 6
    rows = []
    for rank in range(world):
        part = list(tar_shards.read_ahead(dataset, batches(dataset, range(16), 6, 1, rank, world), workers))
        assert all(x.shape == (6 // world, 3, 8, 8) and x.dtype == torch.uint8 for _, x, _, _ in part)
        assert not any(bad for _, _, _, bad in part)
        rows.append([numbers(x, captions) for _, x, captions, _ in part])
        assert rows[-1] == [names for names, _, _, _ in part]
    together = sum((sum(step, []) for step in zip(*rows)), [])
    assert len(together) == 96
    assert sorted(together[:47]) == sorted(together[47:94]) == list(range(47))
    assert together[:47] != together[47:94]
    assert together == sum(batches(dataset, range(16), 6, 1), [])


def test_a_run_resumed_in_mid_epoch_goes_on_at_the_next_sample(tmp_path):
    dataset = make(tmp_path / "shards", [5, 8, 6])
    whole = [captions for _, _, captions, _ in tar_shards.read_ahead(dataset, batches(dataset, range(12), 4, 3), 0)]
    fresh = tar_shards.TarShards(tmp_path / "shards", 8)
    rest = [captions for _, _, captions, _ in tar_shards.read_ahead(fresh, batches(fresh, range(3, 12), 4, 3), 1)]
    assert whole[3:] == rest
    row = sum(whole[:3] + rest, [])
    assert len(set(row[:19])) == len(set(row[19:38])) == 19


def test_the_order_is_a_permutation_with_locality(tmp_path):
    dataset = make(tmp_path / "shards", [6] * 40)
    first, second = dataset.order(0, 0), dataset.order(0, 1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(240))
    assert (first == second).float().mean() < 0.1 and (first == dataset.order(1, 0)).float().mean() < 0.1
    assert torch.equal(first, dataset.order(0, 0)) and first.dtype == torch.int64
    for order in (first, second):
        in_use = [(order[i : i + 24] // 6).unique().numel() for i in range(0, 240 - 24)]
        assert max(in_use) <= 2 * tar_shards.WINDOW and min(in_use[::48]) > 4  # few files, but several
        neighbours = (order[1:] - order[:-1]).abs() == 1
        assert neighbours.float().mean() < 0.2
    windows = (first // 6).view(-1, 6 * tar_shards.WINDOW)
    assert all(len(window.unique()) == tar_shards.WINDOW for window in windows)
    assert windows[0].unique().diff().max() > 1  # and not neighbouring shards


def test_a_seed_gives_the_order_that_it_always_gave(tmp_path):
    dataset = make(tmp_path / "shards", [5, 1, 9, 4, 6, 3, 7, 2, 4, 6])
    assert batches(dataset, [0, 7, 8], 6, 1) == [[15, 28, 2, 33, 31, 32], [42, 45, 6, 10, 9, 21], [9, 2, 12, 33, 11, 13]]


def test_a_batch_larger_than_the_data(tmp_path):
    dataset = make(tmp_path / "shards", [2, 1])
    whole = torch.cat([dataset.order(0, epoch) for epoch in range(6)])
    assert batches(dataset, [1], 8) == [whole[8:16].tolist()]


def test_reading_ahead_leaves_the_random_state_alone_and_may_go_on_without_end(tmp_path):
    dataset = make(tmp_path / "shards", [4, 4])
    state = torch.get_rng_state()
    found = {}
    for workers in (0, 2):
        endless = ([i % 8, (i + 3) % 8] for i in itertools.count())
        reading = tar_shards.read_ahead(dataset, endless, workers)
        found[workers] = [numbers(*next(reading)[1:3]) for _ in range(7)]
        reading.close()
    assert found[0] == found[2] == [[i % 8, (i + 3) % 8] for i in range(7)]
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------ what is in a tar


@pytest.mark.parametrize("kind", FORMATS)
def test_the_index_says_what_tarfile_reads(tmp_path, kind):
    """Names of every length and script: ustar's prefix, GNU's long names, PAX headers."""
    stems = ["a", "./b", "folder/c", "p" * 90 + "/" + "q" * 60, "schlüssel"]
    stems += ["r" * 300, "ключ/画像 é"] if kind != "ustar" else []
    pack(tmp_path / "x.tar", sum((sample(stem, i) for i, stem in enumerate(stems)), []), kind)
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert not dataset.skipped and len(dataset) == len(stems)
    assert json.loads(dataset.texts[0])["keys"] == [stem.removeprefix("./") for stem in stems]
    raw = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        for row, stem in zip(dataset.rows.tolist(), stems):
            for suffix, (offset, size) in ((".png", row[:2]), (".txt", row[2:4])):
                assert raw[offset : offset + size] == tar.extractfile(stem + suffix).read()
    assert numbers(*read(dataset, range(len(stems)))) == list(range(len(stems)))


@pytest.mark.skipif(shutil.which("tar") is None, reason="the program tar is not installed")
@pytest.mark.parametrize("kind", ["v7", "ustar", "gnu", "pax"])
def test_tars_of_the_program_tar(tmp_path, kind):
    source, shards = tmp_path / "source", tmp_path / "shards"
    (source / "inner").mkdir(parents=True)
    shards.mkdir()
    stems = ["a", "inner/b", "inner/" + "c" * (80 if kind in ("v7", "ustar") else 200), "größe"]
    for i, stem in enumerate(stems):
        for name, raw in sample(stem, i):
            (source / name).write_bytes(raw)
    subprocess.run(["tar", f"--format={kind}", "-cf", shards / "x.tar", "-C", source, "."], check=True)
    dataset = tar_shards.TarShards(shards, 8)
    assert not dataset.skipped
    assert sorted(numbers(*read(dataset, range(4)))) == [0, 1, 2, 3]
    assert set(json.loads(dataset.texts[0])["keys"]) == set(stems)


def link(name, kind, target="/etc/passwd"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path):
    files = [
        *sample("good", 1), ("kid.jpg", picture(0, kind="JPEG")),
        ("kid.json", b'{"caption": " of  JSON ", "id": 7}'), *sample("both", 2),
        ("both.json", b'{"caption": "not this"}'),
        ("UPPER.PNG", picture(3)), ("UPPER.TXT", b"number 3"), ("silent.png", picture(0)),
        ("alone.txt", b"a caption"),
        ("empty.png", picture(0)), ("empty.txt", b" \n"), ("latin.png", picture(0)),
        ("latin.txt", "Äpfel".encode("latin-1")), ("odd.png", picture(0)), ("odd.json", b'{"caption": 3}'),
        ("half.png", picture(0)), ("half.json", b'{"caption": "\\ud83d"}'),
        ("list.png", picture(0)), ("list.json", b"[1, 2"),
        ("good.cls", b"7"), ("both.cls", b"7"), ("scan.tiff", b"II*"), ("._good.png", b"a Mac was here"),
        ("README", b"hello"), *sample("good", 9), ("good.webp", picture(9, kind="WEBP")),
        *sample("/absolute"), *sample("a/../../up"), *sample("line\nbreak"),
        link("soft.png", tarfile.SYMTYPE), link("soft.txt", tarfile.SYMTYPE),
        link("hard.png", tarfile.LNKTYPE, "good.png"), link("device.png", tarfile.CHRTYPE),
        link("pipe.png", tarfile.FIFOTYPE), link("folder.png", tarfile.DIRTYPE),
    ]
    pack(tmp_path / "x.tar", files)
    before = sorted(tmp_path.rglob("*"))
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert read(dataset, range(len(dataset)))[1] == ["number 1", "of JSON", "number 2", "number 3"]
    new = set(tmp_path.rglob("*")) - set(before)
    assert new == {tmp_path / "x.tar.index"}  # nothing is unpacked
    expected = {
        "silent": "no caption", "scan": "no caption", "alone": "no picture", "empty": "is empty", "latin": "not UTF-8",
        "odd": "not a text but 3", "half": "not UTF-8", "list": "the .json is not",
        "good.png": "has such a file", "good.txt": "already", "good.webp": "already",
        "/absolute.png": "absolute", "/absolute.txt": "absolute", "a/../../up.png": "..",
        "a/../../up.txt": "..", "line\nbreak.png": "control", "line\nbreak.txt": "control",
        "soft.png": "link", "soft.txt": "link",
        "hard.png": "link", "device.png": "device", "pipe.png": "device",
    }
    found = reasons(dataset)
    assert set(found) == set(expected)
    for name, words in expected.items():
        assert words in found[name], name


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    mark = "\ufeff".encode()
    captions = {"a.txt": b"red", "b.json": b'{"caption": "blue"}', "c.txt": b"", "d.json": rb'{"caption": "\ufeff"}'}
    for value in ("null", "NaN", "[]", "false", '{"en": "a"}'):
        captions[f"{len(captions)}.json"] = f'{{"caption": {value}}}'.encode()
    files = [(f"{name[0]}.png", picture(0)) for name in captions]
    pack(tmp_path / "x.tar", files + [(name, mark + raw) for name, raw in captions.items()])
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert read(dataset, range(2))[1] == ["red", "blue"] and len(dataset) == 2
    found = reasons(dataset)
    assert found["c"] == found["d"] == "the caption is empty"
    assert [found[f"{i}"].rsplit("but ")[1] for i in range(4, 9)] == ["null", "NaN", "[]", "false", '{"en": "a"}']


def test_files_of_unknown_kinds_are_counted_by_extension(tmp_path):
    """Over all tars; and so is what lies beside them."""
    for k in range(2):
        files = sample(f"{k}") + [(f"{k}.cls", b"7"), (f"{k}.depth.npy", b""), (f"{k}.heic", b"?")]
        files += [(f"__MACOSX/{k}.png", b"?"), ("Thumbs.db", b"?"), (f"._{k}.png", b"?"), (f"{k}x", b"?")]
        pack(tmp_path / f"{k}.tar", files[: len(files) - k])
    (tmp_path / "more").mkdir()
    for name in ("loose.png", "more/z.tar", "more/y.tar", "old.tar.gz", "README.md", ".hidden"):
        (tmp_path / name).write_bytes(b"?")
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert len(dataset) == 2 and {name for name, _ in dataset.skipped} == {str(tmp_path)}
    inside, beside = "no kind of picture or caption", "beside the .tar files of this folder, and not read"
    assert [reason for _, reason in dataset.skipped] == [
        f"2 .cls files: {inside}", f"2 .heic files: {inside}", f"2 .npy files: {inside}",
        f"1 extensionless file: {inside}", f"1 .gz file: {beside}", f"1 .png file: {beside}", f"2 .tar files: {beside}",
    ]


def test_damaged_tars_are_used_up_to_the_damage(tmp_path):
    """Cut at every 512th byte and a few more, and with a garbled header: what is before it is used."""
    pack(tmp_path / "whole.tar", sum((sample(f"{i}", i) for i in range(4)), []), "gnu")
    raw = (tmp_path / "whole.tar").read_bytes()
    rows = tar_shards.TarShards(tmp_path, 8).rows
    path = tmp_path / "cut" / "x.tar"
    path.parent.mkdir()
    for cut in sorted({*range(0, len(raw) - 2048, 512), *range(100, 5000, 701), rows[3, 2] + 3}):
        path.write_bytes(raw[:cut])
        whole = int((rows[:, 2] + rows[:, 3] <= cut).sum())
        _, keys, skipped = tar_shards.scan(path)
        assert keys == ["0", "1", "2", "3"][:whole], cut
        if cut < rows[3, 2] + 512:
            name, reason = skipped[0]
            assert name == "" and ("cut short" in reason or cut < 512 and "not a tar file" in reason)
    start = int(rows[2, 0]) - 512
    for rubbish in (b"\xff" * 512, b"A" * 100 + raw[start + 100 : start + 512]):
        path.write_bytes(raw[:start] + rubbish + raw[start + 512 :])
        _, keys, skipped = tar_shards.scan(path)
        assert keys == ["0", "1"] and "damaged" in skipped[0][1]


def test_a_size_below_zero_does_not_go_in_circles(tmp_path):
    pack(tmp_path / "x.tar", sample("a") + sample("b"), "gnu")
    raw = bytearray((tmp_path / "x.tar").read_bytes())
    start = int(tar_shards.TarShards(tmp_path, 8).rows[1, 0]) - 512
    back = (-1536).to_bytes(8, "big", signed=True)  # in GNU's base 256: to a.txt
    raw[start + 124 : start + 136] = b"\xff" * 4 + back
    raw[start + 148 : start + 156] = b" " * 8
    raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    (tmp_path / "x.tar").write_bytes(raw)
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert len(dataset) == 1 and any("damaged" in reason for _, reason in dataset.skipped)


def test_files_that_are_no_tars_beside_one_that_is(tmp_path):
    pack(tmp_path / "good.tar", sample("a", 1))
    (tmp_path / "zero.tar").write_bytes(b"")
    pack(tmp_path / "empty.tar", [])
    (tmp_path / "picture.tar").write_bytes(picture(1, 200))
    with tarfile.open(tmp_path / "gzip.tar", "w:gz"):
        pass
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert numbers(*read(dataset, [0])) == [1]
    found = {os.path.basename(name): reason for name, reason in dataset.skipped}
    assert set(found) == {"zero.tar", "empty.tar", "picture.tar", "gzip.tar"}
    assert found["empty.tar"] == "an empty tar"
    assert all("not a tar file" in found[name] for name in ("zero.tar", "picture.tar", "gzip.tar"))


def test_nothing_to_read(tmp_path):
    pack(tmp_path / "x.tar", [("a.png", picture(1))])
    with pytest.raises(ValueError, match=r"no usable sample(.|\n)*x.tar: a: no caption"):
        tar_shards.TarShards(tmp_path)


# --------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_gives_its_place_to_the_next_one(tmp_path, workers):
    files = sum((sample(f"{i}", i) for i in range(6)), [])
    for i in (1, 2, 5):  # the last one's place goes to the next shard
        files[2 * i] = (files[2 * i][0], files[2 * i][1][:50])
    pack(tmp_path / "0.tar", files)
    pack(tmp_path / "1.tar", sample("last", 6))
    dataset = tar_shards.TarShards(tmp_path, 8)
    assert len(dataset) == 7 and not dataset.skipped
    steps = [[0, 1], [2, 3], [1, 4], [5, 6]]
    found = list(tar_shards.read_ahead(dataset, steps, workers))
    assert [names for names, _, _, _ in found] == steps
    assert [numbers(x, captions) for _, x, captions, _ in found] == [[0, 3], [3, 3], [3, 4], [6, 6]]
    bad = {index: reason for _, _, _, some in found for index, reason in some.items()}
    assert set(bad) == {1, 2, 5}
    for index, reason in bad.items():  # in a line that names shard and key
        assert reason.startswith(f"{tmp_path / '0.tar'}: {index}: not a whole picture") and "\n" not in reason


def test_nothing_that_can_be_read_is_an_error_and_so_is_a_number_too_large(tmp_path):
    pack(tmp_path / "x.tar", [(name, raw[:40]) for name, raw in sample("a") + sample("b")])
    dataset = tar_shards.TarShards(tmp_path, 8)
    with pytest.raises(ValueError, match="none of 2 samples can be read .*not a whole picture"):
        read(dataset, [1])
    with pytest.raises(IndexError):
        read(dataset, [2])


def test_it_can_be_sent_to_another_process(tmp_path):
    dataset = make(tmp_path / "shards", [3, 3])
    assert numbers(*pickle.loads(pickle.dumps(dataset))[[5, 0]][1:3]) == [5, 0]
    assert dataset.caption(4) == "number 4"


# ------------------------------------------------------------------------------------------------- the index


def test_the_index_is_used_and_made_again_when_the_tar_changes(tmp_path, monkeypatch):
    make(tmp_path / "shards", [2, 2])
    scanned, scan = [], tar_shards.scan
    logged = lambda path: scanned.append(path.name) or scan(path)
    monkeypatch.setattr(tar_shards, "scan", logged)
    assert len(tar_shards.TarShards(tmp_path / "shards")) == 4 and scanned == []
    path = tmp_path / "shards" / "001.tar"
    time = path.stat().st_mtime_ns
    filler = [("w.png", bytes(20_000))]  # tarfile rounds a tar's size up to a multiple of 10,240
    pack(path, sample("x", 1) + sample("y", 2) + sample("z", 3) + filler)
    os.utime(path, ns=(time, time))  # another size alone
    dataset = tar_shards.TarShards(tmp_path / "shards", 8)
    assert numbers(*read(dataset, [2, 3, 4])) == [1, 2, 3] and scanned == ["001.tar"]
    assert dataset.skipped == tar_shards.TarShards(tmp_path / "shards").skipped != []
    pack(path, sample("a", 4) + sample("b", 5) + sample("c", 6) + filler)
    os.utime(path, ns=(time + 1, time + 1))  # another time alone
    dataset = tar_shards.TarShards(tmp_path / "shards", 8)
    assert numbers(*read(dataset, [2, 3, 4])) == [4, 5, 6] and scanned == ["001.tar"] * 2


def test_a_damaged_index_is_not_trusted(tmp_path):
    dataset = make(tmp_path / "shards", [3])
    index = tmp_path / "shards" / "000.tar.index"
    raw = index.read_bytes()
    rng = np.random.default_rng(0)
    for case in range(60):
        bad = bytearray(raw)
        if case < 20:
            bad = bad[: rng.integers(len(raw))]
        else:
            bad[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        index.write_bytes(bad)
        again = tar_shards.TarShards(tmp_path / "shards", 8)
        assert np.array_equal(again.rows, dataset.rows) and again.texts == dataset.texts, case
    assert {path.name for path in index.parent.iterdir()} == {"000.tar", index.name}  # and nothing temporary


def test_a_folder_that_cannot_be_written_will_do(tmp_path):
    pack(tmp_path / "x.tar", sample("a", 1))
    (tmp_path / "x.tar.index").mkdir()  # in the way of the index
    assert numbers(*tar_shards.TarShards(tmp_path, 8)[[0]][1:3]) == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_index_that_is_written_in_part_is_never_seen(tmp_path, monkeypatch):
    pack(tmp_path / "x.tar", sample("a", 1))

    def full(file, **arrays):
        file.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(tar_shards.TarShards(tmp_path, 8)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


# --------------------------------------------------------------------------------------------------- writing


def test_a_folder_packed_gives_what_the_folder_gives(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        image = Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), np.uint8))
        image.save(source / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
        (source / f"{i}.txt").write_text(f"picture  {i}, größer\n", encoding="utf-8")
    (source / "1.5 apples.JPG").write_bytes((source / "1.jpg").read_bytes())
    (source / "1.5 apples.txt").write_text("one and a half")
    (source / "broken.png").write_bytes(b"no")
    (source / "broken.txt").write_text("broken")
    tar_shards.main([str(source), str(tmp_path / "out"), "--per-shard", "3"])
    said = capsys.readouterr().out
    assert "8 pictures" in said and "1 of 9 files were left out" in said
    assert "broken.png: not a whole picture" in said
    plain, packed = folder.Folder(source, 16), tar_shards.TarShards(tmp_path / "out", 16)
    assert [path.name for path in packed.paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert not packed.skipped
    pictures, captions = read(packed, range(8))
    assert captions == plain.captions and torch.equal(pictures, plain.pictures(range(8)))
    sources = sorted(path for path in source.iterdir() if path.suffix != ".txt" and path.stem != "broken")
    for number, path in enumerate(sources):
        with tarfile.open(packed.paths[number // 3]) as tar:  # the very bytes
            assert tar.extractfile(f"{number:08d}{path.suffix.lower()}").read() == path.read_bytes()
    with pytest.raises(ValueError, match="has .tar files already"):
        tar_shards.main([str(source), str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no such folder"):
        tar_shards.main([str(tmp_path / "gone"), str(tmp_path / "new")])
    with pytest.raises(ValueError, match="--per-shard 0"):
        tar_shards.main([str(source), str(tmp_path / "new"), "--per-shard", "0"])
    with pytest.raises(ValueError, match="give two folders"):
        tar_shards.main([str(source)])


def test_packing_that_is_stopped_leaves_no_half_tar(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "gone.png"]
    paths[0].write_bytes(picture(1))
    with pytest.raises(FileNotFoundError):
        tar_shards.write_shards(tmp_path / "out", paths, ["a", "b"], 2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("stage", ["reading", "packing"])
def test_packing_that_is_interrupted_leaves_no_tar_and_can_be_repeated(tmp_path, monkeypatch, capsys, stage):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(7):
        (source / f"{i}.png").write_bytes(picture(i))
        (source / f"{i}.txt").write_text(f"number {i}")
    words, module = [str(source), str(out), "--per-shard", "2"], tar_shards if stage == "reading" else tar_shards.tarfile
    name = "open_picture" if stage == "reading" else "TarInfo"
    calls, real = [], getattr(module, name)

    def stops(*values):
        calls.append(values)
        if len(calls) == 6:  # of 7; 12 while packing
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(module, name, stops)
    with pytest.raises(SystemExit) as stopped:
        tar_shards.main(words)
    assert stopped.value.code == 130
    assert capsys.readouterr().out.strip() == f"stopped: nothing is packed in {out}"
    assert not out.exists() or not list(out.iterdir())
    monkeypatch.undo()
    out.mkdir(exist_ok=True)
    (out / ".packing").mkdir()
    (out / ".packing/00007.tar").write_bytes(b"half")  # of a process that was killed
    tar_shards.main(words)
    assert [path.name for path in sorted(out.iterdir())] == [f"0000{k}.tar" for k in range(4)]
    assert numbers(*read(tar_shards.TarShards(out, 8), range(7))) == list(range(7))
