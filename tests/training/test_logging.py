"""What a run writes down: metrics of all ranks, memory, event files."""
import json
import os
import signal
import sys

import pytest
import torch

from training import distributed, logging


@pytest.mark.parametrize("platform, peak", [("linux", 3 * 2**20), ("darwin", 3 * 2**30)])
def test_memory_is_in_gib_whatever_the_system_counts_in(monkeypatch, platform, peak):
    """Linux counts KiB, macOS bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(logging.resource, "getrusage", lambda _: type("", (), dict(ru_maxrss=peak)))
    assert logging.memory_of(torch.device("cpu")) == 3


def test_the_loss_by_noise_level_is_a_mean_over_all_ranks(monkeypatch):
    losses, levels = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.1, 0.3, 1.0])
    assert logging.by_bin(losses, levels) == [1.5, 4.0, None, 8.0]
    other = torch.tensor([[5.5, 0.0, 7.0, 0.0], [1, 0, 2, 0]])  # sums and counts of another rank
    monkeypatch.setattr(distributed, "total", lambda numbers: (torch.tensor(numbers) + other).tolist())
    assert logging.by_bin(losses, levels) == [8.5 / 3, 4.0, 3.5, 8.0]


@pytest.mark.parametrize("good", [0, 2])
def test_event_files_that_cannot_be_written_do_not_stop_a_run(tmp_path, monkeypatch, good):
    """TensorBoard is broken (good: 0), or the disk fills up."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(purge_step)
            if not good:
                raise TypeError("made for another protobuf")

        def add_scalar(self, *what):
            calls.append(what)
            if len(calls) > good:
                raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "tensorboard", type(sys)("tensorboard"))
    monkeypatch.setattr(sys.modules["tensorboard"], "__spec__", "found")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("", (), dict(SummaryWriter=Writer)))
    log = logging.Log(tmp_path, 0)
    for step in (1, 2):
        log(step=step, loss=0.5, lr=1.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]
    assert calls[:2] == [0, ("step", 1, 1)][: max(1, good)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_breaks_the_step_ends_the_run_in_one_line(number):
    """Ctrl-C reaches a compiler too, or what reads the data: the step fails, after the signal."""
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match="stopped within a step .RuntimeError.: --resume goes on"):
        with logging.StopSignals():
            os.kill(os.getpid(), number)
            raise RuntimeError("the compiler was killed")
    assert signal.getsignal(number) is before
    with pytest.raises(RuntimeError), logging.StopSignals():  # of an error alone nothing is said
        raise RuntimeError
