"""The experiments of claims.py: what is run, kept and compared."""
import json

import pytest
import torch

import claims
import train
from claims import Claim
from data import folder
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


def test_every_claim_asks_for_its_runs_and_goes_on(here, monkeypatch):
    """Training and scoring are stubbed; a claim that is killed half-way asks for the rest alone."""
    asked, most = [], [5]

    def trained(claim, stage, out, seed, flags, kind=claims.Pipeline):
        asked.append((claim.name, out, flags))
        if len(asked) > most[0]:
            raise KeyboardInterrupt
        return claims.Pipeline

    scores = dict.fromkeys(("seen", "unseen", "motion", "identity", "frames", "diversity", "right", "loss", *claims.COLUMNS), 0.5)
    scores |= {f"step {step}": 0.5 for step in claims.STARTS}
    monkeypatch.setattr(Claim, "train", trained)
    monkeypatch.setattr(Claim, "autoencoder", lambda claim: None)
    monkeypatch.setattr(Claim, "samples", lambda *parts: None)
    monkeypatch.setattr(claims, "pretrained", lambda claim, name, seed: f"{name}-{seed}")
    stub = lambda claim, out, seed, flags: trained(claim, 0, out, seed, flags) and scores
    monkeypatch.setattr(claims, "frames_while_training", stub)
    for score in ("of_image", "of_clips", "of_guidance", "of_classes"):
        monkeypatch.setattr(claims, score, lambda *parts, **more: scores)
    for name in claims.CLAIMS:
        asked.clear()
        most[0] = 5
        with pytest.raises(KeyboardInterrupt):
            claims.main([name, "--out", "out"])
        most[0] = 1000
        before = asked[:5]
        claims.main([name, "--out", "out"])
        lines = [json.loads(line) for line in (here / "out" / f"{name}.jsonl").read_text().splitlines()]
        runs = {(line["row"], line["seed"]) for line in lines}
        assert len(runs) == len(lines) == len(asked) - 1 and {seed for _, seed in runs} == {0, 1, 2}
        assert before == asked[:5] and (here / "out" / f"{name}.md").read_text().count("0.50 ± 0.00") >= len(runs) / 3


def test_labels_share_the_autoencoder_of_all_shapes_and_differ_by_seed(here, monkeypatch):
    made = []
    monkeypatch.setattr(Claim, "autoencoder", lambda claim: made.append(type(folder.load("shapes", 32))))
    monkeypatch.setattr(Claim, "train", lambda *parts: made.append(type(folder.load("shapes", 32, 0))))
    monkeypatch.setattr(claims, "of_classes", lambda model, count: dict(right=1.0))
    claims.main(["labels", "--out", "out", "--seeds", "1"])
    assert made[0] is Shapes and made[1:] == [claims.OneThing] * 3
    seeds = []
    generator = lambda model, seed: seeds.append(seed) or (lambda names: torch.zeros(len(names), 3, 64, 64, dtype=torch.uint8))
    monkeypatch.undo()
    monkeypatch.setattr(claims, "generator", generator)
    claims.of_classes(None, 3)
    assert seeds == [0, 1, 2]


def test_a_deleted_line_is_trained_again(here):
    claim, calls = Claim("joint", here / "out", 1, False), []
    out = claim.folder_of("a", 0)
    out.mkdir(parents=True)
    (out / "run.json").write_text('{"finished": 5}')
    claim.run("a", 0, lambda: calls.append(out.exists()) or dict(motion=1.0), "--steps 5")
    assert calls == [False]
    with pytest.raises(ValueError, match="a, seed 0 had other flags; delete its line"):
        claim.run("a", 0, lambda: {}, "--steps 6")


def test_a_damaged_line_is_named(here):
    for text in ('{"row": "a"', '{"row": "a", "seed": 0}'):
        (here / "joint.jsonl").write_text(text + "\n")
        with pytest.raises(ValueError, match="joint.jsonl has a line that is not of this command"):
            Claim("joint", here, 3, False).lines()


def test_means_and_verdicts_by_hand(here):
    claim = Claim("joint", here, 3, False)
    values = {"a": (0.5, 0.7, 0.6), "b": (0.1, 0.2, 0.3), "c": (0.5, 0.6, 0.55), "d": ()}
    for row, scores in values.items():
        for seed, score in enumerate(scores):
            claim.run(row, seed, lambda: dict(motion=score))
    claim.run("a", 0, lambda: pytest.fail("run again"))
    assert claim.table(["a", "d"], ["motion"]).splitlines()[2:] == ["| a | 0.60 ± 0.10 |", "| d | – |"]
    assert claim.higher("motion", "a", "b").endswith("0.20 ± 0.10: higher, intervals apart.")
    assert claim.higher("motion", "a", "c").endswith("higher, but the intervals overlap.")
    assert claim.higher("motion", "b", "a").endswith("not higher.") and claim.higher("motion", "a", "d") == "motion: a against d: not run yet."
    claim.run("e", 1, lambda: dict(motion=0.4))
    assert claim.table(["e"], ["motion"]).splitlines()[2] == "| e (1 of 3 seeds) | 0.40 |"


def test_mistakes(here):
    for words, message in (([], "name a claim; there are conditioning"), (["conditionin"], "conditionin: no claim; there are"),
                           (["all", "--seeds", "0"], "--seeds 0"), (["all", "--quick", "--out", "x"], "--out: runs of --quick")):
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


def test_rectified_flow_is_that_of_its_paper():
    """The weighted loss of x0 and ε as seen by the network = the mean squared error of ε - x0 on the path
    x = (1-u) x0 + u ε."""
    flow = claims.weighted_loss(lambda alpha, sigma: (alpha + sigma) ** 2)
    with claims.changed(claims.Diffusion, __init__=claims.straight_path, loss=flow):
        diffusion = claims.Diffusion(shift=3.0)
        x0, noise, guess = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
        t = torch.tensor([0, 100, 500, 900, 999])
        seen = []
        found = diffusion.loss(lambda x, t: seen.append(x) or guess, x0, t, noise)
    u = ((t + 1) / 1001).view(-1, 1, 1, 1)
    x, r = (1 - u) * x0 + u * noise, ((1 - u) ** 2 + u**2).sqrt()
    torch.testing.assert_close(seen[0] * r, x, rtol=1e-6, atol=1e-6)
    guessed_x0, _ = diffusion.x0_and_noise(seen[0], guess, t)
    flow_of = (x - guessed_x0) / u  # ε - x0, by the network's x0
    torch.testing.assert_close(found, (flow_of - (noise - x0)).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_min_snr_weights_by_hand():
    alpha = torch.tensor([0.5, 0.1, 0.999]) ** 0.5
    weights = claims.min_snr(alpha, (1 - alpha**2).sqrt())
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.1, 5 / 1000]))


def test_frames_are_judged_before_the_training_and_on_averaged_weights(here, monkeypatch):
    """A stub trains: its previews come in pairs, of the averaged weights (1) and of the last ones (2)."""

    class Model(list):
        eval = train = lambda model: model

    model = Model([0.0])

    def fit(flags, model, outline, hashes, read, batch_loss, preview, save):
        for average in (0.1, 0.2, 0.3, 0.4):
            for model[0] in (average, 9.0):
                assert preview() is not None

    blank = lambda model: lambda texts: torch.zeros(len(texts), 2, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(claims, "generator", blank)
    monkeypatch.setattr(claims, "judge", lambda *parts: model[0])
    monkeypatch.setattr(Claim, "image_model", lambda claim: None)
    trained = []

    def train_video(claim, stage, out, seed, flags):
        trained.append(flags)
        train.fit(None, model, *[None] * 6)

    monkeypatch.setattr(Claim, "train", train_video)
    claim = Claim("zero_start", here, 1, True)
    scores = claims.frames_while_training(claim, here / "run", 0, "--only-temporal")
    assert scores == pytest.approx({"step 0": 0.0, "step 25": 0.1, "step 50": 0.2, "step 75": 0.3, "step 100": 0.4})
    assert trained[0].startswith("--only-temporal --steps 100") and train.fit is fit


def test_equal_flops_are_equal(here, monkeypatch):
    """6×192 has at least the FLOPs of its blocks' matrices, by hand; "equal" is so up to ten steps."""
    work, D, N, L = claims.step_work("mini"), 192, 16, 12
    matrices = 4 * D * D + 2 * D * D + 8 * D * D  # of an image token: self- and cross-attention, MLP
    by_hand = 6 * 128 * 6 * (N * matrices + L * 128 * 2 * D)
    assert by_hand < 1e12 * work < 1.15 * by_hand  # the rest: scores, modulation, patches, time
    total = {}

    def images(claim, rows):
        for row, (_, size, *_, steps) in ((row, flags.split()) for row, flags in rows.items()):
            total[row] = claims.step_work(size) * int(steps)

    monkeypatch.setattr(Claim, "images", images)
    claims.scale(Claim("scale", here, 1, False))
    assert len(total) == 10
    for row in ("3×96", "6×192", "8×256"):
        assert total[f"{row}, equal FLOPs"] == pytest.approx(total["4×128"], rel=0.15)
