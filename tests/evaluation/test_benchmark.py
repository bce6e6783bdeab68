"""The benchmark runs, on the smallest size; its figures are looked at where it is run for them."""
import json

import pytest
import torch

from evaluation import benchmark


def test_every_row_is_measured(capsys):
    bench = benchmark.Bench(torch.device("cpu"), 1)
    benchmark.against_a_product(bench, "mini", 1, 256)
    benchmark.against_peers(bench, "mini", 1)
    benchmark.attention_rows(bench, "mini", 1)
    benchmark.clips_and_guidance(bench, "mini", 1)
    benchmark.autoencoder_row(bench)
    benchmark.loop_row(bench, "mini", 2, 4)
    printed = capsys.readouterr().out
    assert len(bench.rows) == 11 and all(0 < row["low"] <= row["median"] <= row["high"] for row in bench.rows)
    assert all(f"{row['what']}: " in printed for row in bench.rows) and "PixArt" in printed


def test_a_ratio_is_of_seconds(monkeypatch):
    bench = benchmark.Bench(torch.device("cpu"), 5)
    clock = iter([0, 3, 0, 2] * 7)
    monkeypatch.setattr(benchmark, "time", type("", (), dict(perf_counter=lambda: next(clock))))
    bench.compare("row", lambda: None, lambda: None, scale=10)
    assert bench.rows[0]["median"] == bench.rows[0]["low"] == pytest.approx(15)


def test_the_command_writes_its_rows(monkeypatch, tmp_path):
    for name in ("against_a_product", "against_peers", "attention_rows", "clips_and_guidance", "loop_row"):
        monkeypatch.setattr(benchmark, name, lambda *_: None)
    benchmark.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["repeats"] == 3 and [row["what"] for row in found["rows"]] == ["mini autoencoder, pictures of 64² a second"]
