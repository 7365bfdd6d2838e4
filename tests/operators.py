"""Names of the PyTorch operators that a block runs."""

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorNames(TorchDispatchMode):
    """Context whose value lists the operators that ran in it, such as "aten.add_.Tensor"."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __enter__(self) -> list[str]:
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})
