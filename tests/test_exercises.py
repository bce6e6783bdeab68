"""The exercises of docs/questions.md: each test fails on the code as it is, and passes with its solution."""
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBERS = {f"test_{i}" for i in range(1, 11)}


@pytest.fixture
def copy(tmp_path):
    """The code, without what is not needed."""
    unwanted = shutil.ignore_patterns(".*", "runs", "emoji", "docs", "*.tgz", "__pycache__", "slow")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=unwanted)
    return tmp_path / "copy"


def results(folder):
    """{name of an exercise's file: whether all of its tests pass}"""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/exercises"]
    subprocess.run(command, cwd=folder, capture_output=True)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname").rpartition(".")[2]
        found[name] = found.get(name, True) and not len(case)
    return found


def test_exercises_fail_before_and_pass_after(copy):
    assert results(copy) == dict.fromkeys(NUMBERS, False)
    for number in range(1, 11):
        solution = ROOT / f"tests/exercises/solutions/{number}.patch"
        done = subprocess.run(["git", "apply", str(solution)], cwd=copy, capture_output=True, text=True)
        assert not done.returncode, f"{solution.name}: {done.stderr}"
    assert results(copy) == dict.fromkeys(NUMBERS, True)
