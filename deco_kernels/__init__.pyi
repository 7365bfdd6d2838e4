from . import flow as flow
from . import integrations as integrations
from . import model as model
from . import ops as ops
from .ops.registry import BackendUnavailable as BackendUnavailable
from .ops.registry import use_backend as use_backend

__version__: str
