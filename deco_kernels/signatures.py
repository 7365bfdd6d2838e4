"""Tensor arguments of every op.

The annotation of a field gives its shape in symbols and the rounding of its value. Operator schemas, shape checks and
their errors, the groups of weights passed to backends, and the tables in docs are generated from these descriptions.

Symbols: B, C, H, W of the image; P = p² pixels of a patch; D, decoder width; N, decoder depth; Z, token width; Zq,
width of the query tokens.
"""

import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, get_origin, get_type_hints

from torch import Tensor

ACTIVATION = "has the activation dtype"
MATMUL = "rounded to the activation dtype"  # before use, as eager autocast does
KEPT = "keeps its value"

BLOCK = 8
"""Side of the losses' blocks. Backends compute decoder and loss in one pass for patches that hold whole ones."""


class UpsampleWeights(NamedTuple):
    """Upsample linear from a token to its pixels; row k·D + d belongs to channel d of pixel k."""

    up_weight: Annotated[Tensor, "[P*D, Z]", MATMUL]
    up_bias: Annotated[Tensor, "[P*D]", KEPT]


class ModulationWeights(NamedTuple):
    """LayerNorm and modulation of N blocks; rows of mod_weight: shift, scale, gate."""

    norm_weight: Annotated[Tensor, "[N, D]", KEPT]
    norm_bias: Annotated[Tensor, "[N, D]", KEPT]
    mod_weight: Annotated[Tensor, "[N, 3D, D]", MATMUL]
    mod_bias: Annotated[Tensor, "[N, 3D]", KEPT]


class BlockWeights(NamedTuple):
    """N blocks of the decoder; matrices are [out, in]."""

    modulation: ModulationWeights
    fc1_weight: Annotated[Tensor, "[N, D, D]", MATMUL]
    fc1_bias: Annotated[Tensor, "[N, D]", KEPT]
    fc2_weight: Annotated[Tensor, "[N, D, D]", MATMUL]
    fc2_bias: Annotated[Tensor, "[N, D]", KEPT]


class DecoderWeights(NamedTuple):
    """The decoder: query, blocks and head."""

    pixel_weight: Annotated[Tensor, "[D, C]", MATMUL]
    pixel_table: Annotated[Tensor, "[P, D]", KEPT]
    blocks: BlockWeights
    head_weight: Annotated[Tensor, "[C, D]", MATMUL]
    head_bias: Annotated[Tensor, "[C]", KEPT]


class Query(NamedTuple):
    """What is added to the first h besides pixel and position: given, or a linear map of a second token per patch.

    Either `query`, or the other three, or none is given.
    """

    query: Annotated[Tensor | None, "[..., P, D]", ACTIVATION]
    query_tokens: Annotated[Tensor | None, "[..., Zq]", ACTIVATION]
    query_weight: Annotated[Tensor | None, "[P*D, Zq]", MATMUL]
    query_bias: Annotated[Tensor | None, "[P*D]", KEPT]


class AdalnBlock(NamedTuple):
    h: Annotated[Tensor, "[..., D]", ACTIVATION]
    cond: Annotated[Tensor, "[..., D]", ACTIVATION]
    weights: BlockWeights


class UpsampleModulate(NamedTuple):
    h: Annotated[Tensor, "[..., P, D]", ACTIVATION]
    tokens: Annotated[Tensor, "[..., Z]", ACTIVATION]
    up: UpsampleWeights
    weights: ModulationWeights


class PixelDecoder(NamedTuple):
    image: Annotated[Tensor, "[B, C, H, W]", KEPT]
    cond: Annotated[Tensor, "[..., P, D]", ACTIVATION]
    weights: DecoderWeights
    query: Annotated[Tensor | None, "[..., P, D]", ACTIVATION]


class PixelDecoderFromTokens(NamedTuple):
    image: Annotated[Tensor, "[B, C, H, W]", KEPT]
    tokens: Annotated[Tensor, "[..., Z]", ACTIVATION]
    up: UpsampleWeights
    weights: DecoderWeights
    query: Query


class Loss(NamedTuple):
    pred: Annotated[Tensor, "[B, 3, H, W]", KEPT]
    target: Annotated[Tensor, "[B, 3, H, W]", KEPT]
    frequency_weight: Annotated[Tensor, "[3, 8, 8]", KEPT]
    sample_weight: Annotated[Tensor | None, "[B]", KEPT]


class PixelDecoderLoss(NamedTuple):
    """C is 3."""

    image: Annotated[Tensor, "[B, C, H, W]", KEPT]
    cond: Annotated[Tensor, "[..., P, D]", ACTIVATION]
    target: Annotated[Tensor, "[B, C, H, W]", KEPT]
    weights: DecoderWeights
    frequency_weight: Annotated[Tensor, "[3, 8, 8]", KEPT]
    sample_weight: Annotated[Tensor | None, "[B]", KEPT]
    query: Annotated[Tensor | None, "[..., P, D]", ACTIVATION]


class PixelDecoderLossFromTokens(NamedTuple):
    """C is 3."""

    image: Annotated[Tensor, "[B, C, H, W]", KEPT]
    tokens: Annotated[Tensor, "[..., Z]", ACTIVATION]
    target: Annotated[Tensor, "[B, C, H, W]", KEPT]
    up: UpsampleWeights
    weights: DecoderWeights
    frequency_weight: Annotated[Tensor, "[3, 8, 8]", KEPT]
    sample_weight: Annotated[Tensor | None, "[B]", KEPT]
    query: Query


# --- values derived from the descriptions ----------------------------------------------------------------------------

Group = TypeVar("Group", bound=tuple[Any, ...])


class Argument(NamedTuple):
    """A tensor argument of an op. Only the batch and the image may be empty."""

    name: str
    shape: str
    rounding: str
    optional: bool
    leading: bool  # whether it has any number of leading sizes, "..."
    sizes: tuple[str, ...]  # the sizes after the leading ones, such as ("N", "3D", "D")
    may_be_empty: bool


def _argument(name: str, shape: str, rounding: str, optional: bool) -> Argument:
    sizes = tuple(shape[1:-1].split(", "))
    leading = sizes[0] == "..."
    may_be_empty = not {"...", "B", "H", "W"}.isdisjoint(sizes)
    return Argument(name, shape, rounding, optional, leading, sizes[leading:], may_be_empty)


class Op(NamedTuple):
    """Description of an op.

    group: class of its tensor arguments.
    sized_by: indices of the arguments whose shapes define the symbols; the others are checked against them.
    computed: sizes that are products, as (text, factor, symbols to multiply).
    """

    group: type[Any]
    arguments: tuple[Argument, ...]
    sized_by: tuple[int, ...]
    computed: tuple[tuple[str, int, tuple[str, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.arguments)

    def shapes(self, leading: tuple[int, ...] = (), **sizes: int) -> dict[str, tuple[int, ...]]:
        """Shape of every argument that is not optional, from the sizes of the symbols; `leading` replaces "..."."""
        for text, factor, symbols in self.computed:
            sizes[text] = factor * math.prod(sizes[symbol] for symbol in symbols)
        required = [argument for argument in self.arguments if not argument.optional]
        return {a.name: (*leading * a.leading, *(sizes[size] for size in a.sizes)) for a in required}

    def table(self) -> str:
        """The arguments as a Markdown table."""
        rows = [f"| `{a.name}` | {a.shape}{' or None' * a.optional} | {a.rounding} |" for a in self.arguments]
        return "\n".join(["| argument | shape | value |", "|---|---|---|", *rows])


@functools.cache
def _fields(group: Hashable) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def _arguments(group: Callable[..., Any], blocks: bool) -> Iterator[Argument]:
    for name, hint in _fields(group).items():
        if get_origin(hint) is Annotated:
            shape, rounding = hint.__metadata__
            yield _argument(
                name, shape if blocks else shape.replace("N, ", ""), rounding, hint.__origin__ is not Tensor
            )
        else:
            yield from _arguments(hint, blocks)


def _op(group: type[Any], *sized_by: str, blocks: bool = True) -> Op:
    """`blocks`: whether weights are stacked over N blocks; otherwise they are those of one block."""
    arguments = tuple(_arguments(group, blocks))
    names = [argument.name for argument in arguments]
    texts = dict.fromkeys(size for argument in arguments for size in argument.sizes)
    computed = []
    for text in texts:
        if not re.fullmatch("[A-Z][a-z]?", text):
            factors = [int(number) for number in re.findall("[0-9]+", text)]
            computed.append((text, math.prod(factors), tuple(re.findall("[A-Z][a-z]?", text))))
    return Op(group, arguments, tuple(names.index(name) for name in sized_by), tuple(computed))


OPS = {
    "adaln_block": _op(AdalnBlock, "h", blocks=False),
    "upsample_modulate": _op(UpsampleModulate, "h", "tokens", blocks=False),
    "pixel_decoder": _op(PixelDecoder, "image", "cond", "norm_weight"),
    "pixel_decoder_from_tokens": _op(
        PixelDecoderFromTokens, "image", "tokens", "pixel_table", "norm_weight", "query_tokens", "query_weight"
    ),
    "pixel_decoder_loss": _op(PixelDecoderLoss, "image", "cond", "norm_weight"),
    "pixel_decoder_loss_from_tokens": _op(
        PixelDecoderLossFromTokens, "image", "tokens", "pixel_table", "norm_weight", "query_tokens", "query_weight"
    ),
    "flow_matching_loss": _op(Loss, "pred"),
    "frequency_loss": _op(Loss, "pred"),
}


def grouped(group: type[Group], tensors: Iterable[Any]) -> Group:
    """Group the tensors, in order, into the fields of a group and its nested groups."""
    result: Group = _filled(group, iter(tensors))
    return result


def _filled(group: Callable[..., Any], tensors: Iterator[Any]) -> Any:
    """A local function that calls itself would be a reference cycle, which keeps the tensors for some time."""
    return group(*[next(tensors) if nested is None else _filled(nested, tensors) for nested in _nested_groups(group)])


@functools.cache
def _nested_groups(group: Hashable) -> tuple[Callable[..., Any] | None, ...]:
    """For each field of a group its own group, or None for a tensor."""
    return tuple(None if get_origin(hint) is Annotated else hint for hint in _fields(group).values())


def flat(group: Sequence[Any]) -> list[Any]:
    """The tensors of a group in order; the inverse of `grouped`."""
    found = []
    for value in group:
        if isinstance(value, tuple):
            found += flat(value)
        else:
            found.append(value)
    return found


def mapped(function: Callable[[Any], Any], group: Group) -> Group:
    """Apply the function to each tensor of a group."""
    return grouped(type(group), map(function, flat(group)))
