"""`--compare OLD.json`: rows that moved beyond the spread between two results."""

from benchmarks.report.markdown import table, title_of

_KEYS = ("op", "dtype", "pass", "contender", "forced_instruction_set")
AGREEMENT = 0.05  # maximum relative difference of the medians between two runs of one commit
_MACHINE = ("processor", "gpu", "threads", "instruction_set", "kept_heap", "torch", "triton", "driver")


def moved(old: dict, new: dict) -> tuple[list[tuple[dict, dict]], int]:
    """Pairs (old row, new row) whose ranges from the 20th to the 80th percentile do not overlap, and the number of rows
    compared."""
    before = {key_of(row): row for row in _timed(old)}
    pairs = [(before[key_of(row)], row) for row in _timed(new) if key_of(row) in before]
    return [pair for pair in pairs if _apart(*pair)], len(pairs)


def mark_unstable(old: dict, new: dict) -> None:
    """Marks rows of `new` whose median differs from `old` by more than AGREEMENT, if both ran the same clean commit."""
    commit = new["header"].get("commit")
    if commit is None or commit.endswith("-dirty") or commit != old["header"].get("commit"):
        return
    before = {key_of(row): row for row in _timed(old)}
    for row in _timed(new):
        was = before.get(key_of(row))
        if was and abs(row["ms"] / was["ms"] - 1) > AGREEMENT:
            row["unstable"] = True


def markdown(old: dict, new: dict) -> str:
    pairs, compared = moved(old, new)
    names = f"{old['header'].get('commit')} ({old['header'].get('date')})"
    lines = [f"## Against {names}", ""]
    for field in _MACHINE:
        one, other = (result["header"].get(field) for result in (old, new))
        if one != other:
            lines.append(f"- not the same {field.replace('_', ' ')}: {one} then, {other} now")
    lines.append(f"- {len(pairs)} of {compared} rows moved beyond the spread")
    if not pairs:
        return "\n".join(lines) + "\n"
    cells = [
        [
            f"{row['op']}, {row['dtype']}, {title_of(row['pass'])}: {title_of(row['contender'])}",
            ",".join(str(value) for value in row["size"].values()),
            f"{was['ms']:.3g}",
            f"{row['ms']:.3g}",
            f"{100 * (row['ms'] / was['ms'] - 1):+.0f} %",
        ]
        for was, row in sorted(pairs, key=lambda pair: pair[1]["ms"] / pair[0]["ms"])
    ]
    return "\n".join([*lines, "", table(["row", "B,H,W,C,p,D,N,Z", "ms then", "ms now", "time"], cells)]) + "\n"


def _timed(result: dict) -> list[dict]:
    return [row for row in result["rows"] if row["status"] == "ok"]


def key_of(row: dict) -> tuple:
    """What a row measures."""
    return (*(row[key] for key in _KEYS), tuple(row["size"].items()))


def _apart(one: dict, other: dict) -> bool:
    return one["ms_p80"] < other["ms_p20"] or other["ms_p80"] < one["ms_p20"]
