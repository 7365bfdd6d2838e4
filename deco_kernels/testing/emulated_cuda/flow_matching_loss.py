from deco_kernels.backends.cuda.flow_matching_loss import *  # noqa: F403
