"""Messages and exit statuses of failing programs."""

import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from command_line.failures import exit_status

PROGRAMS = Path(__file__).resolve().parents[2] / "python"


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


@pytest.mark.parametrize(
    ("program", "package", "installed_by"),
    [
        ("train", "omegaconf", "'deco_kernels[train]'"),
        ("spectrum", "matplotlib", "torch matplotlib numpy pillow tqdm"),
        ("photo_crops", "PIL", "torch numpy pillow scikit-learn"),
    ],
)
def test_a_missing_package_is_named_with_those_of_the_program(program, package, installed_by):
    hidden = f"import runpy, sys; sys.modules[{package!r}] = None; sys.path.insert(0, {str(PROGRAMS)!r})"
    command = f"{hidden}; runpy.run_path({str(PROGRAMS / program)!r} + '.py', run_name='__main__')"
    answer = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and package in answer.stderr and answer.stderr.count("\n") == 1
    assert answer.stderr.endswith(f"; install the packages of this program: pip install {installed_by}\n")


def test_interrupts_say_how_to_go_on(capsys):
    assert exit_status(raising(KeyboardInterrupt()), interrupted="interrupted; --resume continues") == 130
    assert capsys.readouterr().err == "interrupted; --resume continues\n"


def test_warnings_take_one_line(capsys):
    shown = warnings.showwarning
    assert exit_status(lambda: warnings.warn("lake.jpg is left out", stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: lake.jpg is left out\n" and warnings.showwarning is shown


def test_a_locale_that_lacks_characters_gets_others(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert exit_status(lambda: print("32 samples of 64²", flush=True)) == 0
    assert stdout.buffer.getvalue() == b"32 samples of 64?\n"
