"""Result files: one JSON object, described in docs/benchmarks.md."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator

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
    result = read(path)
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result of `python -m benchmarks --output` (format {FORMAT})")
    return _empty_parts() | result


def read(path: str) -> object:
    """The content of a JSON file. Raises OSError, or ValueError that names the file."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:  # also of the encoding
            raise ValueError(f"{path}: not a JSON file ({error})") from error


@contextlib.contextmanager
def fields_of(path: str, command: str) -> Iterator[None]:
    """Around what uses the fields of a file: ValueError that names it and the command that writes such files, if one
    is missing or of another kind."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a result of `{command}`, or of another version ({what})") from error


def save(result: dict, path: str) -> None:
    """Writes the result of a run without its empty parts."""
    write({name: part for name, part in result.items() if part or name not in _empty_parts()}, path)


def write(result: dict, path: str) -> None:
    """Writes the file atomically, so that an interrupted run leaves the last complete state."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(partial, path)


def publish(result: dict, text: str, path: str | None) -> None:
    """Writes the result of a command, if a file is named, and prints its report."""
    if path:
        write(result, path)
    print(text)


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
