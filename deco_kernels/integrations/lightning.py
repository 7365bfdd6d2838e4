"""A Lightning callback that swaps the fused decoder into the models of a LightningModule. Needs `lightning`."""

from __future__ import annotations

import importlib.util

from torch import nn

from deco_kernels.integrations.swap import is_swapped, swap_decoder, undo_swap

if importlib.util.find_spec("lightning") is not None:
    from lightning.pytorch import Callback
elif importlib.util.find_spec("pytorch_lightning") is not None:
    from pytorch_lightning import Callback
else:
    raise ImportError(
        "deco_kernels.integrations.lightning needs Lightning; install it with `pip install lightning`, or call "
        "deco_kernels.integrations.swap_decoder on the model"
    )


class SwapDecoder(Callback):
    """Runs the per-pixel decoders of a LightningModule through the fused ops, from `setup` to `teardown`.

    An exception that ends the run undoes the swaps too. `setup` runs before the strategy wraps the module in DDP or
    FSDP. In a configuration file:

        trainer:
          callbacks:
            - class_path: deco_kernels.integrations.lightning.SwapDecoder
              init_args:
                modules: [denoiser, ema_denoiser]

    Args:
        modules: names of the models in the LightningModule, dotted if nested; by default every module that has an
            `x_embedder` and a `dec_net`.
        save_memory, backend: see `deco_kernels.integrations.swap_decoder`.

    `setup` raises AttributeError for an unknown name, ValueError if no model of the published structure is found, and
    the errors of `swap_decoder`.
    """

    def __init__(self, modules: list[str] | None = None, save_memory: bool = False, backend: str | None = None):
        self.modules, self.save_memory, self.backend = modules, save_memory, backend

    def setup(self, trainer: object, pl_module: nn.Module, stage: str) -> None:
        """Swap the decoders."""
        for model in self._models(pl_module):
            swap_decoder(model, save_memory=self.save_memory, backend=self.backend)

    def teardown(self, trainer: object, pl_module: nn.Module, stage: str) -> None:
        """Undo the swaps, including those in copies made after `setup`."""
        for module in list(pl_module.modules()):
            if is_swapped(module):
                undo_swap(module)

    def on_exception(self, trainer: object, pl_module: nn.Module, exception: BaseException) -> None:
        """Undo the swaps: no `teardown` follows."""
        self.teardown(trainer, pl_module, "")

    def _models(self, pl_module: nn.Module) -> list[nn.Module]:
        if self.modules is not None:
            return [pl_module.get_submodule(name) for name in self.modules]
        found = [m for m in pl_module.modules() if hasattr(m, "x_embedder") and hasattr(m, "dec_net")]
        if not found:
            raise ValueError(
                f"SwapDecoder: expected a model with x_embedder and dec_net in {type(pl_module).__name__} at setup, "
                "found none; build the model in __init__, or name it in `modules`"
            )
        return found
