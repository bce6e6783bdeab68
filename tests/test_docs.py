"""README.md and docs/*.md say what the code does: links, quoted lines, commands and line counts."""
import importlib
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import train
from common import flags
from training import recipes

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def prose(page):
    """The text of a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def commands(page):
    """Lists of words: each line of the sh blocks, and inline `python …`, `make …` and `torchrun …`."""
    blocks = [body for language, body in FENCE.findall(page.read_text()) if language == "sh"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = [" ".join(code.split()) for code in INLINE.findall(prose(page))]
    lines += [code for code in inline if code.startswith(("python ", "make ", "torchrun "))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def flags_of(script):
    """The Flags of a script of ours, or None if it takes none."""
    if script == "train.py":
        return recipes.Flags
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return getattr(module, "Flags", None)


def check_script(script, words):
    """Raises unless words are arguments of a script of ours. Words in capitals stand for values."""
    assert (ROOT / script).is_file(), f"there is no {script}"
    if script == "train.py":
        assert words and words[0] in train.TRAIN, f"train.py has no stage {words[:1]}"
        words = words[1:]
    kind = None if script.startswith("tests/") else flags_of(script)
    if kind is None:
        assert not words, f"{script} takes no arguments"
    elif any(re.fullmatch(r"\$?[A-Z]+", word) for word in words):
        flags.prepared(words, kind.__dataclass_fields__)
    else:
        others = None if script in ("train.py", "evaluate.py", "data/latent_cache.py") else "WORD"
        flags.read(kind, words, script, "", others)


def check_command(words):
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M)
        rest = [word for word in rest if "=" not in word]  # its variables
        assert rest and set(rest) <= set(targets), f"the Makefile has no target {rest}"
    elif program == "torchrun":
        parsed = get_args_parser().parse_args(rest)
        check_script(parsed.training_script, parsed.training_script_args)
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        paths = [word for word in rest[2:] if not word.startswith("-")]
        assert paths and all((ROOT / path).exists() for path in paths), f"no such tests: {paths}"
    elif program == "python" and rest[:1] == ["-m"]:
        check_script(rest[1].replace(".", "/") + ".py", rest[2:])
    elif program == "python":
        check_script(rest[0], rest[1:])
    else:
        known = (["source", ".venv/bin/activate"], ["apt-get", "install"], ["npm", "pack"])
        assert words in known or words[:2] in known, "not a command that this test knows"


def all_flags():
    scripts = ["train.py", "sample.py", "evaluate.py", "inside.py", "claims.py", "data/emoji.py", "data/tar_shards.py",
               "data/latent_cache.py", "evaluation/published_dit.py", "evaluation/preference.py"]
    torchrun = {option for action in get_args_parser()._actions for option in action.option_strings}
    return torchrun | {f"--{flags.dashed(name)}" for script in scripts for name in flags_of(script).__dataclass_fields__}


@pages
def test_links_exist(page):
    for target in LINK.findall(prose(page)):
        assert re.match("https?:", target) or (page.parent / target.partition("#")[0]).exists(), target


@pages
def test_quoted_lines_stand_in_their_file_in_this_order(page):
    text = page.read_text()
    for block in FENCE.finditer(text):
        if block[1] == "python":
            before = [target for target in LINK.findall(text[: block.start()]) if target.endswith(".py")]
            lines = iter([line.strip() for line in (page.parent / before[-1]).read_text().splitlines()])
            for line in block[2].splitlines():
                assert line.strip() in lines, f"{before[-1]} has no such line, or earlier: {line}"


@pages
def test_commands_parse(page):
    for words in commands(page):
        try:
            check_command(words)
        except (AssertionError, ValueError, SystemExit) as error:
            pytest.fail(f"{' '.join(words)}: {error}")


@pages
def test_flags_in_the_text_exist(page):
    for code in INLINE.findall(prose(page)):
        if code.startswith("--"):
            assert set(re.findall(r"(?<!\S)--[\w-]+", code)) <= all_flags(), code


def test_the_readme_tells_each_files_length():
    rows = re.findall(r"^\| \[`([\w/]+\.py)`\]\([^)]+\) \| (\d+) \|", README.read_text(), re.M)
    concepts = {"attention.py", "conditioning.py", "temporal.py", "dit.py", "diffusion.py", "train.py", "sample.py"}
    assert concepts <= {name for name, _ in rows}
    for name, told in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(int(told) - lines) <= lines / 10, f"{name} has {lines} lines, the README says {told}"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 240


@pages
def test_lines_are_narrow(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert line.startswith("|") or len(line) <= 110, f"{page.name}, line {number}: {len(line)} columns"
