"""`make test` always runs both parts, and fails if either fails; workflows call targets of the Makefile."""

import re
import shutil
import subprocess

import pytest
import yaml

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


def test_workflows_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    called = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        for job in workflow["jobs"].values():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            for name in job.get("strategy", {}).get("matrix", {}).get("target", ["${{ matrix.target }}"]):
                lines = [command.replace("${{ matrix.target }}", name) for command in commands]
                called |= {target for line in lines for target in re.findall(r"\bmake(?: -o \S+)? ([a-z-]+)", line)}
    assert {"lint", "test", "sanitize", "docs", "demo", "gpu-check", "test-long", "aot-all"} <= called <= targets
