"""Sphinx configuration of `make docs`. The source folder is the repository root, and the front page is README.md."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import results  # noqa: E402
from benchmarks.report import tables  # noqa: E402
from deco_kernels import __version__ as release  # noqa: E402

project = author = "deco_kernels"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.rst", "docs/results/*.md", "benchmarks/results/*.md"]
exclude_patterns = ["build", "out", ".venv*"]  # large; links in build/aarch64 lead out of it
default_role = "code"
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"deco_kernels {release}"
html_show_copyright = False
smartquotes = False
autodoc_member_order = "groupwise"
autodoc_inherit_docstrings = False
napoleon_use_param = False  # arguments that are described together stay together
autodoc_default_options = {"members": True, "special-members": "__call__", "show-inheritance": True}

CHAPTERS = {
    "Guide": (
        *("walkthrough", "models", "text_to_image", "sampling", "evaluation", "checkpoints", "hub", "swap", "codec"),
        *("training", "equivalence"),
    ),
    "Ops": (
        *("pixel_decoder", "pixel_decoder_from_tokens", "pixel_decoder_loss", "pixel_decoder_loss_from_tokens"),
        *("upsample_modulate", "adaln_block", "flow_matching_loss"),
    ),
    "Backends": ("triton", "cuda"),
    "Programs": ("demo", "ablations", "app", "benchmarks", "wheels"),
    "Results": (
        *(
            "results/ops",
            "results/ops_avx2",
            "results/ops_amx",
            "results/scaling",
            "results/end_to_end",
            "results/gpu",
            "results/gpu_losses",
        ),
        "../benchmarks/results/host_time_epyc_zen4_2_threads",
    ),
    "API": ("api/deco_kernels", "api/ops", "api/model", "api/flow", "api/integrations", "api/testing"),
}
RESULTS = {
    "ops": ("Ops", "cpu_epyc_zen4_2_threads.json"),
    "ops_avx2": ("Ops held to AVX2", "cpu_epyc_zen4_held_to_avx2_2_threads.json"),
    "ops_amx": ("Ops with AMX", "cpu_xeon_amx_2_threads.json"),
    "scaling": ("Scaling", "cpu_epyc_zen4_2_threads_scaling.json"),
    "end_to_end": ("End to end", "cpu_epyc_zen4_2_threads_end_to_end.json"),
    "gpu": ("Ops and training on a GPU", "gpu_h200.json"),
    "gpu_losses": ("Losses on a GPU", "gpu_h200_losses.json"),
}
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Shape", "Parameters")


def write_results(app):
    """Pages of the committed results, as `python -m benchmarks report` prints them."""
    folder = ROOT / "docs" / "results"
    folder.mkdir(exist_ok=True)
    for name, (title, file) in RESULTS.items():
        text = tables.markdown(results.merge([results.load(str(ROOT / "benchmarks" / "results" / file))]))
        head = f"# {title}: {text.partition(' on ')[2].partition(chr(10))[0]}"
        (folder / f"{name}.md").write_text("\n".join((head, *text.splitlines()[1:])), encoding="utf-8")


def add_contents(app, name, source):
    """Adds the table of contents to the front page, whose file is the README of the repository."""
    if name == root_doc:
        for caption, pages in CHAPTERS.items():
            entries = "\n".join(f"/docs/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
        source[0] += "\n```{toctree}\n:hidden:\n:caption: Project\n\n/CONTRIBUTING\n/CHANGELOG\n/SECURITY\n```\n"


def docstring_to_rst(app, what, name, thing, options, lines):
    """Docstrings are plain text: their indented formulas become literal blocks, and * and | are no markup, nor is
    the letter at the beginning of a description, as in "width: D.", the number of an item."""
    text = "\n".join(lines)
    heads = "|".join(SECTIONS)
    text = re.sub(rf"(?m)^(?!\s*(?:{heads}):$)(\s*)(.*\S):\n\n((?:\1    .*\n?|\n)+)", r"\1\2::\n\n\3", text)
    outside = [
        part if index % 2 else re.sub(r"([*|\\]|(?<=: )[A-Za-z]\.(?=\s|$))", r"\\\1", part, flags=re.MULTILINE)
        for index, part in enumerate(split_literal(text))
    ]
    lines[:] = "".join(outside).splitlines()


def split_literal(text):
    """Parts of a docstring, alternately outside and inside of code: `...` and blocks after `::`."""
    return re.split(r"(`[^`]*`|(?<=::\n\n)(?:[ ]+.*\n?|\n)+)", text)


def forward_front_page(app, error):
    if error is None and app.builder.format == "html":
        target = f"{root_doc}.html"
        (Path(app.outdir) / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={target}">')


def setup(app):
    app.connect("builder-inited", write_results)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=100)
    app.connect("build-finished", forward_front_page)
