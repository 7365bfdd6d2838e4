"""Packages that tests can do without."""

import importlib
import importlib.util
import itertools
from types import ModuleType

import pytest


def installed(name: str, reason: str = "") -> ModuleType:
    """The module; skips the test, or the file that is collected, if it or a package that holds it is not installed.

    Any error of the import is raised, also that of a package without one of its own dependencies.
    """
    for part in itertools.accumulate(name.split("."), "{}.{}".format):
        if importlib.util.find_spec(part) is None:
            pytest.skip(reason or f"{part} is not installed", allow_module_level=True)
    return importlib.import_module(name)
