"""Weights of others: HF's Llama and Whisper folders, AV-HuBERT's files. What is in them, under which names, how they are read.

A file's tensors are a mapping of name -> tensor, read one at a time; `fill` puts them into a module by an explicit map of
names, and a tensor that is missing, left over or of another shape is an error that names it. Nothing in a file is ever run.
"""
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


class WeightsError(ValueError):
    """Weights that cannot be used; the message says which file, what was found and what to do."""


def write_whole(path, write):
    """Call write(temporary path), then move the result to `path`: it is there whole or not at all."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- files -----------------------------------------------------------------------------------------------------------

class Shards(Mapping):
    """The tensors of an HF folder, in model.safetensors or in the shards that model.safetensors.index.json lists."""

    def __init__(self, folder):
        index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
        if single.is_file():
            files = [single]
        elif index.is_file():
            files = [Path(folder, name) for name in sorted(set(read_json(index)["weight_map"].values()))]
        else:
            raise WeightsError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it")
        self.where = {}
        for path in files:
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path}: not readable as safetensors: {error}") from None
            self.where |= {name: file for name in file.keys()}

    def __getitem__(self, name):
        return self.where[name].get_tensor(name)

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)


def read_json(path):
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON: {error}") from None


def read_config(folder, model_type):
    """config.json of an HF folder of this type."""
    config = read_json(Path(folder, "config.json"))
    if config.get("model_type") != model_type:
        raise WeightsError(f"{folder}: model_type {config.get('model_type')!r} in config.json, expected {model_type!r}")
    return config


class Inert:
    """What stands in for any class or function that a pickle names: it takes whatever it is given and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    extend = update = add = append


class InertUnpickler(pickle.Unpickler):
    """Lets tensors through and turns everything else that a pickle would import into `Inert`, so that nothing in it runs."""

    SAFE = {("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter}

    def find_class(self, module, name):
        if module == "torch" and re.fullmatch(r"(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage", name):
            return getattr(torch, name)
        return self.SAFE.get((module, name), Inert)


def read_pickle(path):
    """A .pt file of torch -> what is in it, tensors in memory-mapped form where the file allows; no code of it is run."""
    inert = SimpleNamespace(__name__="inert", Unpickler=InertUnpickler,
                            load=lambda file, **options: InertUnpickler(file, **options).load())
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)
    except Exception as error:  # a damaged pickle can fail in any way
        raise WeightsError(f"{path}: not readable as a torch file: {type(error).__name__} {str(error).splitlines()[:1]}") from None


def fill(module, tensors, name_of, where, dtype=torch.float32, dropped="$^"):
    """Put `tensors` into `module` (which may be on the meta device), one at a time, in `dtype` (integers keep theirs).

    name_of(name in the module) -> name in the file; what the module does not ask for must match the regex `dropped`."""
    asked = set()
    for name, old in module.state_dict(keep_vars=True).items():
        source = name_of(name)
        if source not in tensors:
            raise WeightsError(f"{where}: no tensor {source!r} in it, which {name!r} needs")
        new = tensors[source]
        asked.add(source)
        if new.shape != old.shape:
            raise WeightsError(f"{where}: {source!r} has shape {tuple(new.shape)}, expected {tuple(old.shape)}")
        new = new.to(dtype) if new.is_floating_point() else new
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    left = sorted(name for name in tensors if name not in asked and not re.match(dropped, name))
    if left:
        raise WeightsError(f"{where}: {len(left)} tensors that this model has no place for: {', '.join(left[:3])}")


# --- Llama (HF's LlamaForCausalLM) -----------------------------------------------------------------------------------

def llama_config(folder):
    """config.json of an HF Llama -> the fields of LlamaConfig."""
    c = read_config(folder, "llama")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise WeightsError(f"{folder}: rope type {kind!r} in config.json; default, linear and llama3 are known")
    if c.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"{folder}: hidden_act {c['hidden_act']!r} in config.json, expected 'silu'")
    keys = {"linear": ("factor",), "default": (), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}[kind]
    return dict(
        vocab_size=c["vocab_size"], dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], ffn_dim=c["intermediate_size"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or c.get("rope_theta", 1e4), rope_scaling=tuple(rope[key] for key in keys),
        attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False))


def llama_name(name):
    """Our name of a Llama's tensor -> HF's."""
    return name if name.startswith("lm_head.") else f"model.{name}"


LLAMA_DROPPED = r"lm_head\.weight|.*rotary_emb\.inv_freq"  # a tied head may be stored twice


# --- Whisper's encoder (HF) ------------------------------------------------------------------------------------------

def whisper_config(folder):
    """config.json of an HF Whisper -> the fields of AudioConfig; max_tokens is 30 s."""
    c = read_config(folder, "whisper")
    return dict(n_mels=c["num_mel_bins"], dim=c["d_model"], n_layers=c["encoder_layers"],
                n_heads=c["encoder_attention_heads"], max_tokens=c["max_source_positions"], pos_kernel=0)


def renamed(name, parts):
    """The dotted `name` with each of its parts exchanged by the table `parts`."""
    return ".".join(filter(None, (parts.get(part, part) for part in name.split("."))))


def whisper_name(name):
    """Our name of an audio encoder's tensor -> HF's, within the encoder."""
    if name == "positions":
        return "embed_positions.weight"
    inside = dict(blocks="layers", attn_norm="self_attn_layer_norm", ffn_norm="final_layer_norm", q="self_attn.q_proj",
                  k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj", norm="layer_norm")
    return renamed(name, inside)


# --- AV-HuBERT -------------------------------------------------------------------------------------------------------

def avhubert_name(name, blocks_per_stage=2):
    """Our name of a video encoder's tensor -> AV-HuBERT's."""
    resnet = "feature_extractor_video.resnet."
    outside = {"stem": f"{resnet}frontend3D.0", "stem_norm": f"{resnet}frontend3D.1", "stem_relu": f"{resnet}frontend3D.2",
               "proj": "feature_extractor_video.proj", "fuse_norm": "layer_norm", "fuse": "post_extract_proj",
               "pos_conv": "encoder.pos_conv.0", "norm": "encoder.layer_norm"}
    first, _, rest = name.partition(".")
    if first in outside:
        return f"{outside[first]}.{rest}"
    if first == "trunk":
        block, _, rest = rest.partition(".")
        stage, block = divmod(int(block), blocks_per_stage)
        return f"{resnet}trunk.layer{stage + 1}.{block}.{rest}"
    return "encoder." + whisper_name(name)


AVHUBERT_DROPPED = r"mask_emb|final_proj\.|label_embs_concat|feature_extractor_audio\."


def avhubert_tensors(path):
    """An AV-HuBERT .pt, pretrained or fine-tuned -> its encoder's tensors, the weight norm of its position convolution
    folded: w = g * v / ||v||, the norm over all but the kernel's axis."""
    tensors = read_pickle(path)
    tensors = tensors.get("model", tensors) if isinstance(tensors, dict) else {}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    prefix = "encoder.w2v_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    conv = "encoder.pos_conv.0.weight"
    if f"{conv}_g" not in tensors or f"{conv}_v" not in tensors:
        raise WeightsError(f"{path}: no {conv}_g and {conv}_v in it: not an AV-HuBERT model")
    g, v = tensors.pop(f"{conv}_g").float(), tensors.pop(f"{conv}_v").float()
    tensors[conv] = g * v / v.norm(dim=(0, 1), keepdim=True)
    return tensors


def avhubert_config(tensors):
    """The sizes of an AV-HuBERT, from its tensors' shapes -> the fields of VideoConfig."""
    dim = tensors["post_extract_proj.weight"].shape[0]
    n_layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")})
    return dict(size=88, picture=96, stem_channels=64, stem_kernel=7, channels=(64, 128, 256, 512), blocks_per_stage=2,
                dim=dim, n_layers=n_layers, n_heads=dim // 64, pos_kernel=tensors["encoder.pos_conv.0.weight"].shape[2],
                pos_groups=dim // tensors["encoder.pos_conv.0.weight"].shape[1])
