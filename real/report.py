"""The table that train.py prints."""


def table(rows):
    """Rows of metrics.json as text: a line for each task and noise, a column for each audio:video rate.

    The column 'auto' also shows its tokens as a share of those at the finest rate."""
    lines, widths = {}, {}
    for row in sorted(rows, key=lambda row: row["audio_rate"] == "auto"):
        column = ":".join(str(rate) for rate in (row["audio_rate"], row["video_rate"]) if rate)
        noise = "clean" if row["snr_db"] is None else f"{row['snr_db']:g} dB"
        line = lines.setdefault((row["task"], noise), {})
        line[column] = f"{100 * row['wer']:.1f}"
        if column == "auto":
            line[column] += f" ({100 * row['tokens'] / line['tokens']:.0f}%)"
        line["tokens"] = max(row["tokens"], line.get("tokens", 0))
        widths[column] = 14 if column == "auto" else 7
    text = f"{'WER %':14}" + "".join(f"{column:>{width}}" for column, width in widths.items())
    for (task, noise), line in lines.items():
        cells = "".join(f"{line.get(column, ''):>{width}}" for column, width in widths.items())
        text += f"\n{task:6}{noise:8}{cells}"
    return text
