"""Which model a run trains: a new one, one that goes on with other pictures, or an image model with temporal
layers; and where its weights lie. The one file of training/ that knows the model."""
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import torch

from attention import use_attention
from common.files import print_left_out
from common.hardware import DTYPES, device_of, processor
from data import folder
from data.latent_cache import LatentCache, fingerprint
from data.moving_shapes import MovingShapes
from data.prompt_lists import words_of
from data.tar_shards import TarShards
from dit import SIZES, ModelConfig, initialise
from encoders.t5 import T5Config, Tokenizer
from encoders.text import CONFIGS, NULL_TOKENS, POOLING
from sample import Pipeline
from temporal import inflate
from training import distributed
from training.batches import variants_of

KEPT = ("text", "published", "autoencoder", "diffusion")  # of the config of the model that --init names


def describe(flags, **parts):
    """What a model says of itself: the flags and the processor that it was trained with, and the settings of
    each part."""
    made_on = processor(device_of(flags.device))
    return dict(flags=dataclasses.asdict(flags), image_size=flags.image_size, processor=made_on, **parts)


def hashes_of(model=None, **datasets):
    """{name: hash} of what a run takes from elsewhere: its data sets, by the names of their flags, and the
    frozen parts and the tokenizer of a Pipeline. Computed on rank 0; empty on the others."""
    if distributed.rank() > 0:
        return {}
    hashes = {name: hash_of_data(dataset) for name, dataset in datasets.items()}
    if model:
        hashes["autoencoder"] = fingerprint(model.autoencoder)
        published = model.config.get("published", {})
        for name, tokenizer, encoder in zip(published, model.tokenizers, model.text_encoders):
            hashes[name] = fingerprint(encoder, tokenizer)
        if model.tokenizer:
            hashes["tokenizer"] = hashlib.sha256(model.tokenizer.model).hexdigest()
    return hashes


def hash_of_data(dataset):
    """A hash of a data set: of all captions and pictures, or of where the samples of tar shards and of a
    cache lie."""
    if isinstance(dataset, LatentCache):
        return hashlib.sha256(json.dumps(dataset.settings).encode()).hexdigest()
    if isinstance(dataset, TarShards):
        names = [path.name for path in dataset.paths]
        return hashlib.sha256(json.dumps(names).encode() + dataset.rows.tobytes()).hexdigest()
    several = max(map(len, getattr(dataset, "variants", [()]))) > 1
    digest = hashlib.sha256(json.dumps(dataset.variants if several else dataset.captions).encode())
    if hasattr(dataset, "array"):  # of a folder; shapes follow from their captions and the flags
        digest.update(dataset.array.contiguous().numpy())
    return digest.hexdigest()


def pictures_of(flags):
    """What the image stage learns from: a cache of latents, tar shards, shapes, or a folder."""
    if flags.cache:
        return LatentCache(flags.cache)
    tars = any(Path(flags.data).glob("[!.]*.tar"))
    if tars:
        dataset = TarShards(flags.data, flags.image_size)
    else:
        dataset = folder.load(flags.data, flags.image_size, flags.seed)
    print_left_out(dataset.skipped, len(dataset))
    return dataset


def some_captions(dataset, most):
    """At most so many captions of a data set, all of each picture; of tar shards, from all over them."""
    if isinstance(dataset, TarShards):
        return [dataset.caption(i) for i in range(0, len(dataset), -(-len(dataset) // most))]
    return [caption for several in variants_of(dataset)[:most] for caption in several]


def vocabulary(captions):
    return sorted({word for caption in captions for word in words_of(caption)})


def text_settings(flags, captions):
    """The text encoders of a new model → their part of Pipeline's config, their arguments of ModelConfig, and
    the tokenizer, if it is trained here."""
    published = {name: getattr(flags, name) for name in CONFIGS if getattr(flags, name)}
    if not published:
        tokenizer = Tokenizer.train(captions)
        text = T5Config(vocabulary=len(tokenizer), depth=flags.text_depth)
        return dict(text=vars(text)), dict(text_widths=[text.width]), tokenizer
    widths = [CONFIGS[name].read(path).width for name, path in published.items()]
    null_tokens = [NULL_TOKENS[name] for name in published]
    pooling = [POOLING[name] for name in published]
    return dict(published=published), dict(text_widths=widths, null_tokens=null_tokens, pooling=pooling), None


def new_image_model(flags, dataset, autoencoder):
    """A Pipeline by the flags, around an autoencoder. The transformer has no values yet: `place` gives
    them."""
    captions = some_captions(dataset, 100_000)
    more = MovingShapes(count=500).captions if flags.data == "shapes" else []  # the video stage's words
    text, of_text, tokenizer = text_settings(flags, captions + more)
    C = autoencoder.config.channels
    model = ModelConfig.of(
        flags.size, channels=C, out_channels=C * (1 + flags.learned_variance), integration=flags.integration,
        qk_norm=flags.qk_norm, **of_text,
    )
    diffusion = {name: getattr(flags, name) for name in ("schedule", "target", "learned_variance", "shift")}
    words = vocabulary(captions) if len(dataset) <= 100_000 else []
    parts = dict(model=vars(model), autoencoder=vars(autoencoder.config), diffusion=diffusion, **text)
    torch.manual_seed(flags.seed)
    pipeline = Pipeline(describe(flags, words=words, **parts), tokenizer, empty=True)
    pipeline.autoencoder.load_state_dict(autoencoder.state_dict())
    return pipeline


def image_run(flags):
    """The Pipeline of the run that --init names. ValueError if it is of another --size, or of clips
    already."""
    model = Pipeline.load(flags.init, clip=flags.clip, t5=flags.t5)
    if model.transformer.config.temporal:
        raise ValueError(f"--init {flags.init}: is a video model")
    shape = lambda config: (config.depth, config.width, config.heads)
    found = shape(model.transformer.config)
    if found != shape(ModelConfig.of(flags.size)):
        size = next((name for name in SIZES if shape(ModelConfig.of(name)) == found), "another")
        raise ValueError(f"--size {flags.size}: the model in {flags.init} is of size {size}")
    return model


def continued_image_model(flags, dataset):
    """The model of the run that --init names, for other pictures or another size of them: positions are
    computed for whatever grid there is."""
    model = image_run(flags)
    words = []
    if model.config["words"] and len(dataset) <= 100_000:
        words = vocabulary([*model.config["words"], *some_captions(dataset, 100_000)])
    kept = {name: model.config[name] for name in KEPT if name in model.config}
    model.config = describe(flags, words=words, **kept | dict(model=model.config["model"]))
    return model.train()


def image_run_for_clips(flags):
    """The image model that --init names, for the video stage. ValueError if the flags do not fit it."""
    if flags.cache or any(Path(flags.data).glob("[!.]*.tar")):
        raise ValueError("the video stage takes pictures from shapes or a folder, not tar shards or a cache")
    image = image_run(flags)
    if image.config["image_size"] != flags.image_size:
        size = image.config["image_size"]
        raise ValueError(f"--image-size {flags.image_size}: the image model in {flags.init} has {size}")
    return image


def new_video_model(flags, image, captions):
    """An image model (a Pipeline) with temporal layers. captions: of the clips."""
    words = vocabulary([*image.config["words"], *captions]) if image.config["words"] else []
    # mini's few frames stand further apart in the positions' sinusoids, as its tokens do
    frame_step = min(2.0, image.config["model"]["position_step"])
    config = image.config["model"] | dict(temporal=True, frame_step=frame_step)
    kept = {name: image.config[name] for name in KEPT if name in image.config}
    torch.manual_seed(flags.seed)
    model = Pipeline(describe(flags, model=config, words=words, frames=flags.frames, **kept), image.tokenizer)
    new = inflate(model, image.state_dict())
    print(f"{len(new)} new weights, the temporal layers': {new[0]} … {new[-1]}")
    if flags.only_temporal:
        for name, p in model.named_parameters():
            p.requires_grad_(name in new)
    return model


def place(model, flags):
    """Shares a Pipeline out among the processes, on their devices, and gives a new transformer its starting
    values. No process ever holds the whole of a new model that is shared out."""
    device = distributed.start(device_of(flags.device))
    model.precision = flags.precision
    model.transformer.checkpointing = flags.checkpointing
    use_attention(model, flags.attention)
    if flags.compile:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("--compile: needs a C++ compiler; on Debian: apt-get install g++")
        for block in model.transformer.blocks:
            block.compile()
    for part in (model.transformer, *model.text_encoders):
        if any(p.requires_grad for p in part.parameters()):
            distributed.shard(part, device, DTYPES[flags.precision], flags.shard)
    if any(p.is_meta for p in model.transformer.parameters()):
        model.transformer.to_empty(device=device)
        torch.manual_seed(flags.seed)
        with distributed.DrawnWhole():
            initialise(model.transformer)
    model.to(device)
