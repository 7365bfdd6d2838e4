"""Messages and exit statuses of failing programs."""

import warnings

import pytest

from command_line.failures import exit_status


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--out: expected a folder"), "error: --out: expected a folder"),
        (OSError("first line\n  second line\n"), "error: first line second line"),
        (MemoryError(), "error: MemoryError"),
        (RuntimeError("can't allocate memory: 9 bytes"), "error: out of memory (can't allocate memory: 9 bytes); use"),
    ],
)
def test_what_a_user_can_mend_takes_one_line(error, line, capsys):
    assert exit_status(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
    with pytest.raises(type(error)):
        exit_status(raising(error), debug=True)


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="size mismatch"):
        exit_status(raising(RuntimeError("size mismatch")))


def test_interrupts_say_how_to_go_on(capsys):
    assert exit_status(raising(KeyboardInterrupt()), interrupted="interrupted; --resume continues") == 130
    assert capsys.readouterr().err == "interrupted; --resume continues\n"


def test_warnings_take_one_line(capsys):
    shown = warnings.showwarning
    assert exit_status(lambda: warnings.warn("lake.jpg is left out", stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: lake.jpg is left out\n" and warnings.showwarning is shown
