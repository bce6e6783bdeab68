"""Either autoencoder: built from the config that a checkpoint holds, or loaded from its folder."""
import json
from pathlib import Path

from common.files import check_format
from encoders import weights
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, load_published


def build(config):
    """The dictionary of an AutoencoderConfig or AutoencoderKLConfig → the autoencoder, with new weights."""
    if "widths" in config:
        return AutoencoderKL(AutoencoderKLConfig(**config))
    return Autoencoder(AutoencoderConfig(**config))


def load(folder):
    """The Autoencoder that `train.py autoencoder` wrote to a folder, or the published AutoencoderKL in it.
    ValueError, naming the folder or file, if it holds neither."""
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        if (path.parent / "config.json").exists():
            return load_published(folder)
        advice = "train one with `python train.py autoencoder`"
        raise ValueError(f"--autoencoder {folder}: no model.safetensors there; {advice}")
    tensors, metadata = weights.read(path)
    check_format(path, metadata.get("format"))
    try:
        config = json.loads(metadata["config"])
        model = build(config["autoencoder"])
        model.load_state_dict(tensors)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not an autoencoder of train.py: {reason}") from None
    if not config.get("finished", True):
        advice = "go on with `python train.py autoencoder --resume` and its flags"
        raise ValueError(f"{path}: its training was stopped; {advice}")
    return model
