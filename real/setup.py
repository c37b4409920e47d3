"""What stage 3 starts from: checked flags, clips, and the model around its frozen parts, real ones or stand-ins."""
import os
import shutil
import zlib
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice, product
from pathlib import Path

import torch
from safetensors.torch import save

from data import TASKS, ClipError, load_tokenizer, parse_rates, task_rates, task_streams
from encoders import AudioConfig, VideoConfig
from extras.ideas import finest_rates
from mome import AVSR, AVSRConfig, LlamaConfig
from real.checkpoint import EXPERTS, FLAGS, dtype_on, identify, load_model, read_parts, reading
from real.features import Features
from real.files import SPAN, CheckpointError, WeightsError, digest, is_first, note
from real.folders import folder_clips, read_all
from real.media import is_silent, probe
from real.mouth import parse_box
from real.options import parse_max_bad, parse_snrs
from real.weights import llama_ids
from toy.pretrain import pretrain
from toy.talker import grid_sentences, talker_clips, write_talker_clips
from toy.tokenizer import SPECIAL_TOKENS, common_words, make_tokenizer

PROMPT = "Transcribe speech to text."    # for a real LLM, the same for all tasks; not in the paper
MAX_HELD_OUT = 50                        # clips that --valid-every holds out, and at most a tenth of the training clips


def check_config(config):
    """Check flags that depend on one another. ValueError says which flag is wrong."""
    if not config.out:
        raise ValueError("--out '': name a folder")
    trains = not (config.eval_only or config.dry_run)
    if trains and config.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(f"--batch-size {config.batch_size}: {os.environ['WORLD_SIZE']} processes cannot share it evenly")
    samples = Path(config.out, "samples").resolve()
    if config.data and not config.dry_run and Path(config.data).resolve() in (samples, *samples.parents):
        raise ValueError(f"--out {config.out} is in the folder of --data, which would get its samples as clips; name another")
    parse_rates(config.rates)
    if config.seed >= 2 ** 63:
        raise ValueError(f"--seed must be under {2 ** 63}")
    parse_snrs(config.snr)
    parse_max_bad(config.max_bad)
    config.box and parse_box(config.box)
    LlamaConfig(1, **config.experts)
    for task in config.tasks.split(","):
        if task not in TASKS:
            raise ValueError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}")
    encoders = {"audio": config.audio_encoder, "video": config.video_encoder}
    if any(encoders.values()) and not (config.data or config.dry_run):
        raise ValueError("--audio-encoder and --video-encoder are for real clips: name their folder by --data")
    if any(path and stream not in config.real_paths for stream, path in encoders.items()):
        raise ValueError(f"--tasks {config.tasks} do not use both encoders: leave out the one that is not used")
    if config.pad_audio and not config.audio_encoder and not config.preset:
        raise ValueError("--pad-audio is for Whisper: name it by --audio-encoder")
    if config.checkpointing and config.method in ("mome-routers", "lora-ms", "lora-mss"):
        raise ValueError(f"--checkpointing: not with --method {config.method}, whose layers have a copy for each set of rates")
    if config.compile and config.method in ("lora-ms", "lora-mss"):
        raise ValueError(f"--compile: not with --method {config.method}; choosing a copy at each step leaves nothing to fuse")
    if config.method in ("mome-routers", "mome-bias") and not config.n_routed:
        raise ValueError(f"--method {config.method} is about the router: --n-routed must be 1 or more")
    if config.method == "mome-teacher" and config.rates_per_step != "all":
        raise ValueError("--method mome-teacher: the finest rate teaches the others in the same step, so --rates-per-step is all")
    if config.method == "mome-teacher":
        finest_rates([rates for task in config.tasks.split(",") for rates in task_rates(task, parse_rates(config.rates))])
    needed = {"llm"} | task_streams(config.tasks.split(","))
    if config.preset and trains and not (config.data and needed <= config.real_paths.keys()):
        flags = ", ".join(flag for part, flag in FLAGS.items() if part in needed)
        raise ValueError(f"--preset {config.preset} with --tasks {config.tasks} needs {flags} and --data; or --dry-run")
    if config.checkpointing and config.dry_run:
        raise ValueError("--dry-run does not count what --checkpointing saves: leave it out")


def cache_folder(config):
    """The folder of --cache."""
    return Path(config.cache or Path(config.out) / "cache")


def load_clips(config, tasks, audio, video):
    """The clips of a job -> {"train": clips, "valid": clips, "test": clips}; for --eval-only the test clips alone.

    `audio` and `video` are the encoders' configs. Raises ClipError, also if a task has no clip in a split."""
    if config.data:
        options = reading(audio, video) | {"streams": task_streams(tasks), "cache": cache_folder(config) / "crops",
                                           "box": config.box and parse_box(config.box)}
        splits = ("test",) if config.eval_only else ("train", "test")
        clips = folder_clips(config.data, options, parse_max_bad(config.max_bad), config.disjoint, splits)
        if config.valid_every and not config.eval_only:
            clips["train"], held_out = hold_out(clips["train"])
            clips["valid"] = [clip for clip in read_all(held_out) if clip]
    else:
        counts = {"test": config.test_clips}
        if not config.eval_only:
            counts |= {"train": config.clips, "valid": config.valid_clips}
        clips = talker_clips(counts, config.seed)
    for split, task in product(clips, tasks):
        if not any(clip.duration and set(TASKS[task]) <= set(clip.streams) for clip in clips[split]):  # of those read
            raise ClipError(f"{config.data}: no {split} clip has {' and '.join(TASKS[task])}, which {task} needs; "
                            "choose other --tasks")
    n_voices = sum("audio" in clip.streams for clip in clips["test"])
    if n_voices == 1 and "audio" in task_streams(tasks) and parse_snrs(config.snr) != [None]:
        raise ClipError(f"{config.data or '--test-clips'}: only one test clip has sound, and babble is made "
                        "of others' voices: use --snr clean")
    return clips


def hold_out(clips):
    """Training clips -> the clips to train on, the clips held out. No sentence is in both. Raises ClipError."""
    if len(clips) < 10:
        raise ClipError("--valid-every holds out a tenth of the training clips, "
                        f"and there are only {len(clips)}; leave it out")
    order = sorted(clips, key=lambda clip: (zlib.crc32(clip.text.encode()), clip.name))
    held_out = order[:min(MAX_HELD_OUT, len(order) // 10)]
    sentences = {clip.text for clip in held_out}
    rest = [clip for clip in clips if clip.text not in sentences]
    print(f"held out of {len(clips)} training clips: {len(held_out)} for --valid-every, and "
          f"{len(clips) - len(rest) - len(held_out)} more that say the same")
    return rest, held_out


def set_up(config, tasks, device, watch):
    """A TrainConfig -> AVSR with its frozen parts, {split: clips}, tokenizer, origin, features.Features or None.

    origin is a dict: what checkpoint.save_model must know of the real parts. Features are those of real encoders.
    `watch.lap(name)` is called after each stage. Raises ClipError, WeightsError."""
    torch.manual_seed(config.seed)
    parts = read_parts(config.real_paths, dtype_on(device), config.experts, config.pad_audio)
    known = identify(config.real_paths)
    stand_ins = {"audio": AudioConfig(), "video": VideoConfig()}
    sizes = {stream: parts[stream].config if stream in parts else stand_in if stream in task_streams(tasks) else None
             for stream, stand_in in stand_ins.items()}
    if "llm" in parts:
        tokenizer, (bos, eos) = load_tokenizer(config.llm), llama_ids(config.llm)
        llm, prompt, words = parts["llm"].config, tokenizer.encode(PROMPT), None
        if max(tokenizer.written) >= llm.vocab_size:
            raise WeightsError(f"{config.llm}: its tokenizer writes ids up to {max(tokenizer.written):,}, and its config.json "
                               f"has a vocab_size of {llm.vocab_size:,}; take both from one model")
    clips = load_clips(config, tasks, **sizes)
    watch.lap("clips")
    if config.data:
        texts = [clip.text for clip in clips["train"]]
        tested = {clip.text for split in clips if split != "train" for clip in clips[split]} - set(texts)
    else:
        texts, tested = grid_sentences("train"), set(grid_sentences("test"))
    if "llm" not in parts:
        words = sorted(common_words(texts))
        tokenizer = make_tokenizer(words)
        bos, eos, *prompt = (tokenizer.encode_single_token(name) for name in SPECIAL_TOKENS)
        llm = LlamaConfig(tokenizer.n_vocab, **config.experts)
    longest = max(len(tokenizer.encode(f" {clip.text}")) for clip in clips["train"])
    model = AVSR(AVSRConfig(llm, **sizes, bos=bos, eos=eos, prompt=tuple(prompt), max_tokens=max(32, 2 * longest),
                            projector_dim=config.projector_dim or max(256, llm.dim)), **parts).to(device)
    pretrain(model, parts, clips["train"], texts, tested, tokenizer, config, cache_folder(config), watch)
    whole = {part: known[part]["whole"] if part in parts else sha256(save(
                 {name: x for name, x in module.state_dict().items() if ".mome." not in name})).hexdigest()
             for part, module in ({"llm": model.llm} | dict(model.encoders.items())).items()}
    features = None
    if parts.keys() - {"llm"}:                 # a stand-in beside a real encoder reads the same copies of a clip
        keys = {stream: [whole[stream], asdict(sizes[stream]), str(dtype_on(device))] for stream in model.encoders}
        features = Features(cache_folder(config) / "features", model, keys, clips["train"], config.copies, config.seed)
        watch.lap("encoding clips")
    texts_as = known.get("llm", {}).get("tokenizer"), asdict(model.config)     # how ids are made and read
    origin = {"parts": known, "words": words, "frozen": digest([whole, texts_as, features and features.babble_key])[:12],
              "tested": split_digest(config, clips["test"])}
    return model, clips, tokenizer, origin, features


def split_digest(config, clips):
    """The folder of --data and a hash of its test clips, for config.json."""
    folder = config.data and os.path.abspath(config.data)
    return folder, digest(sorted([os.path.basename(clip.name), clip.text] for clip in clips))


def load_for_test(config, tasks, device):
    """--eval-only -> the model in --out, the dict of its config.json, the test clips, the config with what it has."""
    model, saved = load_model(config.out, config.real_paths, device=device)
    if not config.data and {"audio", "video"} & set(saved["paths"]):
        raise CheckpointError(f"{config.out}: its encoders are for real clips: name their folder by --data")
    for task in tasks:
        if not set(TASKS[task]) <= set(model.encoders):
            streams = " and ".join(model.encoders)
            raise ClipError(f"{config.out}: this model reads {streams} only, not what {task} needs")
        if task not in saved["tasks"]:
            note(f"{config.out}: this model was not trained for {task}, but for {', '.join(saved['tasks'])}")
        for rates in task_rates(task, parse_rates(config.rates)):
            if rates not in task_rates(task, saved["rates"]):
                note(f"{config.out}: this model was not trained for {task} at rate {':'.join(map(str, rates.values()))}")
    if not config.data and (trained_on := saved.get("tested", ("",))[0]):
        note(f"{config.out}: trained on {trained_on}, and tested on the synthetic talker; --data names clips of its own")
    clips = load_clips(config, tasks, model.config.audio, model.config.video)["test"]
    (folder, tested), (before, tested_before) = split_digest(config, clips), saved.get("tested", (None, None))
    if not folder and not before and tested_before not in (None, tested):
        note(f"{config.out}: other test clips than those of the training: another --seed or --test-clips")
    if folder and folder == before and tested != tested_before:
        note(f"{folder}: its test split is not that of the training any more; the model may have been trained on some of it")
    return model, saved, clips, replace(config, **{name: getattr(model.config.llm, name) for name in EXPERTS},
                                        **{name: saved[name] for name in ("method", "rank", "projector_per_rate")})


def write_samples(config, clips, folder):
    """Three test clips for sample.py, in place of those of an earlier run. Each is a whole file with its own sound."""
    if not is_first():
        return
    folder.mkdir(exist_ok=True)
    for old in folder.glob("sample[123]_*"):
        old.unlink()
    if not config.data:
        write_talker_clips(folder, 3, "test", config.seed)
        return
    whole = (clip for clip in clips if SPAN not in clip.name
             and not ("audio" in clip.streams and is_silent(probe(clip.name))))
    for i, clip in enumerate(islice(whole, 3), 1):
        path = Path(clip.name)
        copy = folder / f"sample{i}_{path.stem[:40]}{path.suffix}"    # a file's name has at most 255 bytes
        shutil.copy(clip.name, copy)
        copy.with_suffix(".txt").write_text(clip.text + "\n", "utf-8")
