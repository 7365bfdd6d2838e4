"""Features of images from an extractor of torch-fidelity."""

import hashlib
import os
import pickle
from pathlib import Path
from types import ModuleType

import torch

INCEPTION = "inception-v3-compat"
SPATIAL_CHANNELS = 7


def library() -> ModuleType:
    """torch_fidelity. Raises ImportError in one line if it or torchvision, which it imports, cannot be imported."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # the latter: torchvision of another build than PyTorch
        raise ImportError(
            "evaluate.py needs torch-fidelity and, of the same build as PyTorch, torchvision: pip install "
            f"torch-fidelity ({error})"
        ) from error
    return torch_fidelity


class Extractor:
    """Maps images to features.

    "pool" are the features of the library's FID, "logits" those of its Inception score. "spatial", for sFID, are the
    first 7 channels of the 1×1 convolution in Inception's block mixed_6 (Nash et al., arXiv 2103.03841), 17·17·7
    numbers in the order row, column, channel; another extractor may provide features of this name.

    Args:
        name: a name registered with the library. weights: file of its weights; None downloads them.

    Raises:
        ValueError: an unknown name, or weights that are damaged, of another network or not plain tensors.
        OSError: the weights cannot be read or downloaded.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device):
        fidelity = library()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as registered

        if name not in registered:
            raise ValueError(f"--extractor: expected one of {sorted(registered)}, got {name!r}; choose one of them")
        kind = registered[name]
        self.layers = {
            "pool": kind.get_default_feature_layer_for_metric("fid"),
            "logits": kind.get_default_feature_layer_for_metric("isc"),
        }
        if "spatial" in kind.get_provided_features_list():
            self.layers["spatial"] = "spatial"
        if weights is not None:
            _require_plain(weights)
        self.network = _build(name, sorted(set(self.layers.values())), weights).to(device)
        self.device, self.received = device, []
        if isinstance(self.network, fidelity.FeatureExtractorInceptionV3):
            self.network.Mixed_6d.branch1x1.register_forward_hook(
                lambda module, inputs, result: self.received.append(result[:, :SPATIAL_CHANNELS])
            )
        self.description = {
            "name": name,
            "weights": "the library's" if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest(),
            "torch_fidelity": fidelity.__version__,
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features float32 [n, F] on the CPU of images uint8 [n, 3, H, W]."""
        self.received.clear()
        found = self.network.convert_features_tuple_to_dict(self.network(images.to(self.device)))
        features = {name: found[layer] for name, layer in self.layers.items()}
        if self.received:
            features["spatial"] = self.received.pop().permute(0, 2, 3, 1).flatten(1)
        return {name: value.float().cpu() for name, value in features.items()}


def _build(name: str, layers: list[str], weights: Path | None) -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    path = None if weights is None else os.fspath(weights)
    try:
        return create_feature_extractor(name, layers, cuda=False, feature_extractor_weights_path=path, verbose=False)
    except OSError as error:
        if weights is not None:
            raise
        source = f"download {URL_INCEPTION_V3}" if name == INCEPTION else "download them"
        raise OSError(
            f"--weights: the weights of {name} cannot be downloaded ({error}); {source} on another machine and give "
            "the path of the file"
        ) from error
    except RuntimeError as error:  # names or shapes of another network
        raise ValueError(
            f"--weights: {weights} does not fit {name}: {' '.join(str(error).split())[:200]}; "
            "give the weights of this extractor"
        ) from error


def _require_plain(path: Path) -> None:
    """Raise unless the file holds plain tensors: the library reads it in a way that can run code from it."""
    if not path.is_file():
        raise FileNotFoundError(f"--weights: expected a file, found none at {path}; check the path")
    try:
        torch.load(path, weights_only=True, map_location="meta", mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"--weights: {path} is damaged, or not a file of plain tensors ({reason}); download it again"
        ) from None
