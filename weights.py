"""Weights of others: HF's Llama and Whisper folders, AV-HuBERT's files. What is in them, under which names, how they are read.

A file's tensors are a mapping of name -> tensor, read one at a time; `fill` puts them into a module by an explicit map of
names, and a tensor that is missing, left over or of another shape is an error that names it. Nothing in a file is ever run.
"""
import base64
import hashlib
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import tiktoken
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
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None  # of which nobody asked for the temporary one
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


# --- files -----------------------------------------------------------------------------------------------------------

def weight_files(path):
    """A file of weights alone; of an HF folder, model.safetensors or the shards that model.safetensors.index.json lists."""
    index, single = Path(path, "model.safetensors.index.json"), Path(path, "model.safetensors")
    if Path(path).is_file():
        return [Path(path)]
    if single.is_file():
        return [single]
    if index.is_file():
        return [Path(path, name) for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not Path(path).exists():
        raise WeightsError(f"{path}: no such file or folder")
    raise WeightsError(f"{path}: no model.safetensors and no model.safetensors.index.json in it")


def fingerprint(path, whole=False):
    """Which weights these are: their bytes and a hash of their directories (the header of a safetensors file; the end of a
    torch file, where checksums of its tensors stand), or with `whole` a hash of every byte."""
    digest, size = hashlib.sha256(), 0
    for file in weight_files(path):
        try:
            with open(file, "rb") as f:
                size += file.stat().st_size
                if whole:
                    for block in iter(lambda: f.read(1 << 24), b""):
                        digest.update(block)
                elif file.suffix == ".safetensors":
                    digest.update(f.read(int.from_bytes(f.read(8), "little")))
                else:
                    f.seek(max(0, file.stat().st_size - (1 << 16)))
                    digest.update(f.read())
        except (OSError, OverflowError) as error:
            raise WeightsError(f"{file}: not readable: {error}") from None
    return {"bytes": size, "whole" if whole else "header": digest.hexdigest()}


class Shards(Mapping):
    """The tensors of an HF folder."""

    def __init__(self, folder):
        self.where = {}
        for path in weight_files(folder):
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


def llama_ids(folder):
    """-> the token ids (bos, eos) of an HF Llama; of several ends, the first."""
    c = read_config(folder, "llama")
    bos, eos = (ids[0] if isinstance(ids, list) else ids for ids in (c.get("bos_token_id"), c.get("eos_token_id")))
    if not isinstance(bos, int) or not isinstance(eos, int):
        raise WeightsError(f"{folder}: bos_token_id {bos!r}, eos_token_id {eos!r} in config.json, expected two ids")
    return bos, eos


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


def avhubert_config(path, tensors):
    """The sizes of an AV-HuBERT, from its tensors' shapes -> the fields of VideoConfig."""
    if "post_extract_proj.weight" not in tensors:
        raise WeightsError(f"{path}: no tensor 'post_extract_proj.weight' in it: not an AV-HuBERT model")
    dim = tensors["post_extract_proj.weight"].shape[0]
    n_layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")})
    return dict(size=88, picture=96, stem_channels=64, stem_kernel=7, channels=(64, 128, 256, 512), blocks_per_stage=2,
                dim=dim, n_layers=n_layers, n_heads=dim // 64, pos_kernel=tensors["encoder.pos_conv.0.weight"].shape[2],
                pos_groups=dim // tensors["encoder.pos_conv.0.weight"].shape[1])


# --- tokenizers: byte-level BPE as tiktoken Encodings ----------------------------------------------------------------

GPT2_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SINGLE_DIGITS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
LLAMA3_WORDS = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
                r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]  # the first two ids after the ranks


class BPE(tiktoken.Encoding):
    """A tiktoken Encoding whose `encode` takes all text as text, special tokens too, and drops bytes that the vocabulary
    lacks, as HF's tokenizers do: tiktoken wants all 256, so they get ids past its end. `decode` passes over ids that no
    token has: a model's table may be larger than its tokenizer."""

    def __init__(self, name, words, ranks, special):
        self.known = {*ranks.values(), *special.values()}
        self.size = max(self.known) + 1
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        super().__init__(name, pat_str=words, special_tokens=special,
                         mergeable_ranks=ranks | {byte: self.size + i for i, byte in enumerate(lacking)})

    def encode(self, text):
        return [i for i in super().encode(text, disallowed_special=()) if i < self.size]

    def decode(self, ids):
        return super().decode([i for i in ids if i in self.known])


def letters_of_bytes():
    """The letters by which byte-level BPE writes bytes in JSON (GPT-2's table) -> {letter: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def word_pattern(pre_tokenizer):
    """tokenizer.json's pre_tokenizer -> the regex that cuts text into words, or None where it is none that we know."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else [{"type": None}]
    *first, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not first:
        return GPT2_WORDS
    if len(first) == 1 and first[0]["type"] == "Digits" and first[0].get("individual_digits"):
        return SINGLE_DIGITS
    if len(first) == 1 and first[0]["type"] == "Split" and not last.get("use_regex", True):
        return first[0]["pattern"].get("Regex")
    return None


def read_tokenizer(folder):
    """The tokenizer of an HF folder (byte-level BPE in tokenizer.json, or Llama 3's rank file tokenizer.model) -> BPE."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return read_ranks(folder)
    file = read_json(path)
    model, words = file.get("model", {}), word_pattern(file.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or file.get("normalizer") or words is None:
        raise WeightsError(f"{path}: not a byte-level BPE tokenizer (SentencePiece, as in Llama 2, is not supported); "
                           "use a model with one, like Llama 3 or SmolLM2")
    letters, special = letters_of_bytes(), {t["content"]: t["id"] for t in file.get("added_tokens", [])}
    ranks = {bytes(letters[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
    merged = [model["vocab"]["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in model["merges"]]
    if merged != sorted(merged):
        raise WeightsError(f"{path}: its merges are not in the order of their ids, which tiktoken needs")
    return BPE(folder.name, words, ranks, special)


def read_ranks(folder):
    """Llama 3's own tokenizer.model: lines of a token in base64 and its rank."""
    path = next((p for p in (folder / "tokenizer.model", folder / "original" / "tokenizer.model") if p.is_file()), None)
    if path is None:
        raise WeightsError(f"{folder}: no tokenizer.json and no tokenizer.model in it")
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    except ValueError:
        raise WeightsError(f"{path}: a SentencePiece model, as in Llama 2, which is not supported; use a model with a "
                           "byte-level BPE tokenizer, like Llama 3 or SmolLM2") from None
    return BPE(folder.name, LLAMA3_WORDS, ranks, {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)})
