"""`make test` always runs both parts, and fails if either fails."""

import shutil
import subprocess

import pytest

from tests.test_install import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

NO_TESTS = 5  # pytest's exit status when it selects no test


@pytest.mark.parametrize(
    ("first", "interpreted", "passed"),
    [(0, 0, True), (1, 0, False), (0, 1, False), (1, 1, False), (2, NO_TESTS, False), (0, NO_TESTS, True)],
)
def test_both_parts_run_and_either_may_fail(tmp_path, first, interpreted, passed):
    """With a fake Python that records its arguments and exits with the given statuses."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        f'#!/bin/sh\necho "${{TRITON_INTERPRET:-0}} $*" >> {calls}\n'
        f'test -z "$TRITON_INTERPRET" && exit {first}\nexit {interpreted}\n'
    )
    python.chmod(0o755)
    # -o env: the environment of the suite is neither created nor checked.
    result = subprocess.run(["make", "-C", ROOT, "-o", "env", "test", f"RUN={python}", "ARGS=-k chosen"])
    assert (result.returncode == 0) == passed
    plain, again = calls.read_text().splitlines()
    assert plain.startswith("0 -m pytest") and again.startswith("1 -m pytest")
    assert "not timing" in plain and "interpret and not gpu" in again
    assert plain.endswith("-k chosen") and again.endswith("-k chosen")
