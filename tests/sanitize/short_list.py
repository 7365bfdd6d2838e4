"""Runs every op, forward and backward, in a sanitized native CPU module: python -m tests.sanitize.short_list MODULE.

One width per dtype, patches that leave tiles unfilled, images of odd sides, views and an empty batch, on two threads.
With --plant, the weights of one call end before their shape says: the sanitizer must stop the process.
"""

import argparse
import importlib.util
import sys

import torch

from deco_kernels import testing

CASES = (
    dict(dtype=torch.float32, width=16, depth=2, patch_size=4, image_size=(1, 12, 20), channels=4),
    dict(dtype=torch.bfloat16, width=32, depth=1, patch_size=1, image_size=(1, 7, 11)),
    dict(dtype=torch.float16, width=64, depth=3, patch_size=8, image_size=(1, 8, 24), channels=1),
    dict(dtype=torch.float32, width=32, depth=1, patch_size=4, image_size=(0, 8, 8)),
)


def load(path: str) -> None:
    """The module in place of the one that is installed."""
    name = "deco_kernels._native_cpu"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def as_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with other strides."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--plant", action="store_true")
    arguments = parser.parse_args()
    load(arguments.module)
    from deco_kernels import native

    torch.set_num_threads(2)
    if arguments.plant:
        inputs = testing.random_inputs("adaln_block", **CASES[0])
        storage = inputs.tensors["fc1_weight"].untyped_storage()
        storage.resize_(storage.nbytes() - 256)
        testing.run(inputs, "cpu")
        return
    for isa in native.cpu().usable_isas():
        native.cpu().select_isa(isa)
        for op in testing.OPS:
            for case in CASES:
                if "loss" in op:
                    case = {**case, "channels": 3}
                inputs = testing.random_inputs(op, token_width=9, **case)
                views = {name: as_view(tensor) for name, tensor in inputs.tensors.items()}
                testing.run(inputs, "cpu")
                testing.run(inputs._replace(tensors=views), "cpu")
        print("passed:", isa)


if __name__ == "__main__":
    main()
