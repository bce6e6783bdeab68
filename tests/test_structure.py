"""The shape of the code: what imports what, and how long things are. Files are parsed, not imported."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "runs")))
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CONCEPTS = ("attention", "conditioning", "temporal", "dit", "diffusion", "train", "sample")
SHORT = ("attention", "conditioning", "temporal", "dit", "diffusion")  # whose functions are at most 40 lines

# What each file or folder may import, beside its own folder. Each line uses only names of lines above it.
MAY_IMPORT = {
    "common": "",
    "attention": "common",
    "diffusion": "common",
    "conditioning": "common attention",
    "temporal": "common attention",
    "encoders": "common attention",
    "dit": "common attention conditioning temporal",
    "data": "common encoders",
    "sample": "common attention diffusion conditioning temporal encoders dit data",
    "training": "common encoders data",
    "evaluation": "common attention diffusion conditioning temporal encoders dit data sample",
    "train": "common attention diffusion conditioning temporal encoders dit data sample training evaluation.dry_run",
    "evaluate": "common attention diffusion conditioning temporal encoders dit data sample evaluation",
    "inside": "common attention diffusion conditioning temporal encoders dit data sample",
    "claims": "common attention diffusion conditioning temporal encoders dit data sample training evaluation train evaluate",
}
ALSO = {"training.models": "attention dit temporal sample",  # the one file of training/ that knows the model
        "evaluation.benchmark": "train"}  # whose loop it measures


def name_of(path):
    """data/shapes.py → data.shapes; data/__init__.py → data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in SOURCES}


def imports(tree):
    """The modules of ours that the code of a tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                      for alias in node.names}
    return {name for name in found if name in MODULES}


def lines(path):
    return len(path.read_text().splitlines())


def test_each_name_may_import_only_those_above_it():
    above = set()
    for name, allowed in MAY_IMPORT.items():
        assert {part.partition(".")[0] for part in allowed.split()} <= above, name
        above.add(name)


def test_imports_point_one_way():
    unknown = {module for module in MODULES if module.partition(".")[0] not in MAY_IMPORT}
    assert not unknown, f"not among the files and folders of this project: {unknown}; add them to MAY_IMPORT"
    wrong = []
    for module, tree in MODULES.items():
        top = module.partition(".")[0]
        allowed = {top, *MAY_IMPORT[top].split(), *ALSO.get(module, "").split()}
        wrong += [f"{module} imports {other}" for other in imports(tree) if not {other, other.partition(".")[0]} & allowed]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({module: imports(tree) for module, tree in MODULES.items()}).prepare()


def test_imports_stand_at_the_top():
    inside = []
    for module, tree in MODULES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
        inside += [f"{module}.{node.name} imports {imports(node)}" for node in functions if imports(node)]
    assert not inside, "\n".join(inside)


def test_functions_are_short():
    long = []
    for module, tree in MODULES.items():
        most = 40 if module in SHORT else 60
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS) and (length := node.end_lineno - node.lineno + 1) > most:
                long.append(f"{module}.{node.name}: {length} lines, at most {most}")
    assert not long, "\n".join(long)


def test_lines_are_narrow():
    wide = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 110:
                wide.append(f"{path.relative_to(ROOT)}, line {number}: {len(line)} columns, at most 110")
    assert not wide, "\n".join(wide)


def test_the_concept_files_are_small():
    concepts = {name: lines(ROOT / f"{name}.py") for name in CONCEPTS}
    assert sum(concepts.values()) <= 1500, concepts
    assert concepts["train"] <= 400
