"""The gates: pre-commit runs the programs of `make lint`, in the same versions and with the same options."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    recipe = recipe.replace("$(RUN) -m ", "$(VENV)/bin/").replace("$(VENV)", ".venv")
    commands = set(re.findall(r"\.venv/bin/\w[\w-]*(?: check| format)?(?: --[\w-]+)*", recipe))
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert len(commands) == 4 and set(hooks) == commands


def test_every_program_of_lint_is_pinned():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "requirements" / "lint.txt").read_text(), re.MULTILINE))
    assert {"ruff", "clang-format", "mypy"} <= set(pins)
