"""Small helpers that many files share: errors, messages, and files that are written as a whole."""
import errno
import gc
import hashlib
import json
import os
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError
from tqdm import tqdm


class WeightsError(ValueError):
    """Weights cannot be used. The message names the file, what is wrong with it and what to do."""


class CheckpointError(ValueError):
    """A checkpoint, a state, a cache or a folder cannot be used. The message names it, what is wrong and what to do."""


class TrainingError(ValueError):
    """Training cannot go on. The message says at which step, why, and what to do."""


ERRORS = (CheckpointError, TrainingError, WeightsError, OSError, BrokenProcessPool)    # each is said in one line
HALF = ".half"  # ends the name of a file that is being written
SPAN = "#t="    # in the name of a clip that is a part of a file: what follows is its start and end in seconds


def is_first():
    """Whether this process writes files and prints. Under torchrun only the first of its processes does."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK") == "0"


def make_folder(path, flag):
    """Make the folder that a flag names, and try to write into it. Raises OSError, CheckpointError."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path}: a file, not a folder; name another {flag}")
    os.makedirs(path, exist_ok=True)
    TemporaryFile(dir=path).close()


@contextmanager
def no_collector():
    """In this block the garbage collector rests. It would look at 100,000 new objects again and again.

    It does not look at them after the block either, because they stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def shown(path):
    """The path on one line, even if its name has line feeds in it."""
    return str(path) if str(path).isprintable() else repr(str(path))


def note(text):
    """Print a message that is not an error to stderr, above any progress bar."""
    tqdm.write(f"note: {text}", file=sys.stderr)


def write_whole(path, write):
    """Call write(temporary path) and then rename that file to `path`, so that `path` never holds half a file.

    A link is followed, and a device is written to. Raises OSError, which names `path`."""
    is_device = os.path.exists(path) and not os.path.isfile(path)
    path = Path(path if is_device else os.path.realpath(path))
    temporary = path if is_device else temporary_of(path)
    try:
        write(temporary)
        if not is_device:
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the error names the temporary file, which the user does not know
        raise plain(error, path) from None
    finally:
        if not is_device:
            temporary.unlink(missing_ok=True)


def write_together(contents):
    """{path: bytes} -> all these files or none of them: no file is replaced before all are on the disk.

    Only the first process of torchrun writes."""
    if not is_first():
        return
    try:
        for path, content in contents.items():
            temporary_of(path).write_bytes(content)
            with open(temporary_of(path), "rb") as file:
                os.fsync(file.fileno())        # a rename must not reach the disk before the content
        for path in contents:
            os.replace(temporary_of(path), path)
    except OSError as error:
        raise plain(error, path) from None
    finally:
        for path in contents:
            temporary_of(path).unlink(missing_ok=True)


def temporary_of(path):
    """The path at which this thread writes a file before it is renamed to `path`."""
    name = os.fsdecode(os.fsencode(Path(path).name)[:200])       # a name has at most 255 bytes
    return Path(path).with_name(f".{name}.{threading.get_ident()}.{os.getpid()}{HALF}")


def read_stored(path, load):
    """load(path), a file of a cache. Raises CheckpointError, which names it, if it is damaged."""
    try:
        return load(path)
    except (KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged, delete it and start again ({error})") from None


def plain(error, path):
    """An OSError that says why `path` could not be written."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    return OSError(number or errno.EIO, reason or str(error), str(path))


def is_pointer(path):
    """Is the file only Git LFS's pointer to one that was not fetched?"""
    return os.path.getsize(path) < 1024 and Path(path).read_bytes().startswith(b"version https://git-lfs")


def refuse_pointer(path):
    """Raises WeightsError if the file is Git LFS's pointer to one that was not fetched."""
    if os.path.isfile(path) and is_pointer(path):
        raise WeightsError(f"{path}: a Git LFS pointer, not the file; fetch it with: git lfs pull")


def digest(value):
    """A hash of any value that JSON can hold, 40 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:40]


def to_json(value):
    """A value as JSON, in bytes. Raises ValueError for NaN and infinity, which JSON lacks."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_json(path, value):
    """Write a value as JSON."""
    write_together({Path(path): to_json(value)})


def read_json(path):
    """The value in a JSON file. Raises WeightsError if it is missing or not JSON."""
    refuse_pointer(path)
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON: {error}") from None
