from .blocks import BlockSwap as BlockSwap
from .blocks import swap_blocks as swap_blocks
from .swap import Swap as Swap
from .swap import is_swapped as is_swapped
from .swap import swap_decoder as swap_decoder
from .swap import undo_swap as undo_swap
