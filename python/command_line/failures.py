"""Error handling of the programs."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def importing(packages: str) -> Iterator[None]:
    """Around imports: a package that is not installed ends the program with one line and status 2.

    packages: what `pip install` takes, all that the program needs.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: {error}; install the packages of this program: pip install {packages}", file=sys.stderr)
        raise SystemExit(2) from None


def exit_status(run: Callable[[], None], debug: bool = False, interrupted: str = "interrupted") -> int:
    """Runs `run` and returns the exit status: 0; 2 if it raises an expected error, printed as one line to stderr
    (re-raised with `debug`); 130 after Ctrl-C, with the line `interrupted`. Warnings are printed as one line too."""
    from deco_kernels.command_line import print_any_text  # inside, as this module reports that the package is missing

    print_any_text()
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
        message = _in_one_line(error)
        if isinstance(error, RuntimeError):
            message = f"out of memory ({message}); use smaller images or a smaller batch"
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def out_of_memory(error: Exception) -> bool:
    """Whether the error means that host or device memory ran out."""
    reported = isinstance(error, RuntimeError) and any(shortage in str(error) for shortage in _SHORTAGES)
    return reported or isinstance(error, MemoryError)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
