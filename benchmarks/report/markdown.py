"""Helpers for the Markdown of all parts."""

from benchmarks.names import AUTOTUNED, BACKWARD_ALONE, BEST_EAGER, COMPILED, LIGER, LIMIT, PUBLISHED, TRAINING

_TITLES = {
    PUBLISHED: "published eager",
    BEST_EAGER: "best eager",
    COMPILED: "published, torch.compile",
    AUTOTUNED: "published, torch.compile max-autotune",
    LIGER: "Liger-Kernel",
    LIMIT: "limit: without decoder and loss",
    BACKWARD_ALONE: "backward kernel only",
    TRAINING: "forward and backward",
}


def title_of(name: str) -> str:
    """Readable name of a contender or pass."""
    return _TITLES.get(name, name)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Markdown table; the first column is left-aligned text, the others are numbers. Empty without lines."""
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def section(head: str, body: str, notes: list[str]) -> str:
    """A heading, its body, and notes as a list."""
    return "\n\n".join(part for part in (head, body, "\n".join(f"- {note}" for note in notes)) if part)


def refusal_of(row: dict) -> str:
    """Why a row has no time among the others; a wrong contender's time follows."""
    return f"{row['status']}: {row['reason']}" + (f"; {row['ms']:.3g} ms" if "ms" in row else "")


def ratio(reference: float | None, value: float) -> str:
    return "–" if reference is None else f"{reference / value:.2f}"


def size_text(size: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in size.items())
