from .checkpoint import from_published as from_published
from .checkpoint import to_published as to_published
from .checkpoint_file import (
    Checkpoint as Checkpoint,
)
from .checkpoint_file import (
    load_model as load_model,
)
from .checkpoint_file import (
    read_checkpoint as read_checkpoint,
)
from .checkpoint_file import (
    save_model as save_model,
)
from .deco import DeCo as DeCo
from .dit import DiT as DiT
from .dit import Trunk as Trunk
from .modules import AdaLNBlock as AdaLNBlock
from .modules import FlowMatchingLoss as FlowMatchingLoss
from .modules import FrequencyLoss as FrequencyLoss
from .pixel_decoder import PixelDecoder as PixelDecoder
from .pixel_decoder import TrainingLoss as TrainingLoss
from .position import pixel_position_features as pixel_position_features
from .position import rotary_angles as rotary_angles
from .presets import PRESETS as PRESETS
from .presets import build as build
from .text_encoder import Qwen3TextEncoder as Qwen3TextEncoder
from .text_to_image import DeCoTextToImage as DeCoTextToImage
from .text_to_image import TextTrunk as TextTrunk
