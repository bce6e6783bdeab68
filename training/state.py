"""The state of a run: the weights that train, their average over the steps (EMA), and the optimizers."""
import contextlib

import torch

from training import checkpoints, distributed
from training.optimizers import make_optimizers


class TrainingState:
    """model: a module on its device, already sharded if it is to be. optimizer, lr, weight_decay, dtype: as
    in make_optimizers."""

    def __init__(self, model, optimizer, lr, weight_decay, dtype):
        self.model = model
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.weights.items()}
        self.optimizers = make_optimizers(model, optimizer, lr, weight_decay, dtype)

    def load(self, folder, flags):
        """Fills the state from the run's last checkpoint and returns its step. ValueError as in
        checkpoints.load."""
        return checkpoints.load(folder, flags, self.weights, self.ema, self.optimizers)

    def save(self, folder, step, made_by, keep):
        state = checkpoints.state_of(self.weights, self.ema, self.optimizers)
        checkpoints.save(folder, step, made_by, state, keep)

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
