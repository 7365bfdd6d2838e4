"""Queries on the rows of a result: groups, medians, shares of the ceilings, curves."""

from benchmarks.names import BACKWARD_ALONE, BEST_EAGER, COMPILE_MODES, PUBLISHED, TRAINING

FLAT_FROM = {"cpu": 65_536, "cuda": 2_097_152}  # from this number of pixels on, time per pixel is expected to be flat
EAGER = (PUBLISHED, BEST_EAGER, *COMPILE_MODES)


def pixels_of(row: dict) -> int:
    return row["size"]["batch"] * row["size"]["height"] * row["size"]["width"]


def curves(result: dict) -> dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]]:
    """{(op, dtype, pass): {contender: [(pixels, ns per pixel), sorted]}} of the scaling rows."""
    found: dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in result["scaling"]:
        if row["status"] == "ok" and row["pass"] != BACKWARD_ALONE:
            of_group = found.setdefault((row["op"], row["dtype"], row["pass"]), {})
            pixels = pixels_of(row)
            of_group.setdefault(row["contender"], []).append((pixels, 1e6 * row["ms"] / pixels))
    return {key: {name: sorted(points) for name, points in group.items()} for key, group in found.items()}


def flatness(points: list[tuple[int, float]], device: str) -> float | None:
    """Largest over smallest time per pixel at FLAT_FROM pixels or more; None with fewer than two such sizes."""
    times = [time for pixels, time in points if pixels >= FLAT_FROM[device]]
    return max(times) / min(times) if len(times) > 1 else None


def groups(rows: list[dict]) -> list[list[dict]]:
    """Groups of rows that were timed interleaved, in the order of the file."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        together = TRAINING if row["pass"] == BACKWARD_ALONE else row["pass"]
        key = (row["op"], tuple(row["size"].items()), row["dtype"], together, row["forced_instruction_set"])
        found.setdefault(key, []).append(row)
    return list(found.values())


def eager_medians(rows: list[dict]) -> tuple[float | None, float | None]:
    """Milliseconds of the published and of the best eager formulation in a group; without a separate best formulation,
    both are the published one."""
    medians = {row["contender"]: row["ms"] for row in rows if row["status"] == "ok" and row["pass"] != BACKWARD_ALONE}
    return medians.get(PUBLISHED), medians.get(BEST_EAGER, medians.get(PUBLISHED))


def memory_cases(rows: list[dict]) -> list[list[dict]]:
    """Rows of peak memory with the same op and pixels."""
    cases: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["pixels"]), []).append(row)
    return list(cases.values())


def share_of_ceiling(row: dict, ceilings: dict) -> tuple[float, str]:
    """Percent of the speed that the measured ceilings allow, and the binding ceiling: "memory" or "compute"."""
    memory = row["bytes"] / ceilings["bytes_per_s"]
    compute = row["flops"] / ceilings["flops"][row["arithmetic"]]
    return 100 * max(memory, compute) / (row["ms"] / 1e3), "memory" if memory > compute else "compute"


def end_to_end_groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by (preset, pass, batch, image size, dtype, steps)."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["preset"], row["pass"], row["batch"], row["image_size"], row["dtype"], row.get("steps"))
        groups.setdefault(key, []).append(row)
    return groups
