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
import os
import signal
import sys
from pathlib import Path

SEEDS = 10**9  # the largest --seed: what is made of it fits every generator
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def flag(default, help, low=None, high=math.inf, choices=(), group=None):
    """A field. low and high: the range, ends included. choices: the values that it may have. group: a title
    in --help, for this flag and those that follow."""
    metadata = dict(help=help, low=low, high=high, choices=choices, group=group)
    return dataclasses.field(default=default, metadata=metadata)


def read(kind, arguments, command, about, words=None):
    """Command line → an object of the dataclass `kind`, the names of the flags that were given, and the list
    of words that are no flags. command: how it is called; about: its description; words: what the words are
    called, such as PROMPT, if it takes any. ValueError, naming the flag, for an unknown one or a value that
    is not possible."""
    fields = kind.__dataclass_fields__
    parser = Parser(prog=command, description=about, allow_abbrev=False)
    if words:
        parser.add_argument("words", metavar=words, nargs="*")
    group = parser
    for name, field in fields.items():
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        text = field.metadata["help"].replace("%", "%%")
        if field.default not in ("", False):
            text += f" (default: {str(field.default).lower()})"
        metavar = "|".join(filter(None, field.metadata["choices"])) or METAVARS[field.type]
        group.add_argument(f"--{dashed(name)}", metavar=metavar, help=text, default=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(prepared(arguments, fields)))
    rest = given.pop("words", [])
    config = kind(**{name: converted(fields[name], text) for name, text in given.items()})
    for name in given:
        check(config, name)
    return config, set(given), rest


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
    known = {f"--{dashed(name)}": field for name, field in fields.items()}
    result = []
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name not in (*known, "--help"):
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(f"unknown flag {name}; did you mean {near}?")
        if name in known and known[name].type is bool and not equals and following not in ("true", "false"):
            word = f"{name}=true"
        result.append(word)
    return result


def converted(field, text):
    """The text of a value → the value, by the field's type. ValueError if it is none."""
    if field.type is str:
        return text
    try:
        if field.type is bool:
            return {"true": True, "false": False}[text]
        value = field.type(text)
        if abs(value) < math.inf:  # neither infinite nor NaN
            return value
    except (KeyError, ValueError):
        pass
    raise ValueError(f"--{dashed(field.name)} {text}: not {KINDS[field.type]}")


def check(config, name):
    """ValueError, naming the flag, if a field's value is outside of its range or none of its choices."""
    value, limits = getattr(config, name), config.__dataclass_fields__[name].metadata
    low, high, choices = limits["low"], limits["high"], limits["choices"]
    if choices and value not in choices:
        raise ValueError(f"--{dashed(name)} {value}: not one of {', '.join(filter(None, choices))}")
    if low is not None and not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"--{dashed(name)} {value}: must be {wanted}")


def run_command(main, stopped="stopped"):
    """Runs main(arguments) as a program. A user's mistake is one line on stderr, and status 1. Ctrl-C or
    SIGTERM: the line `stopped`, and status 130 or 143. A closed pipe (| head) ends it silently."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # in a locale without … or →
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    name, status = Path(sys.argv[0]).name, 0
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt as signalled:
        print(f"{name}: {stopped}", file=sys.stderr)
        number, *_ = *signalled.args, signal.SIGINT
        status = 128 + number
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        status = f"{name}: {error}"
    try:
        print(end="", flush=True)
    except OSError as error:  # Python flushes again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            status = f"{name}: {error}"
    if status:
        sys.exit(status)


def interrupt(number, frame):
    raise KeyboardInterrupt(number)
