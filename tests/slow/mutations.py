"""Breaks the five concept files by one small random change at a time, and asks their tests whether they notice.

    python tests/slow/mutations.py [COUNT=60] [SEED=0]          about a quarter of an hour on one core

Each change is made in a copy of the project. runs/mutations.jsonl has a line for each; a change with a line is not tried
again, so that a drill that was stopped goes on where it was. After work on the tests, delete that file.
"""
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "runs" / "mutations.jsonl"
FILES = ["attention.py", "conditioning.py", "temporal.py", "dit.py", "diffusion.py"]
TESTS = [f"tests/test_{name}.py" for name in ("attention", "model", "temporal", "diffusion")], ["tests/test_schedulers.py"]

# What need not be noticed: (file, the line with the change, without its comment): why.
KNOWN = {
    ("conditioning.py", "return text[torch.arange(len(text)), last]"): "an index may lie on the CPU",
    ("temporal.py", "other = [name for name in missing if \"temporal.\" not in name] + unexpected"): "it is a list",
    ("dit.py", "row, column = torch.meshgrid(row, column)"): "ij is torch's own choice too, with a warning",
    ("dit.py", "angle = position.unsqueeze(-1) * frequency"): "positions are integers or float32",
    ("dit.py", "module.weight"): "torch's own LayerNorm starts so too",
    ("diffusion.py", "u = torch.linspace(1, 0, count)"): "rounds other halves",
    ("diffusion.py", "for t, s in zip(times, times[1:] + [-2]):"): "any negative s ends a sampler; DDPM's notices",
    ("diffusion.py", "for key in conditions[1]:"): "all conditions have the same keys",
    ("diffusion.py", "if torch.is_tensor(values[1]):"): "and values of the same kind",
}

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {ast.Eq: ast.NotEq, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Is: ast.IsNot, ast.In: ast.NotIn}
COMPARISONS |= {after: before for before, after in COMPARISONS.items()}


def changed(node, imported):
    """What a node of the syntax tree may be changed into."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            yield ast.Compare(node.left, [*node.ops[:i], COMPARISONS[type(operator)](), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Call):
        arguments = [part for argument in [*node.args, *node.keywords] for part in ast.walk(argument)]
        method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in imported
        if method and not any(isinstance(part, ast.Name) for part in arguments):
            yield node.func.value  # x.f() → x, and x.f(dim=1) → x
        elif len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
            yield node.args[0]  # f(x) → x
        for keyword in node.keywords:
            yield ast.Call(node.func, node.args, [other for other in node.keywords if other is not keyword])


def changes(file):
    """All single changes of a file, except in error messages: what is told of each, and the file's new text."""
    source = (ROOT / file).read_bytes()  # the columns of a syntax tree count bytes
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.asname or alias.name for alias in nodes if isinstance(alias, ast.alias)}
    messages = {part for node in nodes if isinstance(node, (ast.JoinedStr, ast.Raise)) for part in ast.walk(node)}
    for node in [node for node in nodes if isinstance(node, ast.expr) and node not in messages]:
        first, last = starts[node.lineno - 1], starts[node.end_lineno]
        start, end = first + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        for other in changed(node, imported):
            code = ast.unparse(other)
            if isinstance(node, ast.Call) and not isinstance(other, (ast.Call, ast.Name, ast.Attribute)):
                code = f"({code})"
            new = source[first:start] + code.encode() + source[end:last]
            lines = [part.decode().splitlines() for part in (source[first:last], new)]
            before, after = (" ".join(line.split("  #")[0].strip() for line in part) for part in lines)
            yield dict(file=file, line=node.lineno, before=before, after=after), source[:first] + new + source[last:]


def tests_pass(texts):
    """Whether the tests pass on a copy of the project, in which some files, by name, have other texts."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "emoji", "__pycache__"), dirs_exist_ok=True)
        for name, text in texts.items():
            Path(copy, name).write_bytes(text)
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        for paths in TESTS:
            result = subprocess.run([*command, *paths], cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
            assert result.returncode in (0, 1, 2, 4), result.stdout.decode()  # 2 and 4: what the tests import fails
            if result.returncode:
                return False
    return True


def main(count=60, seed=0):
    drawn = [(change, text) for file in FILES for change, text in changes(file)]
    random.Random(seed).shuffle(drawn)
    drawn = drawn[:count]
    RECORD.parent.mkdir(exist_ok=True)
    records = [json.loads(line) for line in RECORD.open()] if RECORD.exists() else []
    assert tests_pass({}), "the tests fail on the code as it is"
    missed = []
    for change, text in drawn:
        noticed = [record["noticed"] for record in records if change.items() <= record.items()]
        if not noticed:
            noticed = [not tests_pass({change["file"]: text})]
            with RECORD.open("a") as file:
                print(json.dumps(change | {"noticed": noticed[0]}), file=file)
        outcome = "noticed" if noticed[0] else f"NOT NOTICED ({KNOWN.get((change['file'], change['after']), 'test it')})"
        line = f"{outcome}: {change['file']}, line {change['line']}: {change['before']} → {change['after']}"
        print(line, flush=True)
        missed += [] if noticed[0] else [line]
    print(f"{len(drawn) - len(missed)} of {len(drawn)} changes were noticed", *missed, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
