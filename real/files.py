"""Small helpers that many files share: errors, messages, files that are written as a whole, and the end of a script."""
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm


class WeightsError(ValueError):
    """Weights cannot be used. The message names the file, what is wrong with it and what to do."""


class CheckpointError(ValueError):
    """A folder has no readable checkpoint. The message names the folder and what is wrong with it."""


def shown(path):
    """The path on one line, even if its name has line feeds in it."""
    return str(path) if str(path).isprintable() else repr(str(path))


def note(text):
    """Print a message that is not an error to stderr, above any progress bar."""
    tqdm.write(f"note: {text}", file=sys.stderr)


def write_whole(path, write):
    """Call write(temporary path) and then rename that file to `path`, so that `path` never holds half a file.

    Raises OSError, which names `path`."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:  # it names the temporary file, which the user does not know
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as JSON."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


def read_json(path):
    """The value in a JSON file. Raises WeightsError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON: {error}") from None


def run_script(main):
    """Call main() and exit with its code. Ctrl-C and a closed pipe end the script without a traceback."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # as in `python sample.py ... | head -1`; without this, flushing stdout fails at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
