"""pytest plugin: one JSON line per test as soon as its outcome is known, in place of dots and a report at the end.

Keys: `test` (node ID), `outcome` (passed, skipped, failed, or error outside the test function), `seconds`, and
`message` for the last three.
"""

import json

import pytest

_reporter = None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    global _reporter
    _reporter = config.pluginmanager.get_plugin("terminalreporter")


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No letter per test."""
    outcome = _outcome(report)
    return (outcome, "", "") if outcome else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = _outcome(report)
    if outcome is None:
        return
    line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3)}
    if outcome != "passed":
        line["message"] = _message(report)
    _reporter.ensure_newline()
    _reporter.write(json.dumps(line) + "\n", flush=True)


def _outcome(report: pytest.TestReport) -> str | None:
    """The outcome that this report of a phase decides; None for a setup or teardown that passed."""
    if report.when == "call":
        return report.outcome
    return None if report.passed else "error" if report.failed else report.outcome


def _message(report: pytest.TestReport) -> str:
    """The line of the exception or the reason for skipping."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr)
