from deco_kernels.backends.cuda.upsample_modulate import *  # noqa: F403
