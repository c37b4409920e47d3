"""The tokenizer of the tiny Llama: bytes and whole words, in place of Llama 3's BPE."""
from collections import Counter

import tiktoken

SPECIAL_TOKENS = ("<bos>", "<eos>", "<transcribe>")    # <transcribe> is the whole prompt


def make_tokenizer(words):
    """A tiktoken Encoding: 256 bytes (id = byte), each word with its leading space, then SPECIAL_TOKENS."""
    tokens = [bytes([b]) for b in range(256)] + [f" {word}".encode() for word in words]
    return tiktoken.Encoding(
        "mome",
        pat_str=r" ?\S+|\s+",
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)})


def common_words(texts, most=4096):
    """The most common words of the texts, by count, then by alphabet."""
    counts = Counter(word for text in texts for word in text.split())
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]
