"""The state of a run: the weights that train, their average over the steps (EMA), and the optimizers."""
import torch

from common.hardware import DTYPES, processor
from training import checkpoints, distributed
from training.optimizers import clip_and_step, make_optimizers


class TrainingState:
    """model: a module on its device, already sharded if it is to be. flags: train.py's. hashes: {name: text}
    of what the run takes from elsewhere, as in models.hashes_of."""

    def __init__(self, model, flags, hashes):
        self.model, self.flags, self.hashes = model, flags, hashes
        self.device = next(model.parameters()).device
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.weights.items()}
        recipe = flags.optimizer, flags.lr, flags.beta2, flags.weight_decay
        self.optimizers = make_optimizers(model, *recipe, DTYPES[flags.precision])

    def tensors(self):
        """All that a checkpoint holds, by name: "model.NAME", "ema.NAME", "optimizer.K.NAME.KEY"."""
        tensors = {f"model.{name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"ema.{name}": average for name, average in self.ema.items()}
        names = {p: name for name, p in self.weights.items()}
        for k, optimizer in enumerate(self.optimizers):
            for seen, values in optimizer.state.items():
                p = getattr(optimizer, "shares", {}).get(seen, seen)
                values = {key: distributed.sharded(value, p) for key, value in values.items()}
                tensors |= {f"optimizer.{k}.{names[p]}.{key}": value for key, value in values.items()}
        return tensors

    def load(self):
        """Fills the state from the run's last checkpoint and returns its step. ValueError as in
        checkpoints.load."""
        for p in self.weights.values():
            p.grad = torch.zeros_like(p)
        for optimizer in self.optimizers:  # a step with a learning rate of 0 makes its state, to be filled
            clip_and_step(optimizer, 0.0, torch.zeros((), device=self.device), 0.0)
        self.model.zero_grad(set_to_none=True)
        return checkpoints.load(self.flags.out, self.hashes, self.tensors())

    def save(self, step):
        """Writes a checkpoint; the last --keep of them stay."""
        config = vars(self.flags) | dict(processor=processor(self.device))
        about = dict(config=config, hashes=self.hashes)
        checkpoints.save(self.flags.out, step, about, self.tensors(), self.flags.keep)

    def gradient_norm(self):
        """How long the gradient of all weights together is, a tensor."""
        gradients = [p.grad for p in self.weights.values() if p.grad is not None]
        return distributed.whole(torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def become(self, values):
        """The model's weights become these, {name: tensor}."""
        for name, p in self.weights.items():
            p.copy_(values[name])

    def size(self):
        count = sum(p.numel() for p in self.weights.values())
        return f"{count / 1e6:.1f}M trained parameters on {self.device}"

    def export(self, save, log):
        """Writes the run's model, with EMA weights, and its curves. Every rank takes part, since each may
        hold a share of the weights."""
        state = {}
        for name, tensor in self.model.state_dict().items():
            tensor = distributed.whole(self.ema.get(name, tensor))
            if distributed.rank() == 0:
                state[name] = tensor.cpu()
        if distributed.rank() == 0:
            save(state)
            log.draw()

    def show(self, preview, samples, step):
        """Two previews: of the EMA weights, and of the raw ones. Few and small batches need not wait for a
        compiler."""
        last = {name: p.detach().clone() for name, p in self.weights.items()}
        with torch.compiler.set_stance("force_eager"):
            self.become(self.ema)
            averaged = preview()
            self.become(last)
            raw = preview()
        if distributed.rank() == 0:
            averaged.save(samples / f"{step:06d}.png")
            raw.save(samples / f"{step:06d}-raw.png")
