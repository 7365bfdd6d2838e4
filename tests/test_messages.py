"""Errors say what to do: a remedy follows what was expected and given."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "deco_kernels/flow",
    "deco_kernels/integrations",
    "deco_kernels/model",
    "deco_kernels/training",
    "python/evaluation",
)
FILES = [*(path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))), ROOT / "python/evaluate.py"]
REMEDIES = ("; ", ": pip install", ". Without a network", ". Earlier checkpoints", ". Lower optimizer.lr")
QUOTED = ("the steps ", "no image is stored", "expected an image file", "{image.width}x")  # reasons inside other errors


def text_of(node: ast.expr) -> str:
    """The text of a message; "{expression}" for its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else f"{{{ast.unparse(getattr(node, 'value', node))}}}"


def without_remedy(source: str) -> list[str]:
    """Messages of `raise` that state none, with their lines."""
    raised = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    calls = [node.exc for node in raised if isinstance(node.exc, ast.Call)]
    written = (ast.Constant, ast.JoinedStr, ast.BinOp)
    messages = [(call.lineno, text_of(text)) for call in calls for text in call.args[:1] if isinstance(text, written)]
    return [f"{line}: {text}" for line, text in messages if not states_remedy(text)]


def states_remedy(text: str) -> bool:
    """Also for a message that ends with that of another error."""
    *_, last = text.rpartition("{")
    ends_with_another = last.endswith("}") and ("error" in last or "reason" in last)
    return text.startswith(QUOTED) or ends_with_another or any(remedy in text for remedy in REMEDIES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_errors_say_what_to_do(path):
    assert not without_remedy(path.read_text(encoding="utf-8"))


def test_a_message_without_remedy_is_found():
    source = 'raise ValueError(f"n: expected 1, got {n}")\nraise ValueError(f"n: expected 1, got {n}; pass 1")\n'
    assert without_remedy(source) == ["1: n: expected 1, got {n}"]
