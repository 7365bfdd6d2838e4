"""What the programs do about failures that their users can mend."""

import sys
from collections.abc import Callable

EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)


def exit_status(run: Callable[[], None], debug: bool = False) -> int:
    """0; or 2 where `run` raises what a user can mend, said in one line on stderr, or raised on with `debug`."""
    try:
        run()
    except EXPECTED as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
