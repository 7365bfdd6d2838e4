"""Runs steps in separate processes, with a time limit each, and writes every result as soon as it is known."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 15
"""Seconds from SIGINT to SIGKILL for a step that ran out of time."""
_KEPT_OUTPUT = 20_000  # last characters of a step's output that its record keeps


class Step(NamedTuple):
    """One command and its time limit.

    Attributes:
        name: name in the report.
        purpose: what the step does, for the list that is printed before a stage.
        command: program and arguments.
        seconds: time limit.
        environment: variables that are added to the environment.
        missing: what this machine lacks for the step, which is then left out; None if nothing.
    """

    name: str
    purpose: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = {}
    missing: str | None = None


class Journal:
    """The results of a check: a file with one JSON object per line, each written when it is added."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []
        path.write_text("")

    def add(self, **entry: Any) -> dict[str, Any]:
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return entry

    def having(self, kind: str) -> list[dict[str, Any]]:
        """The entries with the key `kind`: "test", "benchmark", "cache" (compiled kernels), "probe", "ended"."""
        return [entry for entry in self.entries if kind in entry]


def say(text: str) -> None:
    print(f"gpu-check: {text}", flush=True)


def run_step(step: Step, deadline: float, journal: Journal, environment: dict[str, str], grace: float) -> None:
    """Runs a step from the root of the tree until its limit or `deadline` (in time.monotonic() seconds).

    Its output is printed as it comes. Lines that hold a JSON object are results and enter the journal, with the name of
    the step. The last entry has the keys `ended` (the name), `status` (the exit status, or why there is none),
    `seconds`, `passed` and `output` (the last characters).
    """
    left = deadline - time.monotonic()
    if step.missing is not None or left < 1:
        reason = step.missing or "no time is left in this stage"
        say(f"{step.name} left out: {reason}")
        journal.add(ended=step.name, status=f"left out: {reason}", seconds=0.0, passed=True, output="")
        return
    limit = min(step.seconds, left)
    say(f"{step.name}: {step.purpose}, at most {limit:.0f} s")
    began = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment, **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_receive_interrupts,
    )
    output: list[str] = []
    reader = threading.Thread(target=_read, args=(process.stdout, step.name, output, journal), daemon=True)
    reader.start()
    status: int | str
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
        _interrupt(process, grace)
    except KeyboardInterrupt:
        _interrupt(process, grace)
        raise
    finally:
        _signal_group(process, signal.SIGKILL)  # also what a step left running
        reader.join(timeout=GRACE_SECONDS)
    seconds, passed = round(time.monotonic() - began, 1), status == 0
    say(f"{step.name} {'passed' if passed else f'FAILED ({status})'} in {seconds} s")
    text = "".join(output)[-_KEPT_OUTPUT:]
    journal.add(ended=step.name, status=status, seconds=seconds, passed=passed, output=text)


def _read(stream: TextIO, step: str, output: list[str], journal: Journal) -> None:
    for line in stream:
        sys.stdout.write(line)
        sys.stdout.flush()
        result = result_in(line)
        if result is None:
            output.append(line)
        else:
            journal.add(step=step, **result)


def result_in(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds, or None."""
    if not line.startswith('{"'):
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _receive_interrupts() -> None:
    """A program started in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(process: subprocess.Popen, grace: float) -> None:
    """SIGINT to the step's process group, so that it can report what it has; SIGKILL `grace` seconds later."""
    _signal_group(process, signal.SIGINT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
