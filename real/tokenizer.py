"""Tokenizers of real LLMs: byte-level BPE from an HF folder, as tiktoken Encodings."""
import base64
import itertools
from pathlib import Path

import regex
import tiktoken

from real.files import WeightsError, read_json, refuse_pointer
from real.weights import refusing
from toy.tokenizer import make_tokenizer

# Regular expressions that cut text into words before BPE merges the bytes of each word.
GPT2_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_WORDS = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
                r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
# HF's library (Oniguruma) reads these parts of expressions in another way than `regex` does.
ANOTHER_MEANING = r"&&|\\[wWbBhHKNXRGyYOgkx]|\{\d*,?\d*\}[+?]|(?<!\\)\[(\\.|[^\\\[\]])*\[|\(\?\w*i\w*\)"
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]  # the two ids after the ranks


class BPE(tiktoken.Encoding):
    """A tiktoken Encoding that encodes and decodes as HF's tokenizers do.

    Text is cut by each of `patterns` in turn: what matches is a piece, and what lies between matches is one.
    Before, it is cut at special tokens that a text may have, see is_text. `encode` reads other special tokens as
    plain text, and `decode` skips them. `encode` drops bytes that the vocabulary lacks. tiktoken needs all 256 bytes,
    so those get ids past the vocabulary's end. `decode` skips ids without a token: an LLM's table may be larger than
    its tokenizer. `written` has all ids that `encode` can give."""

    def __init__(self, name, patterns, ranks, special):
        """patterns: regular expressions; ranks {token bytes: id}, in the order of the merges; special {token: id}."""
        self.patterns = [regex.compile(pattern) for pattern in patterns]
        self.added = {token: i for token, i in special.items() if is_text(token)}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")      # (?!): nothing
        self.written = {*ranks.values(), *self.added.values()}
        self.size = max(*self.written, *special.values()) + 1
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        extra = {byte: self.size + i for i, byte in enumerate(lacking)}
        super().__init__(name, pat_str=r"(?s).+", special_tokens=special, mergeable_ranks=ranks | extra)

    def encode(self, text):
        pieces = isolated(self.added_pattern, text)
        for pattern in self.patterns:
            parts = ([piece] if piece in self.added else isolated(pattern, piece) for piece in pieces)
            pieces = [piece for part in parts for piece in part]
        ids = ([self.added[piece]] if piece in self.added else self.encode_ordinary(piece) for piece in pieces)
        return [i for of_piece in ids for i in of_piece if i < self.size]

    def decode(self, ids):
        return super().decode([i for i in ids if i in self.written])


def is_text(token):
    """Whether a token can stand in the prompt, or in a text as data.normalize leaves it: see data.WORD."""
    return bool(regex.fullmatch(r"[\p{L}\p{M}\p{N}'\u05f4\u200c\u200d·. ]+", token))


def isolated(pattern, text):
    """The matches of a compiled pattern and what lies between them. The text has no NUL: data.normalize leaves none."""
    return filter(None, pattern.sub("\0\\g<0>\0", text).split("\0"))


@refusing
def read_tokenizer(folder):
    """The tokenizer of an HF folder -> BPE, or that of a checkpoint with a tiny Llama. Raises WeightsError.

    It is read from tokenizer.json, or from tokenizer.model as Llama 3 has it. Only byte-level BPE is supported."""
    folder, path = Path(folder), tokenizer_file(folder)
    if path.suffix == ".model":
        return read_ranks(folder, path)
    file = read_json(path)
    if "words" in file:
        return make_tokenizer(file["words"])
    model, steps = file.get("model", {}), flat(file.get("pre_tokenizer"), "pretokenizers")
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    others = [step["type"] for step in flat(file.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if model.get("type", "BPE") != "BPE" or not (byte_level or "ByteLevel" in others):
        raise WeightsError(f"{path}: not a byte-level BPE tokenizer (SentencePiece, as in Llama 2, is not supported); "
                           "use a model with one, like Llama 3 or SmolLM2")
    if others:
        raise WeightsError(f"{path}: its normalizer {others[0]} is not supported")
    if steps[-1] is not byte_level[0]:
        raise WeightsError(f"{path}: its pre_tokenizer has a step after ByteLevel, which is not supported: {steps[-1]['type']}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise WeightsError(f"{path}: its model has a {name}, {model[name]!r}, which is not supported")
    patterns = [word_pattern(step, path) for step in steps]
    vocab, byte_of = model["vocab"], bytes_of_letters()
    added = file.get("added_tokens", [])
    special = {token["content"]: token["id"] for token in added}
    ranks = {bytes(byte_of[letter] for letter in token): i for token, i in vocab.items() if token not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged_ids = [vocab["".join(pair)] for pair in merges]
    whole = {i for token, i in vocab.items() if len(token) > 1 and token not in special} - set(merged_ids)
    for token in added:
        if is_text(token["content"]) and any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise WeightsError(f"{path}: its added token {token['content']!r} takes blanks away, or stands for whole "
                               "words only, which is not supported")
    if whole and not model.get("ignore_merges"):
        example = next(token for token, i in vocab.items() if i in whole)
        raise WeightsError(f"{path}: its token {example!r} is made by no merge, which is not supported")
    if len({*vocab.values(), *special.values()}) < len({*vocab, *special}):
        raise WeightsError(f"{path}: two of its tokens have one id")
    if model.get("unk_token") and not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise WeightsError(f"{path}: its vocabulary lacks bytes, and its unk_token stands for them, which is not supported")
    if merged_ids != sorted(merged_ids):
        raise WeightsError(f"{path}: its merges are not in the order of their ids, which tiktoken needs")
    return BPE(folder.name, list(filter(None, patterns)), ranks, special)


def tokenizer_file(folder):
    """The path of an HF folder's tokenizer. Raises WeightsError."""
    paths = [Path(folder, name) for name in ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise WeightsError(f"{folder}: no tokenizer.json and no tokenizer.model in it")
    refuse_pointer(path)
    return path


def read_ranks(folder, path):
    """Llama 3's tokenizer.model -> BPE. Each line is a token in base64 and its rank. Raises WeightsError."""
    try:
        lines = map(bytes.split, path.read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError:
        raise WeightsError(f"{path}: damaged, or a SentencePiece model, as in Llama 2, which is not supported; use a model "
                           "with a byte-level BPE tokenizer, like Llama 3 or SmolLM2") from None
    config = Path(folder, "config.json")
    bos = read_json(config).get("bos_token_id") if config.is_file() else None
    if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))) or bos not in (None, len(ranks)):
        raise WeightsError(f"{path}: {len(ranks):,} tokens, not those of its config.json, or not in order: damaged or cut "
                           "off; fetch it again")
    return BPE(folder.name, [LLAMA3_WORDS], ranks, {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)})


def flat(step, members):
    """A pre_tokenizer or normalizer of a tokenizer.json -> its steps. `members` is where a Sequence has them."""
    if not step or step["type"] != "Sequence":
        return [step] if step else []
    return [inner for member in step[members] for inner in flat(member, members)]


def word_pattern(step, path):
    """A step of a pre_tokenizer -> the regular expression that cuts text into words, or None if it cuts nothing.

    Raises WeightsError for a step that is not supported."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return GPT2_WORDS if step.get("use_regex", True) else None
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step["pattern"].get("Regex") or regex.escape(step["pattern"]["String"])
        if not regex.search(ANOTHER_MEANING, pattern) and is_expression(pattern):
            return pattern
    raise WeightsError(f"{path}: a step of its pre_tokenizer is not supported: {step}")


def is_expression(pattern):
    """Whether `regex` can read an expression."""
    try:
        return bool(regex.compile(pattern))
    except regex.error:
        return False


def bytes_of_letters():
    """{letter: byte}: GPT-2's table of the letters that stand for bytes in a tokenizer.json."""
    others = itertools.count(256)          # the letters of bytes that cannot be printed
    return {chr(b) if chr(b).isprintable() and b != 32 else chr(next(others)): b for b in range(256)}
