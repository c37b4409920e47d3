"""What train.py and sample.py show: the number of parameters, the table of WERs, subtitles."""
import time

import jiwer
import regex

from real.files import note, write_whole

SPACELESS = r"[\p{lb=SA}\p{lb=ID}\p{lb=CJ}\p{Han}\p{Tibetan}]"      # by where Unicode lets a line break


class Stopwatch(dict):
    """Seconds of each stage, by name."""
    def __init__(self):
        self.since = time.perf_counter()

    def lap(self, stage):
        self[stage], self.since = round(time.perf_counter() - self.since, 1), time.perf_counter()

    def __str__(self):
        stages = "; ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.items())
        return f"{stages}; in all {sum(self.values()):.0f} s"


def parameter_line(facts):
    """One line: how many parameters are frozen, trained, and active for one token. facts: of baselines.add_adapter."""
    counts, adapter = facts["parameters"], "LoRA" if facts["method"].startswith("lora") else "MoME"
    return (f"frozen: encoders {counts['encoders']:,}, LLM {counts['LLM']:,} parameters; trained: {adapter} "
            f"{counts['adapter']:,} ({counts['active']:,} active for one token), projectors and markers "
            f"{counts['projectors and markers']:,}")


def error_rates(references, hypotheses):
    """The corpus WER (jiwer); with it the character error rate, if most letters are of scripts without spaces."""
    rates = {"wer": jiwer.wer(references, hypotheses)}
    if len(set(references)) >= 10 and len(set(hypotheses)) == 1:
        note(f"all {len(references)} clips get the same text, {hypotheses[0]!r}: the model does not listen yet")
    letters = "".join(references).replace(" ", "")
    if len(regex.findall(SPACELESS, letters)) > len(letters) / 2:
        texts = [[text.replace(" ", "") for text in side] for side in (references, hypotheses)]
        rates["cer"] = jiwer.cer(*texts)
    return rates


def table(rows):
    """Rows of metrics.json as text: a line for each task and noise, a column for each audio:video rate.

    The numbers are WERs, or character error rates if all rows have them.
    The column 'auto' also shows its tokens as a share of those at the finest rate."""
    lines, widths = {}, {}
    unit = "cer" if all("cer" in row for row in rows) else "wer"
    for row in sorted(rows, key=lambda row: row["audio_rate"] == "auto"):
        column = ":".join(str(rate) for rate in (row["audio_rate"], row["video_rate"]) if rate)
        noise = "clean" if row["snr_db"] is None else f"{row['snr_db']:g} dB"
        line = lines.setdefault((row["task"], noise), {})
        line[column] = f"{100 * row[unit]:.1f}"
        if column == "auto":
            line[column] += f" ({100 * row['tokens'] / line['tokens']:.0f}%)"
        line["tokens"] = max(row["tokens"], line.get("tokens", 0))
        widths[column] = 14 if column == "auto" else 7
    text = f"{unit.upper() + ' %':14}" + "".join(f"{column:>{width}}" for column, width in widths.items())
    for (task, noise), line in lines.items():
        cells = "".join(f"{line.get(column, ''):>{width}}" for column, width in widths.items())
        text += f"\n{task:6}{noise:8}{cells}"
    return text


def stamp(seconds):
    """Seconds -> SRT's hours:minutes:seconds,milliseconds."""
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"


def wrap(text, width=42):
    """Break a text into lines at spaces. A longer word is cut, but no letter is cut from its marks."""
    lines = regex.findall(rf"(?! )\X{{1,{width}}}(?<! )(?= |$)|(?! )\X{{1,{width}}}", text)
    return "\n".join(line.strip() for line in lines)


def write_srt(path, segments):
    """Write a transcript as subtitles. segments: dicts of start and end in seconds, and text, which may be empty."""
    blocks = [f"{i}\n{stamp(segment['start'])} --> {stamp(segment['end'])}\n{wrap(segment['text'])}\n"
              for i, segment in enumerate((segment for segment in segments if segment["text"]), 1)]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(blocks), "utf-8"))
