"""Whisper with its own decoder on the test clips of a folder: what the encoder alone could give (needs transformers).

    python -m extras.own_decoder whisper-base librispeech                prints the WER after data.normalize
    python -m extras.own_decoder whisper-base DIR --results librispeech  adds it to extras/results.csv as well

Clips are padded to 30 s, as Whisper was trained. Whisper writes numbers as digits, which counts as wrong where a
transcript spells them.
"""
import argparse
import time
from pathlib import Path

import jiwer
import torch
from tqdm import tqdm

from data import ClipError, normalize
from extras.experiments import COLUMNS, RESULTS, append
from real.folders import entries, read_entries
from real.script import in_one_line, run_script

BATCH = 8       # clips that are decoded together


def transcribe_all(folder, clips):
    """Clips -> texts, by the Whisper in `folder`, greedily."""
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
    model = WhisperForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()
    extract = WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    for start in tqdm(range(0, len(clips), BATCH), "Whisper"):
        waves = [clip.wave for clip in clips[start:start + BATCH]]
        features = extract(waves, sampling_rate=16_000, return_tensors="pt").input_features
        ids = model.generate(features, language="en", task="transcribe", do_sample=False, num_beams=1)
        yield from (tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in ids)


@in_one_line("own_decoder.py", ClipError, OSError, ImportError)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="folder of a Whisper in HF's layout, with its decoder")
    parser.add_argument("data", help="folder of clips with transcripts; its test split is read")
    parser.add_argument("--results", metavar="NAME", help="add a row with this name of the data to extras/results.csv")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    listed = [entry for entry in entries(args.data)[1] if entry.split == "test"]
    clips = [clip for _, clip in read_entries(listed, {"streams": ("audio",)}) if not isinstance(clip, ClipError)]
    if not clips:
        raise ClipError(f"{args.data}: none of its {len(listed)} test clips can be read")
    texts = [normalize(text) for text in transcribe_all(args.whisper, clips)]
    references = [clip.text for clip in clips]
    wer, n_words = jiwer.wer(references, texts), len(" ".join(references).split())
    print(f"{100 * wer:.1f} % WER of {n_words} words in {len(clips)} of {len(listed)} clips")
    if args.results:
        seconds = f"{time.perf_counter() - began:.0f}"
        append([dict.fromkeys(COLUMNS, "") | {
            "method": Path(args.whisper).name, "data": args.results, "rates": "1", "task": "asr", "snr_db": "clean",
            "seed": "0", "wer": f"{wer:.5f}", "words": n_words, "seconds": seconds, "split": "test"}], RESULTS)


if __name__ == "__main__":
    run_script(main)
