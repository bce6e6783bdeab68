"""One reader of flags for every command: kinds, ranges, switches, and errors of one line."""
from dataclasses import dataclass

import pytest

from common.flags import flag, read, run_command


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
