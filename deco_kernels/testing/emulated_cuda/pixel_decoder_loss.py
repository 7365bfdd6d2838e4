from deco_kernels.backends.cuda.pixel_decoder_loss import *  # noqa: F403
