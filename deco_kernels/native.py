"""Loads the native modules at first use and reports why one is missing or broken."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ISA_VARIABLE = "DECO_KERNELS_CPU_ISA"
UPSAMPLE_VARIABLE = "DECO_KERNELS_CPU_UPSAMPLE"
UPSAMPLES = ("auto", "kernel", "pytorch")

CPU_FUNCTIONS = (
    "usable_isas",
    "current_isa",
    "select_isa",
    "vector_lanes",
    "has_amx_bf16",
    "adaln_block_forward",
    "adaln_block_backward",
    "pixel_decoder_forward",
    "pixel_decoder_backward",
    "pixel_decoder_from_tokens_forward",
    "pixel_decoder_loss",
    "upsample_forward",
    "upsample_backward",
    "upsample_modulate_forward",
    "modulate_forward",
    "modulate_backward",
    "flow_matching_loss_forward",
    "flow_matching_loss_backward",
)
"""Functions of the native CPU module that the package calls; a module built from older sources may lack some."""

CUDA_FUNCTIONS = (
    "problem",
    "padded_rows",
    "adaln_block_forward",
    "adaln_block_backward",
    "modulate_forward",
    "modulate_backward",
    "pixel_decoder_forward",
    "pixel_decoder_backward",
    "pixel_decoder_loss",
    "flow_matching_loss_forward",
    "flow_matching_loss_backward",
    "loss_keeps_gradient",
    "scaled_product",
)
"""The same of the native CUDA module, and padded_rows, which those lack whose decoder keeps no activations."""


@lru_cache(maxsize=1)
def load_cpu() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason why it cannot be used). Reads the environment once."""
    import torch  # noqa: F401  loads the OpenMP runtime that the kernels share

    try:
        module = importlib.import_module("deco_kernels._native_cpu")
    except ImportError as error:
        return None, (
            f"the native CPU module deco_kernels._native_cpu cannot be imported ({error}). Build it with a C++17 "
            "compiler: `DECO_KERNELS_BUILD=cpu pip install .`, or `python setup.py build_ext --inplace` in a checkout"
        )
    reason = _older_reason(module, "cpu", CPU_FUNCTIONS)
    if reason is not None:
        return None, reason
    isa = os.environ.get(ISA_VARIABLE, "").strip()
    if isa:
        try:
            module.select_isa(isa)
        except ValueError as error:
            return None, f"{ISA_VARIABLE}={isa}: {error}"
    upsample = os.environ.get(UPSAMPLE_VARIABLE, "").strip()
    if upsample:
        try:
            select_upsample(upsample)
        except ValueError as error:
            return None, f"{UPSAMPLE_VARIABLE}={upsample}: {error}"
    return module, None


def _older_reason(module: ModuleType, kind: str, functions: tuple[str, ...]) -> str | None:
    """Reason why a module that lacks one of these functions cannot be used, with remedy, or None."""
    missing = [name for name in functions if not hasattr(module, name)]
    if not missing:
        return None
    return (
        f"the native {kind.upper()} module {module.__file__} is older than the package: it lacks {', '.join(missing)}. "
        f"Rebuild it: `DECO_KERNELS_BUILD={kind} pip install .`, or `python setup.py build_ext --inplace` in a checkout"
    )


def cpu() -> ModuleType:
    """The native CPU module. Raises ImportError with reason and remedy if it cannot be used."""
    module, reason = load_cpu()
    if module is None:
        raise ImportError(reason)
    return module


def cpu_unavailable_reason() -> str | None:
    """Reason why `cpu()` raises, or None if it does not."""
    return load_cpu()[1]


_upsample = "auto"


def select_upsample(name: str) -> None:
    """Select the matmul of all later bfloat16 upsamples on the CPU.

    "kernel": the package's. "pytorch": PyTorch's. "auto": PyTorch's where this process has AMX for
    bfloat16, the selected kernels do not use it, and the sizes fit it (`upsamples_in_pytorch`).

    Raises ValueError for other names.
    """
    global _upsample
    if name not in UPSAMPLES:
        raise ValueError(f"unknown matmul {name!r}; use one of {', '.join(UPSAMPLES)}")
    _upsample = name


def current_upsample() -> str:
    """The name that `select_upsample` received last."""
    return _upsample


def upsamples_in_pytorch(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether upsamples of tokens in this dtype run in PyTorch's matmul. sizes: Z and P·D.

    On AMX, PyTorch's matmul multiplies what lies behind rows of other sizes than multiples of 32 by zero: a NaN or an
    infinity there, such as in the next row, becomes NaN in the result (seen with PyTorch 2.13).
    """
    import torch

    module = cpu()
    if dtype is not torch.bfloat16 or _upsample == "kernel":
        return False
    if _upsample == "pytorch":
        return True
    only_pytorch_has_amx = module.has_amx_bf16() and module.current_isa() != "amx"
    return only_pytorch_has_amx and all(size % 32 == 0 for size in sizes)


# --- CUDA ------------------------------------------------------------------------------------------------------------

_emulated_cuda: ModuleType | None = None


@lru_cache(maxsize=1)
def load_cuda() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason why it cannot be used). The import needs neither a driver nor a GPU."""
    try:
        module = importlib.import_module("deco_kernels._native_cuda")
    except ImportError as error:
        return None, (
            f"the native CUDA module deco_kernels._native_cuda cannot be imported ({error}). Build it with nvcc on "
            "PATH: `DECO_KERNELS_BUILD=cuda pip install .`, or `python setup.py build_ext --inplace` in a checkout"
        )
    reason = _older_reason(module, "cuda", CUDA_FUNCTIONS)
    return (module, None) if reason is None else (None, reason)


def cuda(device: torch.device) -> ModuleType:
    """The module that runs CUDA kernels on `device`: the native one, or on the CPU the module set by `emulate_cuda`.

    Raises ImportError with reason and remedy if no such module can be used.
    """
    if device.type == "cpu":
        if _emulated_cuda is None:
            raise ImportError("CUDA kernels run on the CPU only through the emulator; call emulate_cuda first")
        return _emulated_cuda
    module, reason = load_cuda()
    if module is None:
        raise ImportError(reason)
    return module


def cuda_unavailable_reason() -> str | None:
    """Reason why `cuda()` raises for a CUDA device, or None if it does not."""
    return load_cuda()[1]


def emulate_cuda(module: ModuleType) -> None:
    """Run CUDA kernels on CPU tensors through `module`, which has the functions of _native_cuda; for tests."""
    global _emulated_cuda
    _emulated_cuda = module
