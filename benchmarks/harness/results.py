"""Result files: one JSON object, described in docs/benchmarks.md."""

import csv
import json
import os

FORMAT = 1
LISTS = ("rows", "memory", "overhead", "scaling", "end_to_end", "kernels", "left_out")


def empty(header: dict, ceilings: dict) -> dict:
    return {"format": FORMAT, "header": header, "ceilings": ceilings, **_empty_parts()}


def _empty_parts() -> dict:
    return {**{name: [] for name in LISTS}, "import_time": None}


def load(path: str) -> dict:
    """Loads a result file; missing parts are empty.

    Raises:
        OSError: the file cannot be read. ValueError: it is not a result of this format.
    """
    with open(path, encoding="utf-8") as file:
        try:
            result = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result of `python -m benchmarks --output` (format {FORMAT})")
    return _empty_parts() | result


def save(result: dict, path: str) -> None:
    """Writes the file atomically, so that an interrupted run leaves the last complete state. Omits empty parts."""
    kept = {name: part for name, part in result.items() if part or name not in _empty_parts()}
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(kept, file, indent=1)
        file.write("\n")
    os.replace(partial, path)


def save_csv(result: dict, path: str) -> None:
    """Writes every row of every part as one line of CSV: the part, then the fields, those of objects with a dot."""
    rows = [{"part": part} | _flat(row) for part in LISTS if part != "left_out" for row in result[part]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: dict) -> dict:
    found: dict = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": each for inner, each in _flat(value).items()}
        else:
            found[name] = value
    return found


def merge(results: list[dict]) -> dict:
    """Merges runs on one machine: the first header, the highest ceilings, all rows. The header's `command` joins the
    commands of all runs."""
    merged = dict(results[0])
    commands = dict.fromkeys(result["header"].get("command") for result in results)
    merged["header"] = merged["header"] | {"command": "; ".join(filter(None, commands))}
    for result in results[1:]:
        merged["ceilings"] = best_of(merged["ceilings"], result["ceilings"])
        for name in LISTS:
            merged[name] = merged[name] + result[name]
        merged["import_time"] = merged["import_time"] or result["import_time"]
    return merged


def best_of(first: dict, second: dict) -> dict:
    """The higher of two measurements of every ceiling, because load on the machine lowers them."""
    found = {**second, **first}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        found[name] = best_of(one, other) if isinstance(one, dict) else max(one, other)
    return found
