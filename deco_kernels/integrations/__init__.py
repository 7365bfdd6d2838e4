"""Fused ops in existing models."""

from __future__ import annotations

from deco_kernels.lazy import lazy_names

_MODULE_OF = {
    "Swap": "swap",
    "is_swapped": "swap",
    "swap_decoder": "swap",
    "undo_swap": "swap",
}

__all__ = list(_MODULE_OF)

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
