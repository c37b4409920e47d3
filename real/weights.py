"""Real weights: HF's Llama and Whisper folders, AV-HuBERT's files. No code of a file is ever run."""
import hashlib
import math
import pickle
import re
from collections import OrderedDict
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from real.files import WeightsError, read_json, refuse_pointer

BLOCK = 1 << 16  # bytes
N_BLOCKS = 64    # blocks of one file that the cheap fingerprint hashes
QUANTISED = r"\.(qweight|qzeros|scales|weight_scale\w*|weight\.absmax|SCB)$"     # names of tensors beside small integers


# --- files ----------------------------------------------------------------------------------------------------------

def refusing(load):
    """A function (..., path) that loads weights or a tokenizer. Whatever goes wrong in it becomes a WeightsError."""
    @wraps(load)
    def careful(*args, **options):
        try:
            return load(*args, **options)
        except (WeightsError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:                        # what a damaged file can cause has no end
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            paths = (value for value in (*args, *options.values()) if isinstance(value, (str, Path)))
            raise WeightsError(f"{next(paths, 'weights')}: damaged, or of a kind that is not supported; {reason}") from error
    return careful


def weight_files(path):
    """The files of weights at `path`: a file itself, or what an HF folder holds (model.safetensors or its shards)."""
    path = Path(path)
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    files = [file for file in (path, single) if file.is_file()][:1]
    if not files and index.is_file():
        files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if not files:
        raise WeightsError(f"{path}: no model.safetensors and no model.safetensors.index.json in it; other formats must be "
                           "converted, an adapter must be merged")
    for file in files:
        refuse_pointer(file)
    return files


@refusing
def fingerprint(path, whole=False):
    """What identifies the weights at `path`: {"bytes": size, "sample": hash}, or with `whole` {"bytes", "whole"}.

    "whole" hashes every byte. "sample" hashes N_BLOCKS evenly spaced blocks of each file, so a fine-tuned copy of the
    same layout differs. The first block holds names and shapes in a safetensors file."""
    digest, total = hashlib.sha256(), 0
    for file in weight_files(path):
        size = file.stat().st_size
        last = max(0, size - BLOCK)
        starts = range(0, size, BLOCK) if whole else [last * i // (N_BLOCKS - 1) for i in range(N_BLOCKS)]
        with open(file, "rb") as f:
            for start in starts:
                f.seek(start)
                digest.update(f.read(BLOCK))
        total += size
    return {"bytes": total, "whole" if whole else "sample": digest.hexdigest()}


def read_safetensors(folder):
    """{name: tensor} of an HF folder. The tensors are memory-mapped, so nothing is read before it is used."""
    tensors = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path}: not readable as safetensors: {error}") from None
    return tensors


def read_config(folder, model_type):
    """The config.json of an HF folder as a dict. Raises WeightsError if it is not of this model type."""
    if not Path(folder).is_dir():
        raise WeightsError(f"{folder}: not a folder. Nothing is downloaded: name the folder of a model that you have")
    config = read_json(Path(folder, "config.json"))
    if config.get("model_type") != model_type:
        raise WeightsError(f"{folder}: model_type {config.get('model_type')!r} in config.json, expected {model_type!r}")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise WeightsError(f"{folder}: weights quantised by {method}, which is not supported; "
                           "use the model's fp32, fp16 or bf16 weights")
    return config


def filled(cls, config, tensors, file_name, path, dtype, unused):
    """A new cls(config) whose weights are `tensors`, floats as `dtype`. Memory holds one copy of them.

    file_name(our name) is the tensor's name in the file at `path`. Tensors that the module has no place for must match
    the regular expression `unused`. Raises WeightsError."""
    if config.n_layers > len(tensors):
        raise WeightsError(f"{path}: {config.n_layers:,} layers by its config.json, and {len(tensors):,} tensors")
    if scales := [name for name in tensors if re.search(QUANTISED, name)]:
        raise WeightsError(f"{path}: {scales[0]!r} is of quantised weights, which are not supported; take those in bf16")
    with torch.device("meta"):
        module = cls(config)
    weights = {}
    for name, old in module.state_dict().items():
        source = file_name(name)
        if source not in tensors:
            raise WeightsError(f"{path}: no tensor {source!r} in it, which {name!r} needs")
        new = tensors[source]
        if new.is_floating_point() != old.is_floating_point():
            raise WeightsError(f"{path}: {source!r} holds {new.dtype}: quantised weights are not supported; take those in bf16")
        if new.shape != old.shape:
            raise WeightsError(f"{path}: {source!r} has shape {tuple(new.shape)}, expected {tuple(old.shape)}")
        weights[name] = new.to(dtype) if new.is_floating_point() else new
    extra = sorted(name for name in tensors.keys() - set(map(file_name, weights)) if not re.match(unused, name))
    if extra:
        raise WeightsError(f"{path}: {len(extra)} tensors that this model has no place for: {', '.join(extra[:3])}")
    module.load_state_dict(weights, assign=True)
    return module


# --- Llama (HF's LlamaForCausalLM) ----------------------------------------------------------------------------------

@refusing
def load_llama(cls, folder, dtype=torch.float32, **experts):
    """The Llama in an HF folder -> cls in `dtype`, with new fp32 MoMEs if `experts` (n_routed=, ...) says so.

    Raises WeightsError."""
    config, tensors = cls.Config(**llama_config(folder)), read_safetensors(folder)
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tied and head is not None and table is not None and not torch.equal(head, table):
        config = replace(config, tied=False)    # as in transformers: a head of its own counts, whatever the config says
    llm = filled(cls, config, tensors, lambda name: name if name == "lm_head.weight" else f"model.{name}", folder,
                 dtype, unused=r"lm_head\.weight|.*rotary_emb\.inv_freq")     # some files also store a tied output head
    llm.inv_freq = scaled_inv_freq(config)
    llm.add_mome(**experts)
    return speed_up(llm)


def scaled_inv_freq(config):
    """The rotary frequencies of a LlamaConfig (D/H/2,), divided as rope_scaling says for long contexts.

    (factor,) divides all frequencies. Llama 3's (factor, low, high, context) divides those that turn fewer than `low`
    times within `context` positions. It keeps those that turn more than `high` times, and blends between the two."""
    inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    if len(config.rope_scaling) <= 1:
        return inv_freq / (config.rope_scaling or (1,))[0]
    factor, low, high, context = config.rope_scaling
    unscaled = ((context * inv_freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)   # share that stays as it is
    return inv_freq * unscaled + inv_freq / factor * (1 - unscaled)


def llama_config(folder):
    """The config.json of an HF Llama -> the fields of LlamaConfig."""
    c = read_config(folder, "llama")
    if c.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"{folder}: hidden_act {c['hidden_act']!r} in config.json, expected 'silu'")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    name = "original_max_position_embeddings"           # as in transformers, the one at the top of config.json comes first
    rope = rope | {name: c.get(name) or rope.get(name) or c.get("max_position_embeddings")}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling_keys = {"default": (), "linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", name)}
    if rope_type not in scaling_keys:
        raise WeightsError(f"{folder}: rope type {rope_type!r} in config.json; default, linear and llama3 are known")
    return dict(
        vocab_size=c["vocab_size"], dim=c["hidden_size"], n_layers=c["num_hidden_layers"],
        n_heads=c["num_attention_heads"], n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], ffn_dim=c["intermediate_size"],
        rope_theta=rope.get("rope_theta") or c.get("rope_theta", 1e4),
        rope_scaling=tuple(rope[key] for key in scaling_keys[rope_type]), norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False))


def llama_ids(folder):
    """The token ids (bos, eos) of an HF Llama. If the folder lists several, the first counts."""
    c = read_config(folder, "llama")
    bos, eos = (ids[0] if isinstance(ids, list) and ids else ids for ids in (c.get("bos_token_id"), c.get("eos_token_id")))
    if not all(isinstance(token, int) and 0 <= token < c["vocab_size"] for token in (bos, eos)):
        raise WeightsError(f"{folder}: bos_token_id {bos!r}, eos_token_id {eos!r} in config.json, expected two ids below "
                           f"vocab_size {c['vocab_size']}")
    return bos, eos


# --- faster decoding of a real Llama on a CPU -----------------------------------------------------------------------

FEW_ROWS = 4                # rows of x up to which splitting the matrix pays
MIN_WEIGHTS = 2 ** 16       # size of a matrix from which it pays
N_SPLITS = 8


def few_rows_linear(x, weight, bias=None):
    """x (..., d_in), weight (d_out, d_in), bias (d_out,) -> (..., d_out): F.linear, faster for few rows of x on a CPU.

    When one clip is decoded, time goes into reading the weights, and MKL uses one core for that. A batch of N_SPLITS
    products, each with some rows of the matrix, reads them with all cores."""
    few = 0 < x.numel() <= FEW_ROWS * x.shape[-1] and weight.numel() >= MIN_WEIGHTS and len(weight) % N_SPLITS == 0
    on_mkl = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkl.is_available()
    if not (few and on_mkl):
        return F.linear(x, weight, bias)
    columns = x.reshape(1, -1, x.shape[-1]).mT.expand(N_SPLITS, -1, -1)         # (N_SPLITS, d_in, N)
    y = torch.bmm(weight.view(N_SPLITS, -1, x.shape[-1]), columns)              # (N_SPLITS, d_out / N_SPLITS, N)
    y = y.permute(2, 0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


class FewRowsLinear(nn.Linear):
    """nn.Linear with `few_rows_linear`. In decoding, layers with JoinedWeights share one product."""
    joined, part = None, None           # JoinedWeights sets them. A weight that was replaced is no longer `part`

    def forward(self, x):
        few = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
        if few and self.joined and self.weight.data_ptr() == self.part.data_ptr():
            y = self.joined.products(x)[self.number]
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return few_rows_linear(x, self.weight, self.bias)


class JoinedWeights:
    """The weights of linear layers that read the same x, as one matrix: in decoding one product serves them all.

    The weights of the layers become parts of this matrix, so no number is kept twice. The first layer that is called
    with a tensor x computes the product, and the others find it. Until then nobody may write into x or the weights."""

    def __init__(self, *layers):
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.last = None, None          # x and its products
        for number, (layer, part) in enumerate(zip(layers, self.weight.split(self.sizes))):
            layer.weight.data, layer.joined, layer.part, layer.number = part, self, part, number

    def products(self, x):
        """x (..., d_in) -> for each layer (..., d_out), without its bias."""
        known, products = self.last
        if known is not x:
            products = few_rows_linear(x, self.weight).split(self.sizes, -1)
            self.last = x, products
        return products


def few_rows_logits(llm, hidden):
    """Llama.logits with `few_rows_linear`: hidden (..., D) -> (..., V)."""
    return few_rows_linear(hidden, (llm.embed_tokens if llm.lm_head is None else llm.lm_head).weight)


def speed_up(llm):
    """Let a Llama's linear layers, except MoME's routers, and its logits use `few_rows_linear`. Returns the same Llama.

    Only the class of the layers changes, and where their weights lie. Their parameters and names stay."""
    for name, module in llm.named_modules():
        if type(module) is nn.Linear and ".mome." not in name:
            module.__class__ = FewRowsLinear
    for layer in llm.layers if llm.norm.weight.dtype == torch.float32 else ():      # else it is for a GPU
        JoinedWeights(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        JoinedWeights(layer.mlp.gate_proj, layer.mlp.up_proj)
    llm.logits = MethodType(few_rows_logits, llm)
    return llm


# --- Whisper's encoder (HF) -----------------------------------------------------------------------------------------

def padding(cls):
    """An AudioEncoder class -> one that fills up each clip with silence to 30 s, as Whisper was trained."""
    class PaddedAudioEncoder(cls):
        def forward(self, mel, lengths=None):
            """mel (B, M, frames), lengths (B,) -> (B, T, D) of the clips alone. AssertionError if longer than 30 s.

            encoders.compress turns silence into 2 below the clip's largest value."""
            B, _, n_frames = mel.shape
            total = self.conv2.stride[0] * self.config.max_tokens
            assert n_frames <= total, f"{n_frames} log-mel frames, at most {total}"
            lengths = torch.full((B,), n_frames) if lengths is None else lengths
            valid = (torch.arange(total) < lengths.cpu()[:, None])[:, None].to(mel.device)
            mel = F.pad(mel, (0, total - n_frames))
            silence = mel.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True) - 2
            return super().forward(torch.where(valid, mel, silence))[:, :self.n_tokens(n_frames)]
    return PaddedAudioEncoder


@refusing
def load_whisper(cls, folder, dtype=torch.float32, padded=False):
    """The encoder of an HF Whisper -> cls in `dtype`. The folder may hold the encoder alone. Raises WeightsError."""
    tensors = read_safetensors(folder)
    prefix = next((p for p in ("model.encoder.", "encoder.") if f"{p}conv1.weight" in tensors), "")
    cls = padding(cls) if padded else cls
    config = cls.Config(**whisper_config(folder), padded=padded)
    return filled(cls, config, tensors, lambda name: prefix + whisper_name(name), folder, dtype,
                  unused=r"(model\.)?decoder\.|proj_out\.").eval()


def whisper_config(folder):
    """The config.json of an HF Whisper -> the fields of AudioConfig. max_tokens is 30 s."""
    c = read_config(folder, "whisper")
    if c.get("activation_function", "gelu") != "gelu":
        raise WeightsError(f"{folder}: activation_function {c['activation_function']!r} in config.json, expected 'gelu'")
    return dict(n_mels=c["num_mel_bins"], dim=c["d_model"], n_layers=c["encoder_layers"],
                n_heads=c["encoder_attention_heads"], max_tokens=c["max_source_positions"], pos_kernel=0)


def whisper_name(name):
    """Our name of an audio encoder's tensor -> HF's name within the encoder."""
    if name == "positions":
        return "embed_positions.weight"
    theirs = dict(blocks="layers", attn_norm="self_attn_layer_norm", ffn_norm="final_layer_norm", q="self_attn.q_proj",
                  k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj", norm="layer_norm")
    return ".".join(theirs.get(word, word) for word in name.split("."))


# --- AV-HuBERT ------------------------------------------------------------------------------------------------------

@refusing
def load_avhubert(cls, path, dtype=torch.float32):
    """The encoder of an AV-HuBERT file (Base or Large, also fine-tuned) -> cls in `dtype`. Raises WeightsError."""
    tensors = avhubert_tensors(path)
    config = cls.Config(**avhubert_config(tensors))
    return filled(cls, config, tensors, avhubert_name, path, dtype,
                  unused=r"mask_emb|final_proj\.|label_embs_concat|feature_extractor_audio\.").eval()


def avhubert_tensors(path):
    """An AV-HuBERT file -> {name: tensor} of its encoder.

    The weight norm of the positional convolution is folded in: w = g * v / ||v||, a norm for each kernel position."""
    tensors = read_pickle(path)
    tensors = tensors.get("model", tensors) if isinstance(tensors, dict) else {}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    prefix = "encoder.w2v_model."
    if any(name.startswith(prefix) for name in tensors):  # a fine-tuned model holds the encoder beside a decoder
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    conv = "encoder.pos_conv.0.weight"
    if f"{conv}_g" not in tensors or f"{conv}_v" not in tensors:
        raise WeightsError(f"{path}: no {conv}_g and {conv}_v in it: not an AV-HuBERT model")
    g, v = tensors.pop(f"{conv}_g").float(), tensors.pop(f"{conv}_v").float()
    tensors[conv] = g * v / v.norm(dim=(0, 1), keepdim=True)
    return tensors


def avhubert_config(tensors):
    """The shapes of an AV-HuBERT's tensors -> the fields of VideoConfig."""
    dim, group_width, pos_kernel = tensors["encoder.pos_conv.0.weight"].shape
    n_layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")})
    return dict(size=88, picture=96, stem_channels=64, stem_kernel=7, channels=(64, 128, 256, 512), blocks_per_stage=2,
                dim=dim, n_layers=n_layers, n_heads=dim // 64, pos_kernel=pos_kernel, pos_groups=dim // group_width)


def avhubert_name(name):
    """Our name of a video encoder's tensor -> AV-HuBERT's name."""
    resnet = "feature_extractor_video.resnet."
    stem = f"{resnet}frontend3D"
    theirs = {"stem": f"{stem}.0", "stem_norm": f"{stem}.1", "stem_relu": f"{stem}.2", "fuse": "post_extract_proj",
              "fuse_norm": "layer_norm", "proj": "feature_extractor_video.proj", "pos_conv": "encoder.pos_conv.0",
              "norm": "encoder.layer_norm"}
    first, _, rest = name.partition(".")
    if first in theirs:
        return f"{theirs[first]}.{rest}"
    if first == "resnet":
        block, _, rest = rest.partition(".")
        stage, block = divmod(int(block), 2)    # as in `avhubert_config`
        return f"{resnet}trunk.layer{stage + 1}.{block}.{rest}"
    return "encoder." + whisper_name(name)


class Inert:
    """Replaces every class and function that a pickle names. It accepts any call and does nothing."""

    def nothing(self, *args, **kwargs):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = update = add = nothing


class InertUnpickler(pickle.Unpickler):
    """Builds tensors. Everything else that a pickle would import becomes `Inert`, so no code of the file runs."""

    SAFE = {("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter}
    STORAGE = r"(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"

    def find_class(self, module, name):
        if module == "torch" and re.fullmatch(self.STORAGE, name):
            return getattr(torch, name)
        return self.SAFE.get((module, name), Inert)


def read_pickle(path):
    """The content of a torch file, on the CPU. Objects other than tensors and plain data are `Inert`."""
    inert = SimpleNamespace(__name__="inert", Unpickler=InertUnpickler,
                            load=lambda file, **options: InertUnpickler(file, **options).load())
    refuse_pointer(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)
    except Exception as error:  # a damaged pickle can raise any error
        reason = f"{type(error).__name__} {str(error).splitlines()[:1]}"
        raise WeightsError(f"{path}: not readable as a torch file: {reason}") from None
