"""Libraries to link with, so that a module built here runs on an older glibc.

glibc keeps the old versions of its symbols; the linker takes the newest. The libraries written here define, without
code, the symbols of this machine's glibc in their newest version up to a limit, and the linker records that version.
Modules link libstdc++ statically, which keeps no versions that GCC's headers of today would do with.
"""

import re
import subprocess
from pathlib import Path

LIBRARIES = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1")

# What the static libstdc++ of a newer glibc needs: false makes it count references atomically.
NEWER = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'

SYMBOL = re.compile(r"(?P<size>\S+) +(?P<type>FUNC|IFUNC|OBJECT|TLS) .* (?P<name>[^ @]+)@@?GLIBC_(?P<version>[\d.]+)$")


def version_number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def file_of(name: str) -> str:
    """Path of a file in the compiler's folders of libraries."""
    return output_of("g++", f"-print-file-name={name}").strip()


def symbols_of(library: str, newest: str) -> dict[str, re.Match[str]]:
    """Name → line of the symbol's newest version up to `newest`."""
    chosen: dict[str, re.Match[str]] = {}
    for line in output_of("readelf", "--wide", "--dyn-syms", library).splitlines():
        found = SYMBOL.search(line)
        if found is None or " UND " in line or version_number(found["version"]) > version_number(newest):
            continue
        earlier = chosen.get(found["name"])
        if earlier is None or version_number(earlier["version"]) < version_number(found["version"]):
            chosen[found["name"]] = found
    return chosen


def definition(index: int, symbol: re.Match[str]) -> str:
    section, kind = {
        "OBJECT": (".bss", "object"),
        "TLS": ('.section .tbss,"awT",%nobits', "tls_object"),
    }.get(symbol["type"], (".text", "function"))
    size = max(1, int(symbol["size"], 0))
    return (
        f"{section}\n.globl s{index}\n.type s{index}, %{kind}\n.size s{index}, {size}\ns{index}: .zero {size}\n"
        f".symver s{index}, {symbol['name']}@@@GLIBC_{symbol['version']}\n"
    )


def write_library(name: str, newest: str, folder: Path) -> None:
    """Write `folder`/`name`, a shared library without code with the symbols of this machine's."""
    symbols = symbols_of(file_of(name), newest).values()
    versions = sorted({symbol["version"] for symbol in symbols}, key=version_number)
    script, source = folder / f"{name}.map", folder / f"{name}.s"
    script.write_text("".join(f"GLIBC_{version} {{}};\n" for version in versions))
    source.write_text("".join(definition(*item) for item in enumerate(symbols)))
    link = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name},--version-script,{script}", source]
    subprocess.run([*link, "-o", folder / name], check=True)


def linker_flags(newest: str, folder: Path) -> str:
    """Write the libraries to `folder`; flags that link a module with them, for glibc `newest` or later."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        write_library(name, newest, folder)
    subprocess.run(["gcc", "-xc", "-c", "-fPIC", "-", "-o", folder / "newer.o"], input=NEWER, text=True, check=True)
    subprocess.run(["ar", "rcs", folder / "libnewer.a", folder / "newer.o"], check=True)
    static = f"{folder / 'libnewer.a'} {file_of('libc_nonshared.a')}"
    loader = file_of("ld-linux-x86-64.so.2")
    (folder / "libc.so").write_text(f"GROUP({folder / 'libc.so.6'} {static} AS_NEEDED({loader}))\n")
    for name in LIBRARIES[1:]:
        (folder / f"{name.split('.')[0]}.so").write_text(f"INPUT({folder / name})\n")
    # Before 2.34 these functions were in libraries of their own.
    own = "-Wl,--no-as-needed -ldl -lpthread -lrt -Wl,--as-needed"
    return f"-L{folder} -static-libstdc++ -Wl,--gc-sections,--exclude-libs,ALL {own}"
