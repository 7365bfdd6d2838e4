"""A package that is absent skips a test; one that is broken fails it."""

import sys

import pytest

from tests.installed import installed


def test_only_absence_skips(tmp_path, monkeypatch):
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_package", "broken_package.part"):
        with pytest.raises(ModuleNotFoundError, match="No module named 'absent_dependency'"):
            installed(name)
    for name in ("absent_dependency", "absent_dependency.part"):
        with pytest.raises(pytest.skip.Exception, match="^absent_dependency is not installed$"):
            installed(name)
    with pytest.raises(pytest.skip.Exception, match="^not here$"):
        installed("tests.absent_module", "not here")
    assert installed("tests.installed") is sys.modules["tests.installed"]
