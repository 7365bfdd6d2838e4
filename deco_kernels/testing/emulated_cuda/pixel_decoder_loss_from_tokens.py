from deco_kernels.backends.cuda.pixel_decoder_loss_from_tokens import *  # noqa: F403
