"""torch-fidelity without torchvision, and a tiny random extractor.

torch-fidelity imports torchvision for data sets and networks that evaluate.py does not use. Its wheel for a GPU build
of PyTorch cannot be imported beside a CPU build, so empty modules take its place during the import.
"""

import sys
from types import ModuleType
from unittest import mock

import torch

SIZES = {"pool": 5, "logits": 4, "spatial": 6}


def import_without_torchvision() -> None:
    """Imports torch_fidelity; afterwards torchvision is as installed or as absent as before."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    empty = {name: ModuleType(name) for name in names}
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(empty["torchvision.datasets"], name, type(name, (), {}))
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(empty[parent], child, empty[name])
    with mock.patch.dict(sys.modules):
        sys.modules.update(empty)
        import torch_fidelity.utils  # noqa: F401

        found = {name: module for name, module in sys.modules.items() if name.startswith("torch_fidelity")}
    sys.modules.update(found)


def register_tiny() -> type:
    """Registers "tiny-random", random linear maps of the mean colors of an image's quarters, which counts images."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class TinyRandom(FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)
            generator = torch.Generator().manual_seed(0)
            self.maps = {name: torch.randn(12, size, generator=generator) for name, size in SIZES.items()}

        @staticmethod
        def get_provided_features_list():
            return tuple(SIZES)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pool"

        def forward(self, images):
            TinyRandom.calls += len(images)
            quarters = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
            return tuple(quarters @ self.maps[name] for name in self.features_list)

    TinyRandom.calls = 0
    FEATURE_EXTRACTORS_REGISTRY.pop("tiny-random", None)
    register_feature_extractor("tiny-random", TinyRandom)
    return TinyRandom
