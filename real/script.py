"""How a script ends. Scripts import this file before torch: Ctrl-C then ends them without a traceback at any time."""
import os
import signal
import sys
from functools import wraps
from multiprocessing import current_process
from pathlib import Path

SCRIPTS = "train.py", "sample.py", "data.py"


def quiet_imports():
    """While our scripts import torch, Ctrl-C ends them at once. Worker processes leave Ctrl-C to their parent."""
    is_parent = current_process().name == "MainProcess"     # parent_process() knows it only after the imports
    if Path(sys.argv[0]).name in SCRIPTS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL if is_parent else signal.SIG_IGN)


def in_one_line(script, *kinds):
    """A decorator of a script's main(argv) -> exit code. Errors of these kinds become one line, and the code is 2."""
    def decorate(main):
        @wraps(main)
        def careful(argv=None):
            try:
                return main(argv) or 0
            except BrokenPipeError:     # an OSError; run_script ends quietly
                raise
            except kinds as error:
                print(f"{script}: {error}", file=sys.stderr)
                return 2
        return careful
    return decorate


def run_script(main):
    """Call main() and exit with its code: 130 after Ctrl-C, 1 after a closed pipe, both without a traceback.

    A letter that the terminal's encoding lacks is printed as its escape sequence, not as an error."""
    import torch

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):           # None: it is closed
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except torch.OutOfMemoryError as error:
        print(f"{Path(sys.argv[0]).name}: not enough memory on the GPU: {str(error).splitlines()[0]}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # as in `python sample.py ... | head -1`; without this, flushing stdout fails at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


quiet_imports()
