"""Names used in result files: parts, passes and contenders. Imports nothing, so that reports need no PyTorch."""

OPS = (
    "pixel_decoder",
    "pixel_decoder_from_tokens",
    "upsample_modulate",
    "adaln_block",
    "flow_matching_loss",
    "pixel_decoder_loss",
    "pixel_decoder_loss_from_tokens",
)
EXTRAS = ("avx2", "memory", "overhead", "import")
ON_REQUEST = ("scaling", "end_to_end", "kernels")  # parts that run only when named or with --full
DTYPES = ("float32", "bfloat16", "float16")
DEVICE_BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}

FORWARD = "forward"
TRAINING = "forward_backward"
BACKWARD_ALONE = "backward_alone"
TRAINING_STEP = "training step"
SAMPLING = "sampling"

PUBLISHED = "published"
BEST_EAGER = "best_eager"
COMPILED = "compiled"
AUTOTUNED = "compiled_max_autotune"
COMPILE_MODES = {COMPILED: "default", AUTOTUNED: "max-autotune-no-cudagraphs"}
LIGER = "liger"
REFERENCE = "reference"
TWO_OPS = " two ops"  # after the name of a backend, as the next three
SAVING_MEMORY = " saving memory"
KEEPING_COND = " keeping cond"
KEEPING_ACTIVATIONS = " keeping activations"  # and cond
GPU_BACKENDS = ("triton", "cuda")
LIMIT = "limit"  # end to end: without decoder and loss
