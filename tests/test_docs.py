"""docs/conf.py: every page is in the table of contents, and docstrings keep their text. Code blocks of pages run."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from deco_kernels import flow, model, ops
from deco_kernels.signatures import OPS
from deco_kernels.testing.published_model import PublishedDeCo

DOCS = Path(__file__).resolve().parents[1] / "docs"
OP_PAGES = {op: op for op in OPS} | dict.fromkeys(("frequency_loss", "jpeg_frequency_weight"), "flow_matching_loss")


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


@pytest.mark.parametrize("page", ["checkpoints", "codec", "equivalence", "models", "pixel_decoder", "sampling", "swap"])
def test_code_blocks_of_a_page_run(page, left_to_the_reader):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, left_to_the_reader)


def test_the_presets_are_those_of_the_page():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    for name, (cls, arguments) in model.PRESETS.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model.build(name).parameters())
        sizes = " | ".join(str(arguments[size]) for size in ("width", "depth", "heads"))
        assert f"| `{name}` | {cls.__name__} | {sizes} | {count:,} |" in page


def test_the_arguments_of_the_models_are_those_of_the_page():
    section = (DOCS / "models.md").read_text(encoding="utf-8").split("## Arguments")[1].split("##")[0]
    listed = {}
    for cells in re.findall(r"^\| (`[^|]+`) \| ([^|]*)\|", section, flags=re.MULTILINE):
        names = re.findall(r"`(\w+)`", cells[0])
        listed |= dict(zip(names, cells[1].strip().split(", ") if cells[1].strip() else [""] * len(names), strict=True))
    found = {}
    for cls in (model.DeCo, model.DeCoTextToImage, model.DiT):
        for name, parameter in inspect.signature(cls).parameters.items():
            default = parameter.default
            text = f'"{default}"' if isinstance(default, str) else str(default)
            found[name] = "" if default is inspect.Parameter.empty else text
    assert listed == found


@pytest.mark.parametrize("op", OP_PAGES)
def test_a_page_has_the_signature_of_its_op(op):
    signature = inspect.signature(getattr(ops, op))
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    expected = f"{op}{inspect.Signature(plain)}".replace("'", '"')
    page = (DOCS / f"{OP_PAGES[op]}.md").read_text(encoding="utf-8")
    shown = re.search(rf"^```\n({op}\(.*?)```", page, flags=re.DOTALL | re.MULTILINE)[1]
    assert " ".join(shown.split()).replace("( ", "(") == expected


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
