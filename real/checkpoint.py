"""Checkpoints: what was trained, and which real weights it was trained with.

A folder holds model.safetensors (the trained tensors and the stand-ins) and config.json (the model's config, real
parts, method, rates, tasks). If the LLM is a stand-in, it also holds tokenizer.json. Real parts are frozen and large.
So a checkpoint stores only their paths and fingerprints.
"""
import hashlib
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from data import TASKS, load_tokenizer
from encoders import AudioConfig, AudioEncoder, VideoConfig, VideoEncoder
from mome import AVSR, AVSRConfig, Llama
from real.files import CheckpointError, WeightsError, digest, refuse_pointer, to_json, write_together
from real.run import choose_device
from real.tokenizer import tokenizer_file
from real.weights import fingerprint

FORMAT = 4  # raise it when old checkpoints can no longer be loaded
EXPERTS = ("n_routed", "top_k", "n_shared", "bottleneck", "place")    # the fields of LlamaConfig that describe MoME
MOST = {"n_layers": 1000, "dim": 100_000, "n_heads": 10_000, "vocab_size": 10_000_000, "ffn_dim": 1_000_000,
        "n_routed": 10_000, "n_shared": 10_000, "bottleneck": 100_000, "max_tokens": 1_000_000}     # of any model
PARTS = {"llm": Llama, "audio": AudioEncoder, "video": VideoEncoder}  # the modules that may be real
FLAGS = {"llm": "--llm", "audio": "--audio-encoder", "video": "--video-encoder"}  # the flags that name their files


def dtype_on(device):
    """The dtype of real parts: bf16 on a GPU, else fp32. Trained parameters are fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def read_parts(paths, dtype, experts, padded):
    """{part: path} -> {part: module in `dtype`}. Raises WeightsError.

    `experts` {field: value} describes the LLM's new MoME modules. `padded` is AudioConfig's."""
    options = {"llm": experts, "audio": {"padded": padded}, "video": {}}
    return {part: PARTS[part].from_pretrained(path, dtype, **options[part]) for part, path in paths.items()}


def identify(paths):
    """{part: path} -> {part: its path and what identify_part says with `whole`}, as config.json stores it."""
    return {part: {"path": os.path.abspath(path)} | identify_part(part, path, whole=True) for part, path in paths.items()}


def identify_part(part, path, whole):
    """The fingerprint of a part by samples, with `whole` also by every byte; of an LLM also its tokenizer's hash."""
    found = fingerprint(path) | (fingerprint(path, whole=True) if whole else {})
    if part == "llm":
        found["tokenizer"] = hashlib.sha256(tokenizer_file(path).read_bytes()).hexdigest()
    return found


def stored(model, parts):
    """The names of the tensors that a checkpoint with these real parts stores: what is trained, and stand-ins."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    part_of = {name: name.removeprefix("encoders.").partition(".")[0] for name in model.state_dict()}
    return {name for name, part in part_of.items() if name in trained or part not in parts}


def save_model(model, folder, parts, words=None, **more):
    """Write a checkpoint. `parts` comes from `identify`, `words` from a stand-in tokenizer; config.json gets `more`."""
    names = stored(model, parts)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}
    files = {"model.safetensors": save(state)}
    if words is not None:
        files["tokenizer.json"] = to_json({"words": list(words)})
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    config = {"format": FORMAT, "model": asdict(model.config), "parts": parts, "files": digests, **more}
    files["config.json"] = to_json(config | {"digest": fixed_digest(config)})
    write_together({Path(folder, name): content for name, content in files.items()})


def load_model(folder, paths=None, verify=False, device=torch.device("cpu")):
    """The checkpoint in `folder` -> (AVSR in eval mode, the dict of config.json).

    Real parts are read from `paths` {part: path}, or from where they were in training; the dict's "paths" says where.
    Their fingerprints must be those of training; `verify` compares every byte. Raises CheckpointError, WeightsError."""
    for name in ("config.json", "model.safetensors"):
        if not Path(folder, name).is_file():
            raise CheckpointError(f"{folder}: no {name} here; train a model into it: python train.py --out {folder}")
    try:
        refuse_pointer(Path(folder, "model.safetensors"))
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        check_together(folder, config)
        return read_model(folder, config, paths or {}, verify, device), config
    except (CheckpointError, WeightsError, torch.OutOfMemoryError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise CheckpointError(f"{folder}: damaged, or of another version; copy it again, or train again: {reason}") from None


def check_together(folder, config):
    """Raises CheckpointError if the files of a checkpoint are not of one run, or if a size is beyond MOST.

    Edits of the model, its rates or its tasks are refused too."""
    if "model" in config and config.get("format", 1) < FORMAT:
        raise CheckpointError(f"{folder}: made by an older version; train it again: python train.py --out {folder}")
    if config.get("format", 1) > FORMAT:
        raise CheckpointError(f"{folder}: made by a newer version of this program; update the program")
    for name, written in config["files"].items():
        path = Path(folder, name)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != written:
            raise CheckpointError(f"{folder}: its {name} is missing, damaged or of another run than its config.json; "
                                  "copy the whole folder again, or train again")
    for part, sizes in config["model"].items():
        for name, size in (sizes.items() if isinstance(sizes, dict) else ()):
            if name in MOST and size > MOST[name]:
                raise CheckpointError(f"{folder}: damaged: {part}.{name} is {size:,} in config.json, "
                                      f"at most {MOST[name]:,}")
    rates = [rate for pair in config.get("rates", ()) for rate in pair]
    if not set(config.get("tasks", ())) <= set(TASKS) or min(rates, default=1) < 1:
        raise CheckpointError(f"{folder}: damaged: config.json has tasks or rates that do not exist")
    if config.get("digest", fixed_digest(config)) != fixed_digest(config):       # older checkpoints have none
        raise CheckpointError(f"{folder}: damaged: its config.json is not as it was written")


def fixed_digest(config):
    """A hash of what nobody may edit in config.json. Thresholds, or the paths of real parts, may be edited."""
    return digest([config.get(name) for name in ("model", "rates", "tasks")])


def load_for_use(ckpt, verify=False, device="auto", **paths):
    """A checkpoint folder, and paths of its real parts (llm, audio, video) -> model, config, tokenizer.

    The last model is kept until its folder is written again. Raises CheckpointError, WeightsError."""
    config = Path(ckpt, "config.json")
    changed = config.stat().st_mtime_ns if config.is_file() else None
    return load_once(changed, ckpt, verify, device, tuple((part, path) for part, path in paths.items() if path))


@lru_cache(maxsize=1)
def load_once(changed, ckpt, verify, device, paths):
    """The cached part of load_for_use. changed: the time of config.json."""
    model, config = load_model(ckpt, dict(paths), verify, choose_device(device))
    return model, config, load_tokenizer(config["paths"].get("llm", ckpt))


def read_model(folder, config, paths, verify, device):
    """The AVSR of a checkpoint, for `load_model`, which explains errors. Adds "paths" to the config."""
    saved, parts = config["model"], config["parts"]
    if unknown := [FLAGS[part] for part in paths if part not in parts]:
        raise CheckpointError(f"{folder}: holds its own stand-in for what {unknown[0]} names; leave {unknown[0]} out")
    sizes = {part: saved.get(part) and PARTS[part].Config(**as_tuples(saved[part])) for part in PARTS}
    config["paths"] = {part: str(paths.get(part) or parts[part]["path"]) for part in parts}
    for part, path in config["paths"].items():
        if not Path(path).exists():
            raise CheckpointError(f"{folder}: its {part} part is not at {path}; say where it is: {FLAGS[part]} PATH")
        known, found = parts[part], identify_part(part, path, whole=verify)
        differences = ", ".join(f"{key} is {str(value)[:16]}, not {str(known[key])[:16]}"
                                for key, value in found.items() if value != known.get(key, value))    # some lack "tokenizer"
        if differences:
            raise CheckpointError(f"{path}: not the {part} part that {folder} was trained with: its {differences}")
    experts = {name: saved["llm"][name] for name in EXPERTS}
    real = read_parts(config["paths"], dtype_on(device), experts, padded=getattr(sizes["audio"], "padded", False))
    for part, module in real.items():
        if module.config != sizes[part]:
            path = config["paths"][part]
            raise CheckpointError(f"{path}: its config.json is not the one that {folder} was trained with")
    model = AVSR(AVSRConfig(**as_tuples(saved) | sizes), **real)
    if "method" in config:
        from extras.baselines import build_adapter
        build_adapter(model, config)
    missing, unexpected = model.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=False)
    if wrong := unexpected + sorted(stored(model, real).intersection(missing)):
        raise CheckpointError(f"{folder}: damaged, or of another version: {wrong[0]} is missing or unknown")
    return model.to(device).eval()


def as_tuples(values):
    """The dict with each list as a tuple: JSON has no tuples, and configs are compared and hashed."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def reading(audio, video):
    """How clips are read for encoders of these configs: size of pictures, number of mel bands. None: as a stand-in."""
    return {"size": (video or VideoConfig()).picture, "n_mels": (audio or AudioConfig()).n_mels}
