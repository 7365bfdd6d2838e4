"""The Lightning callback, configured from a file, in a two-step training run under DDP."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from deco_kernels import ops
from deco_kernels.integrations import is_swapped
from tests.installed import installed
from tests.integrations.published import published_model
from tests.random_models import random_batch

lightning = installed("lightning.pytorch")
installed("jsonargparse")

CONFIG = """
seed_everything: false
trainer:
  accelerator: cpu
  devices: 1
  strategy: ddp
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: deco_kernels.integrations.lightning.SwapDecoder
      init_args:
        {options}
"""


class Training(lightning.LightningModule):
    """A model and its averaged copy, as in the published training program; the loss in three lines."""

    def __init__(self):
        super().__init__()
        self.denoiser = published_model()
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.register_buffer("frequency_weight", ops.jpeg_frequency_weight(85), persistent=False)
        self.swapped = []

    def training_step(self, batch, _):
        x, t, y = batch
        pred = self.denoiser(x, t, y)
        self.swapped.append((is_swapped(self.denoiser), is_swapped(self.ema_denoiser)))
        total, pixel, frequency = ops.flow_matching_loss(pred, torch.zeros_like(pred), self.frequency_weight)
        return total

    def configure_optimizers(self):
        return torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*random_batch(4, 32, 32)), batch_size=2)


@pytest.fixture
def process_group_of_its_own():
    """Cleans up the process group and environment variables that Lightning sets in this process."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def fit(tmp_path, options: str) -> Training:
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(options=options))
    cli = LightningCLI(Training, save_config_callback=None, args=["fit", "--config", str(config)])
    return cli.model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group_of_its_own")
@pytest.mark.parametrize(
    ("options", "expected"),
    [("modules: [denoiser]", (True, False)), ("save_memory: true", (True, True))],
)
def test_callback_from_a_configuration_file(tmp_path, options, expected):
    net = fit(tmp_path, options)
    assert net.swapped == [expected] * 2
    assert not is_swapped(net.denoiser) and not is_swapped(net.ema_denoiser)
    assert list(net.denoiser.state_dict()) == list(published_model().state_dict())
    pairs = zip(net.denoiser.parameters(), published_model().parameters(), strict=True)
    assert not any(torch.equal(trained, initial) for trained, initial in pairs)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_an_exception_ends_leaves_no_swapped_model():
    from deco_kernels.integrations.lightning import SwapDecoder

    class Interrupted(Training):
        def training_step(self, batch, index):
            assert is_swapped(self.denoiser)
            raise ZeroDivisionError

    net = Interrupted()
    for _ in range(2):
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        options = dict(accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=SwapDecoder())
        trainer = lightning.Trainer(**options, **quiet)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(net)
        assert not is_swapped(net.denoiser) and not is_swapped(net.ema_denoiser)


def test_a_module_without_a_model_is_refused():
    from deco_kernels.integrations.lightning import SwapDecoder

    with pytest.raises(ValueError, match="expected a model with x_embedder and dec_net in Linear at setup"):
        SwapDecoder().setup(None, torch.nn.Linear(2, 2), "fit")
    with pytest.raises(AttributeError, match="denoiser"):
        SwapDecoder(modules=["denoiser"]).setup(None, torch.nn.Linear(2, 2), "fit")


def test_without_lightning_the_error_says_what_to_do():
    code = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if 'lightning' in name.split('.')[0] else find(name, *rest)\n"
        "import deco_kernels.integrations.swap\n"
        "assert not any('lightning' in name for name in sys.modules)\n"
        "import deco_kernels.integrations.lightning\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 1
    assert "needs Lightning; install it with `pip install lightning`" in finished.stderr
