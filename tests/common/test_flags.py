"""One reader of flags for every command: kinds, ranges, switches, and errors of one line."""
import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.flags import dashed, flag, read, run_command

ROOT = Path(__file__).parent.parent.parent
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@dataclass
class Flags:
    steps: int = flag(16, "calls of the model", low=1, group="sampling")
    scale: float = flag(2.0, "guidance", low=0, high=10)
    kind: str = flag("sde", "a sampler", choices=("sde", "dpm"))
    grid: bool = flag(False, "one grid")
    long_name: str = flag("", "a text of 100 %", group="output")


def given(*arguments):
    return read(Flags, arguments, "python x.py", "Draws.", words="PROMPT")


def test_values_by_kind_and_words_anywhere():
    flags, named, words = given("a cat", "--steps", "3", "--grid", "a dog", "--scale=0.5", "--long-name", "x y", "-1")
    assert flags == Flags(steps=3, scale=0.5, grid=True, long_name="x y") and words == ["a cat", "a dog", "-1"]
    assert named == {"steps", "grid", "scale", "long_name"}
    assert given("--grid", "false")[0].grid is False and given("--grid", "true", "a")[2] == ["a"]
    assert given() == (Flags(), set(), [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--step", "3"], "unknown flag --step; did you mean --steps?"),
        (["--steps", "many"], "--steps many: not a whole number"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--steps", "1.5"], "--steps 1.5: not a whole number"),
        (["--scale", "nan"], "--scale nan: not a number"),
        (["--scale", "-1"], "--scale -1.0: must be from 0 to 10"),
        (["--scale", "11"], "--scale 11.0: must be from 0 to 10"),
        (["--kind", "euler"], "--kind euler: not one of sde, dpm"),
        (["--grid=maybe"], "--grid maybe: not true or false"),
        (["--steps"], "argument --steps: expected one argument"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(arguments, message):
    with pytest.raises(ValueError) as error:
        given(*arguments)
    assert str(error.value) == message


def test_a_word_where_none_is_taken():
    with pytest.raises(ValueError, match="'extra' is not a flag; flags look like --seed 1"):
        read(Flags, ["extra"], "python x.py", "Draws.")


def test_help_has_groups_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit) as stop:
        given("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: python x.py" in text and "Draws." in text
    for part in ("sampling:", "output:", "--long-name TEXT", "(default: 16)", "sde|dpm", "100 %", "PROMPT"):
        assert part in text


def test_a_command_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["folder/x.py", "--steps", "0"])
    with pytest.raises(SystemExit) as stop:
        run_command(lambda arguments: given(*arguments))
    assert stop.value.code == "x.py: --steps 0: must be at least 1"


def sources_with(text):
    parts = lambda path: path.relative_to(ROOT).with_suffix("").parts
    sources = [path for path in ROOT.rglob("*.py") if parts(path)[0] != "tests" and parts(path)[0][0] != "."]
    return [".".join(parts(path)) for path in sorted(sources) if re.search(text, path.read_text(), re.M)]


UNLIMITED = {  # floats without an upper end, and why
    "lr": "a gradient that is not finite stops the run",
    "weight_decay": "as lr",
    "max_norm": "a large one shortens no gradient",
}


@pytest.mark.parametrize("module", sources_with("^class Flags"))
def test_every_number_has_a_range(module):
    kind = importlib.import_module(module).Flags
    for name, field in kind.__dataclass_fields__.items():
        if field.type not in (int, float):
            continue
        low, high = field.metadata["low"], field.metadata["high"]
        assert low is not None and low <= field.default <= high, f"{module}: --{dashed(name)} has no lower end"
        assert field.type is int or high < 1e4 or name in UNLIMITED, f"{module}: --{dashed(name)} has no upper end"
        for text in ("nan", "-inf", "1e400", "two", str(low - 1)):
            with pytest.raises(ValueError, match=f"--{dashed(name)} .*: (not|must be)"):
                read(kind, [f"--{dashed(name)}={text}"], "", "", "WORD")


SCRIPT = """
import signal, sys, time
from common.flags import run_command
def main(arguments):
    try:
        print("ready \\u2192", flush=True)
        {body}
    finally:
        print("tidied up")
run_command(main, *{more})
"""


def start(body="", more=(), **environment):
    code = SCRIPT.format(body=body, more=more)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("more, message", [((), "-c: stopped\n"), (("stopped. Again!",), "-c: stopped. Again!\n")])
def test_a_signal_ends_a_command_with_one_line(number, status, more, message):
    process = start("time.sleep(60)", more)
    assert process.stdout.readline() == "ready →\n"
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("tidied up\n", message) and process.returncode == status


def test_a_handler_of_the_command_wins():
    """As the training loop's, which ends with a checkpoint."""
    process = start("signal.signal(15, lambda *_: sys.exit(0)); print('set', flush=True); time.sleep(60)")
    assert [process.stdout.readline() for _ in range(2)] == ["ready →\n", "set\n"]
    process.terminate()
    assert process.communicate(timeout=60) == ("tidied up\n", "") and process.returncode == 0


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_a_locale_without_an_arrow_stops_nothing(environment):
    process = start("raise ValueError(chr(0x2026))", **environment)
    assert process.communicate(timeout=60) == ("ready ?\ntidied up\n", "-c: ?\n") and process.returncode == 1


@pytest.mark.parametrize("body", ["time.sleep(0.2)", "time.sleep(0.2); [print('line') for _ in range(99999)]"])
def test_a_closed_pipe_is_no_traceback(body):
    process = start(body)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) in (0, 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line():
    code = SCRIPT.format(body="", more=()).replace(", flush=True", "")
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.stderr.startswith("-c: [Errno 28]") and process.stderr.count("\n") == 1 and process.returncode == 1


def test_streams_of_any_kind_do(monkeypatch):
    """A notebook's cannot be set up anew, and there may be none."""
    said = []
    stream = type("Stream", (), {"write": lambda self, text: said.append(text), "flush": lambda self: None})()
    for out in (stream, None):
        monkeypatch.setattr("sys.stdout", out)
        run_command(lambda arguments: print("done"))
    assert "".join(said) == "done\n"


def test_every_command_is_run_so():
    commands = sources_with('^if __name__ == "__main__":')
    assert len(commands) >= 7
    assert set(commands) - set(sources_with("^    run_command\\(main")) <= {"evaluation.benchmark"}  # a script for a GPU
