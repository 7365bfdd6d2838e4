"""docs/conf.py: every page is in the table of contents, and docstrings keep their text."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_table_of_contents(conf):
    listed = [page for pages in conf.CHAPTERS.values() for page in pages if "/" not in page]
    assert sorted(listed) == sorted(path.stem for path in DOCS.glob("*.md"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("    width: D.", r"    width: \D."),
        (
            "    decoder_patch: r. The decoder works on positions.",
            r"    decoder_patch: \r. The decoder works on positions.",
        ),
        ("    total = a*b for `x*y`, |d|.", r"    total = a\*b for `x*y`, \|d\|."),
        ("    h: [..., D], as in `f`.", "    h: [..., D], as in `f`."),
    ],
)
def test_docstrings_are_plain_text(conf, line, expected):
    """A single letter with a full stop would begin a list."""
    lines = ["Summary.", "", "Args:", line]
    conf.docstring_to_rst(None, "function", "f", None, None, lines)
    assert lines == ["Summary.", "", "Args:", expected]
