"""Flags: one reader for every command.

A command's flags are the fields of a dataclass, each made by `flag`, which holds its default, its help and
its range:

    @dataclass
    class Flags:
        steps: int = flag(16, "steps of the sampler", low=1, group="sampling")

`read` turns a command line into such an object (batch_size is --batch-size), and writes --help from it. A
mistake is a ValueError of one line, which `run_command` prints.
"""
import argparse
import dataclasses
import difflib
import math
import sys
from pathlib import Path

KINDS = {int: "a whole number", float: "a number"}
SEEDS = 10**9  # the largest --seed: what is made of it fits every generator
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


def flag(default, help, low=None, high=None, choices=None, group=None):
    """A field. low and high: the range, ends included. choices: the values that it may have. group: a title
    in --help, for this flag and those that follow."""
    metadata = dict(help=help, low=low, high=high, choices=choices, group=group)
    return dataclasses.field(default=default, metadata=metadata)


def read(kind, arguments, command, about, words=None):
    """Command line → an object of the dataclass `kind`, the names of the flags that were given, and the list
    of words that are no flags. command: how it is called; about: its description; words: what the words are
    called, such as PROMPT, if it takes any. ValueError, naming the flag, for an unknown one or a value that
    is not possible."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    shown = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=command, description=about, allow_abbrev=False, formatter_class=shown)
    if words:
        parser.add_argument("words", metavar=words, nargs="*")
    group = parser
    for name, field in fields.items():
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        metavar = METAVARS[field.type]
        if field.metadata["choices"]:
            metavar = "|".join(field.metadata["choices"])
        text = field.metadata["help"].replace("%", "%%")
        if field.default not in ("", False):
            text += f" (default: {str(field.default).lower()})"
        group.add_argument(f"--{dashed(name)}", metavar=metavar, help=text, default=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(prepared(arguments, fields)))
    rest = given.pop("words", [])
    values = {name: converted(fields[name], text) for name, text in given.items()}
    config = kind(**values)
    for name in values:
        check(config, name)
    return config, set(values), rest


class Parser(argparse.ArgumentParser):
    def error(self, message):
        words = message.removeprefix("unrecognized arguments: ")
        if words != message:
            message = f"{words.split()[0]!r} is not a flag; flags look like --seed 1"
        raise ValueError(message)


def dashed(name):
    return name.replace("_", "-")


def prepared(arguments, fields):
    """The arguments, with --flag as --flag=true where a switch has no value after it. ValueError for an
    unknown flag."""
    result = []
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, _ = word.removeprefix("--").partition("=")
        field = fields.get(name.replace("-", "_"))
        if word.startswith("--") and name != "help" and field is None:
            near = difflib.get_close_matches(name, map(dashed, fields), 1, 0)[0]
            raise ValueError(f"unknown flag --{name}; did you mean --{near}?")
        alone = word.startswith("--") and field and field.type is bool and not equals
        result.append(f"{word}=true" if alone and following not in ("true", "false") else word)
    return result


def converted(field, text):
    """The text of a value → the value, by the field's type. ValueError if it is none."""
    if field.type is str:
        return text
    if field.type is bool:
        if text not in ("true", "false"):
            raise ValueError(f"--{dashed(field.name)} {text}: not true or false")
        return text == "true"
    try:
        value = field.type(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"--{dashed(field.name)} {text}: not {KINDS[field.type]}")
    return value


def check(config, name):
    """ValueError, naming the flag, if a field's value is outside of its range or none of its choices."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    value, low, high = getattr(config, name), field.metadata["low"], field.metadata["high"]
    problem = ""
    if field.metadata["choices"] and value not in field.metadata["choices"]:
        problem = f"not one of {', '.join(field.metadata['choices'])}"
    elif low is not None and value < low and high is None:
        problem = f"must be at least {low}"
    elif low is not None and not low <= value <= (math.inf if high is None else high):
        problem = f"must be from {low} to {high}"
    if problem:
        raise ValueError(f"--{dashed(name)} {value}: {problem}")


def run_command(main):
    """Runs main(arguments) as a program. A user's mistake is one line on stderr, and status 1."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
