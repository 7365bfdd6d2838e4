"""Names that stand in results: parts, passes and contenders. Imports nothing, so that a report needs no PyTorch."""

OPS = ("pixel_decoder", "pixel_decoder_from_tokens", "upsample_modulate", "adaln_block", "flow_matching_loss")
EXTRAS = ("avx2", "memory", "overhead", "import")
DTYPES = ("float32", "bfloat16", "float16")
DEVICE_BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}

FORWARD = "forward"
TRAINING = "forward_backward"
BACKWARD_ALONE = "backward_alone"

PUBLISHED = "published"
BEST_EAGER = "best_eager"
COMPILED = "compiled"

# glibc settings with which freed memory stays in the process, so that no contender's time goes into page faults
KEPT_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
