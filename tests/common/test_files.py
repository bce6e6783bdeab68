"""Files appear whole or not at all, and a model of another format is refused by name."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import FORMAT, check_format, newest_run, print_left_out, remove_parts, written_whole
from encoders import autoencoders, weights
from sample import Pipeline


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyError), written_whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with written_whole(path) as part:
        part.write_text("after")
        assert path.read_text() == "before" and part.suffix == ".txt"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


WRITES = """
import sys, time
from pathlib import Path
from common.files import written_whole
with written_whole(Path(sys.argv[1]), parts=sys.argv[2]) as part:
    part.write_text("half")
    print(part, flush=True)
    time.sleep(60)
"""


def test_the_next_start_removes_what_dead_processes_left(tmp_path):
    """And not the files of living ones, nor what others call alike."""
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", WRITES, folder / ("x" * 251 + ".txt"), tmp_path]
    options = dict(stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    try:
        dead, living = (Path(process.stdout.readline().strip()) for process in processes)
        assert dead.parent == living.parent == tmp_path and dead != living and not any(folder.iterdir())
        processes[0].kill()
        processes[0].wait()
        others = [tmp_path / ".part-1.txt", tmp_path / "part-x", tmp_path / ".part-report.md"]
        for other in others:
            other.touch()
        remove_parts(tmp_path)
        assert set(tmp_path.iterdir()) == {folder, living, *others}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    remove_parts(tmp_path)
    remove_parts(tmp_path / "nowhere")
    assert set(tmp_path.iterdir()) == {folder, *others}


def test_a_trial_writes_nothing(tmp_path):
    path = tmp_path / "a.txt"
    for before in (set(), {path}):
        with written_whole(path, keep=False) as part:
            part.write_text("white")
        assert set(tmp_path.iterdir()) == before
        path.touch()
    assert path.read_text() == ""


@pytest.mark.parametrize("number", ["", "x", "-1", 1.5, [1]])
def test_a_format_that_is_no_number_is_refused(number):
    with pytest.raises(ValueError, match=f"^a.safetensors has format .*; this code reads up to {FORMAT}"):
        check_format("a.safetensors", number)


@pytest.mark.parametrize("load", [Pipeline.load, autoencoders.load])
def test_models_of_another_format_are_refused(pictures, tmp_path, load):
    tensors, metadata = weights.read(pictures / "ae" / "model.safetensors")
    assert metadata["format"] == str(FORMAT)
    weights.write(tmp_path / "model.safetensors", tensors, metadata | dict(format=str(FORMAT + 1)))
    with pytest.raises(ValueError, match=f"model.safetensors has format {FORMAT + 1}; this code reads up to {FORMAT}"):
        load(tmp_path)
    weights.write(tmp_path / "model.safetensors", tensors, dict(config=metadata["config"]))
    with pytest.raises(ValueError, match="was made by an earlier version of this code: train it again"):
        load(tmp_path)


def test_the_newest_run_is_the_one_written_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run found in runs/: train one with `python train.py image`"):
        newest_run()
    for age, name in enumerate(("image-b", "image-a", "video-c")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.safetensors").touch()
        os.utime(tmp_path / "runs" / name / "model.safetensors", (age, age))
    assert newest_run().name == "image-a" and newest_run("video").name == "video-c"


def test_what_was_left_out_is_said_in_few_lines(capsys):
    print_left_out([], 3)
    assert capsys.readouterr().out == ""
    print_left_out([(f"{i}.png", "broken") for i in range(5)], used=3, most=2)
    assert capsys.readouterr().out.splitlines() == ["5 of 8 files were left out:", "  0.png: broken", "  1.png: broken", "  … and 3 more"]
