"""The state of a run: the weights that train, their average over the steps (EMA), and the optimizers."""
import contextlib
import dataclasses

import torch

from common.flops import Flops
from common.hardware import DTYPES, processor, products_in
from training import checkpoints, distributed
from training.optimizers import make_optimizers


class TrainingState:
    """model: a module on its device, already sharded if it is to be. optimizer, lr, weight_decay: as in
    make_optimizers. precision: of the products."""

    def __init__(self, model, optimizer, lr, weight_decay, precision):
        self.model = model
        self.precision = precision
        self.device = next(model.parameters()).device
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.weights.items()}
        self.optimizers = make_optimizers(model, optimizer, lr, weight_decay, DTYPES[precision])

    def load(self, folder, flags):
        """Fills the state from the run's last checkpoint and returns its step. ValueError as in
        checkpoints.load."""
        return checkpoints.load(folder, flags, self.weights, self.ema, self.optimizers)

    def save(self, folder, step, flags):
        """Writes a checkpoint; the last `flags.keep` of them stay."""
        state = checkpoints.state_of(self.weights, self.ema, self.optimizers)
        made_by = dataclasses.asdict(flags) | dict(processor=processor(self.device))
        checkpoints.save(folder, step, made_by, state, flags.keep)

    def whole_model(self):
        """The model's state_dict with EMA weights, on the CPU, on rank 0; None on the others."""
        state = {}
        for name, tensor in self.model.state_dict().items():
            tensor = distributed.whole(self.ema.get(name, tensor))
            if distributed.rank() == 0:
                state[name] = tensor.cpu()
        return state or None

    @torch.no_grad()
    def copy_ema(self):
        """The model's weights become their EMA."""
        for name, p in self.weights.items():
            p.copy_(self.ema[name])

    @contextlib.contextmanager
    def averaged(self):
        """with state.averaged(): the model has its EMA weights; after it, those of the last step again."""
        raw = {name: p.detach().clone() for name, p in self.weights.items()}
        self.copy_ema()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.weights.items():
                    p.copy_(raw[name])

    def size(self):
        count = sum(p.numel() for p in self.weights.values())
        return f"{count / 1e6:.1f}M trained parameters on {self.device}"

    def flops(self, read, batch_loss, step, averaging):
        """FLOPs of a forward and a backward pass, in a pass of its own, uncompiled: a block that first runs
        under the counter would stay uncompiled. With --checkpointing, what is computed twice counts twice."""
        with torch.compiler.set_stance("force_eager"), Flops() as counter:
            with products_in(self.precision, self.device):
                losses, _ = batch_loss(read(step), step)
            losses.float().mean().backward()
        averaging.wait()
        self.model.zero_grad(set_to_none=True)
        return counter.total

    def export(self, save, log):
        """Writes the run's model and curves. Every rank takes part, since each may hold a share of the
        weights."""
        whole = self.whole_model()
        if distributed.rank() == 0:
            save(whole)
            log.draw()

    def show(self, preview, samples, step):
        """Two previews: of the EMA weights, and of the raw ones. Few and small batches need not wait for a
        compiler."""
        with torch.compiler.set_stance("force_eager"):
            with self.averaged():
                averaged = preview()
            raw = preview()
        if distributed.rank() == 0:
            averaged.save(samples / f"{step:06d}.png")
            raw.save(samples / f"{step:06d}-raw.png")
