"""The fused ops inside models that somebody else has built."""

from __future__ import annotations

import importlib

_MODULE_OF = {
    "Swap": "swap",
    "is_swapped": "swap",
    "swap_decoder": "swap",
    "undo_swap": "swap",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
