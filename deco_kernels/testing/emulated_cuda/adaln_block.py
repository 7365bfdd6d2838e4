from deco_kernels.backends.cuda.adaln_block import *  # noqa: F403
