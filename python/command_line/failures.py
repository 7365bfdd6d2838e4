"""What the programs do about failures that their users can mend."""

import sys
import warnings
from collections.abc import Callable

EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory")


def exit_status(run: Callable[[], None], debug: bool = False, interrupted: str = "interrupted") -> int:
    """0; 2 where `run` raises what a user can mend, said in one line on stderr, or raised on with `debug`; 130 after
    Ctrl-C, with the line `interrupted`. Warnings take one line too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            run()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (*EXPECTED, RuntimeError) as error:
        if debug or not (isinstance(error, EXPECTED) or out_of_memory(error)):
            raise
        said = _in_one_line(error)
        if isinstance(error, RuntimeError):
            said = f"out of memory ({said}); take smaller images or a smaller batch"
        print(f"error: {said}", file=sys.stderr)
        return 2
    return 0


def out_of_memory(error: Exception) -> bool:
    """Whether the memory of this machine or of a device ran out."""
    said = isinstance(error, RuntimeError) and any(shortage in str(error) for shortage in _SHORTAGES)
    return said or isinstance(error, MemoryError)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
