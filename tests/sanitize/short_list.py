"""Runs the ops, forward and backward, in a sanitized module: python -m tests.sanitize.short_list PART MODULE.

PART is "cpu" (every instruction set, on two threads), "threads" (the fastest one, on two and four threads) or
"emulated" (the CUDA kernels). The cases have one width per dtype, patches that leave tiles unfilled, images of odd
sides, views and an empty batch. With --plant, a weight of one call ends before its shape says, or with "threads" all
rows of a result are one row: the sanitizer must stop the process.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from deco_kernels import native, testing
from deco_kernels.backends import arguments
from deco_kernels.testing import emulation
from deco_kernels.testing.inputs import KEEPS_COND, SAVE_MEMORY

CASES = (
    dict(dtype=torch.float32, width=16, depth=2, patch_size=4, image_size=(1, 12, 20), channels=4),
    dict(dtype=torch.bfloat16, width=32, depth=1, patch_size=1, image_size=(1, 7, 11)),
    dict(dtype=torch.float16, width=64, depth=2, patch_size=8, image_size=(1, 8, 16), channels=1),
    dict(dtype=torch.float32, width=32, depth=1, patch_size=4, image_size=(0, 8, 8)),
)
THREADS_CASES = (
    dict(dtype=torch.float32, width=16, depth=2, patch_size=4, image_size=(2, 28, 36)),
    dict(dtype=torch.bfloat16, width=32, depth=1, patch_size=2, image_size=(1, 30, 38)),
)
EMULATED_CASES = (
    dict(dtype=torch.bfloat16, width=16, depth=2, patch_size=4, image_size=(1, 12, 20), channels=4),
    dict(dtype=torch.bfloat16, width=16, depth=1, patch_size=1, image_size=(1, 7, 11)),
    dict(dtype=torch.bfloat16, width=16, depth=1, patch_size=8, image_size=(2, 8, 24)),
    dict(dtype=torch.bfloat16, width=16, depth=1, patch_size=4, image_size=(0, 8, 8)),
)


def load(path: str) -> None:
    """The module in place of the CPU module that is installed."""
    name = "deco_kernels._native_cpu"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def as_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with other strides."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def run_cases(cases, backend: str, ops=testing.OPS) -> None:
    """Every op on the tensors of a case, and on views of them with the other choice of `save_memory`."""
    for op in ops:
        for case in cases:
            case = {**case, "channels": 3} if "loss" in op else case
            inputs = testing.random_inputs(op, token_width=9, **case)
            views = {name: as_view(tensor) for name, tensor in inputs.tensors.items()}
            choice = {"save_memory": op == "upsample_modulate"} if op in SAVE_MEMORY else {}
            testing.run(inputs, backend)
            testing.run(inputs._replace(tensors=views, options=inputs.options | choice), backend)


def run_cpu() -> None:
    torch.set_num_threads(2)
    for isa in native.cpu().usable_isas():
        native.cpu().select_isa(isa)
        run_cases(CASES, "cpu")
        native.select_upsample("pytorch")
        run_cases(CASES[1:2], "cpu", KEEPS_COND)
        native.select_upsample("auto")
        print("passed:", isa)


def run_threads() -> None:
    for threads in (2, 4):
        torch.set_num_threads(threads)
        run_cases(THREADS_CASES, "cpu")
        print("passed:", threads, "threads")


def plant_overread(case: dict, backend: str) -> None:
    inputs = testing.random_inputs("adaln_block", **case)
    storage = inputs.tensors["fc1_weight"].untyped_storage()
    storage.resize_(storage.nbytes() - 256)
    testing.run(inputs, backend)


def plant_race() -> None:
    """Two threads write to one row of memory, which the strides of the result give for every row."""
    inputs = testing.random_inputs("adaln_block", **THREADS_CASES[0])
    h, cond, *weights = inputs.tensors.values()
    out = torch.empty(1, h.shape[1]).expand_as(h)
    rows = [arguments.rows(tensor) for tensor in (h, cond)]
    sizes = arguments.row_sizes(h)
    native.cpu().adaln_block_forward(*sizes, *rows, arguments.arrays(weights), arguments.rows(out), 1e-6, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("cpu", "threads", "emulated"))
    parser.add_argument("module")
    parser.add_argument("--plant", action="store_true")
    given = parser.parse_args()
    if given.part == "emulated":
        emulation.use(emulation.load(Path(given.module)))
        if given.plant:
            plant_overread(EMULATED_CASES[0], emulation.BACKEND)
        else:
            run_cases(EMULATED_CASES, emulation.BACKEND)
        return
    load(given.module)
    if given.part == "cpu":
        plant_overread(CASES[0], "cpu") if given.plant else run_cpu()
    else:
        plant_race() if given.plant else run_threads()


if __name__ == "__main__":
    main()
