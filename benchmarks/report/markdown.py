"""What the Markdown of all parts shares."""

from benchmarks.names import AUTOTUNED, BACKWARD_ALONE, BEST_EAGER, COMPILED, LIGER, LIMIT, PUBLISHED, TRAINING

_TITLES = {
    PUBLISHED: "published eager",
    BEST_EAGER: "best eager",
    COMPILED: "published, torch.compile",
    AUTOTUNED: "published, torch.compile max-autotune",
    LIGER: "Liger-Kernel",
    LIMIT: "limit: decoder and loss left out",
    BACKWARD_ALONE: "backward kernel alone",
    TRAINING: "forward and backward",
}


def title_of(name: str) -> str:
    """A contender or pass in words."""
    return _TITLES.get(name, name)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """The first column is text, the others are figures. Empty without lines."""
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def section(head: str, body: str, notes: list[str]) -> str:
    """A heading, what stands under it, and notes as a list."""
    return "\n\n".join(part for part in (head, body, "\n".join(f"- {note}" for note in notes)) if part)


def ratio(reference: float | None, value: float) -> str:
    return "–" if reference is None else f"{reference / value:.2f}"


def size_text(size: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in size.items())
