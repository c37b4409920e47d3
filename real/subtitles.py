"""Write the segments of a transcript as subtitles (SRT)."""
import textwrap

from real.files import write_whole


def stamp(seconds):
    """Seconds -> SRT's hours:minutes:seconds,milliseconds."""
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"


def write_srt(path, segments):
    """segments: dicts of start and end in seconds and text. A segment without text gets no subtitle."""
    blocks = [f"{i}\n{stamp(segment['start'])} --> {stamp(segment['end'])}\n{textwrap.fill(segment['text'], 42)}\n"
              for i, segment in enumerate((segment for segment in segments if segment["text"]), 1)]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(blocks), "utf-8"))
