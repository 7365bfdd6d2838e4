"""docs/conf.py: every page is in the table of contents, and docstrings keep their text. Code blocks of pages run."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from deco_kernels import flow, model
from deco_kernels.testing.published_model import PublishedDeCo

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def left_to_the_reader(tmp_path, monkeypatch, one_thread):
    """The names and files that the pages use without making them."""
    monkeypatch.chdir(tmp_path)
    net, labels = model.build("deco-tiny"), torch.tensor([1, 7])
    model.save_model(net, "published.ckpt", names="published")
    noise, images = torch.randn(2, 2, 3, 32, 32)
    names = dict(net=net, noise=noise, labels=labels, images=images, pred=noise, target=images, torch=torch, flow=flow)
    null = torch.full_like(labels, net.null_label)
    return names | dict(model=PublishedDeCo(width=24, depth=1, heads=2), cond=labels, uncond=null)


@pytest.mark.parametrize("page", ["checkpoints", "codec", "equivalence", "pixel_decoder", "sampling", "swap"])
def test_code_blocks_of_a_page_run(page, left_to_the_reader):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, left_to_the_reader)


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
