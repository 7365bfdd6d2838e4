"""Problem sizes: presets and explicit sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of one problem. The comments give the symbols of `--size`, as in `--size B=4,H=256,W=256`."""

    batch: int = 1  # B
    height: int = 256  # H
    width: int = 256  # W
    channels: int = 3  # C
    patch_size: int = 16  # p
    decoder_width: int = 32  # D
    depth: int = 3  # N
    token_width: int = 1152  # Z

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def patch_pixels(self) -> int:
        """P, the pixels of one token."""
        return self.patch_size**2

    @property
    def tokens(self) -> int:
        """T, the tokens of the batch."""
        return self.pixels // self.patch_pixels

    def __str__(self) -> str:
        return ",".join(f"{symbol}={getattr(self, field)}" for symbol, field in SYMBOLS.items())


SYMBOLS = {
    "B": "batch",
    "H": "height",
    "W": "width",
    "C": "channels",
    "p": "patch_size",
    "D": "decoder_width",
    "N": "depth",
    "Z": "token_width",
}

STANDARD = "standard"

# Per-device batches: the published recipes use 8 devices, with 32 images each at 256 x 256 and 16 at 512 x 512.
_PRESETS = {
    STANDARD: Size(),
    "train-l-256": Size(batch=32, token_width=1024),
    "train-xl-256": Size(batch=32),
    "train-l-512": Size(batch=16, height=512, width=512, token_width=1024),
    "train-xl-512": Size(batch=16, height=512, width=512),
    "sample-256": Size(),
    "sample-512": Size(height=512, width=512),
}
PRESETS = tuple(_PRESETS)

# The loss runs on a whole training batch, even if the decoder is timed on one image.
_LOSS_PRESETS = {STANDARD: Size(batch=32)}


def size_of(text: str, op: str) -> Size:
    """Size for an op from a preset name or a list such as "B=4,H=256"; the rest is as in the standard preset.

    Raises:
        ValueError: unknown preset or symbol, a value that is not a positive integer, or H or W not divisible by p.
    """
    if text in _PRESETS:
        return _LOSS_PRESETS.get(text, _PRESETS[text]) if op == "flow_matching_loss" else _PRESETS[text]
    if "=" not in text:
        raise ValueError(f"unknown size {text!r}; use one of {', '.join(PRESETS)}, or a list such as B=4,H=256,W=256")
    values = {}
    for item in text.split(","):
        symbol, _, value = item.partition("=")
        if symbol not in SYMBOLS or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"size {text!r}: expected SYMBOL=positive integer with {', '.join(SYMBOLS)}, got {item!r}")
        values[SYMBOLS[symbol]] = int(value)
    size = Size(**values)
    if "loss" in op and size.channels != 3:
        raise ValueError(f"size {text!r}: the losses are for C=3 channels, got C={size.channels}")
    if size.height % size.patch_size or size.width % size.patch_size:
        raise ValueError(f"size {text!r}: H and W must be divisible by p={size.patch_size}")
    return size
