"""The experiments of claims.py: what is run, kept and compared."""
import json

import pytest

import claims
import train
from claims import Claim
from data.moving_shapes import MovingShapes
from data.shapes import Shapes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in (Shapes, MovingShapes):  # few scenes
        few = [64 if default and default > 1000 else default for default in kind.__init__.__defaults__]
        monkeypatch.setattr(kind.__init__, "__defaults__", tuple(few))
    return tmp_path


def test_a_quick_claim_runs_whole_and_not_twice(here, monkeypatch, capsys):
    claims.main(["conditioning", "--quick"])
    folder = here / "runs/claims/quick"
    lines = [json.loads(line) for line in (folder / "conditioning.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [("cross-attention", 0), ("adaLN alone", 0)]
    assert all(0 <= line["scores"]["seen"] <= 1 and line["seconds"] >= 0 and line["machine"] for line in lines)
    page = (folder / "conditioning.md").read_text()
    assert "47.8 against 34.3" in page and "| cross-attention | " in page and "![conditioning](conditioning.png)" in page
    assert (folder / "conditioning.png").stat().st_size > 10_000
    monkeypatch.setattr(train, "main", lambda words: pytest.fail("trained again"))
    claims.main(["conditioning", "--quick"])
    (folder / "conditioning.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        claims.main(["conditioning", "--quick"])


def test_means_and_verdicts_by_hand(here):
    claim = Claim("joint", here, 3, False)
    values = {"a": (0.5, 0.7, 0.6), "b": (0.1, 0.2, 0.3), "c": (0.5, 0.6, 0.55), "d": ()}
    for row, scores in values.items():
        for seed, score in enumerate(scores):
            claim.run(row, seed, lambda: dict(motion=score))
    claim.run("a", 0, lambda: pytest.fail("run again"))
    assert claim.table(["a", "d"], ["motion"]).splitlines()[2:] == ["| a | 0.60 ± 0.08 |", "| d | – |"]
    assert claim.higher("motion", "a", "b").endswith("0.20 ± 0.08: higher, intervals apart.")
    assert claim.higher("motion", "a", "c").endswith("higher, but the intervals overlap.")
    assert claim.higher("motion", "b", "a").endswith("not higher.") and claim.higher("motion", "a", "d") == "Not run yet."


def test_mistakes(here):
    for words, message in (([], "name a claim; there are conditioning"), (["conditionin"], "conditionin: no claim; there are"),
                           (["all", "--seeds", "0"], "--seeds 0")):
        with pytest.raises(ValueError, match=message):
            claims.main(words)
    assert not list(here.iterdir())


def test_random_starts_are_where_zeros_were():
    from dit import GenTron, ModelConfig

    model = lambda: type("", (), dict(transformer=GenTron(ModelConfig(temporal=True))))()
    zero, random = model(), claims.at_random(model)()
    for name, p in zero.transformer.named_parameters():
        if "temporal" in name and (name.endswith("attention.out.weight") or name.endswith("mlp.2.weight")):
            assert not p.any() and random.transformer.get_parameter(name).std() > 0.01
