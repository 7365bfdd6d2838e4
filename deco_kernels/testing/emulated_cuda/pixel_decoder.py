from deco_kernels.backends.cuda.pixel_decoder import *  # noqa: F403
