"""Checks of a backend against the float64 formula: random inputs, rule of error, comparison of an op's results.

The rule of error, for every output and gradient, with relative error |actual - exact| / |exact| (L2) against float64:

    float32:            at most max(2 x eager's, 2e-6 for outputs, 5e-6 for gradients)
    bfloat16, float16:  at most 1.2 x (outputs) and 1.5 x (gradients) eager's

where eager is plain PyTorch on the same device, in float32 or under autocast with float32 weights. Means over pixels,
that is losses and the gradient of sample_weight, may in bfloat16 and float16 have an error of eps / 16 where eager's is
smaller: the errors of a few numbers, which average out by chance, have no meaningful ratio. For tensors of at
least 1,000 elements the mean signed error is at most 0.25 x that bound x RMS(exact). Inputs are N(0, 1), weights
N(0, 1/fan-in). Use the rule with at least 4,096 pixels.

A result must be finite exactly where the float64 result, rounded to its dtype, is. Where eager overflows, so that its
error is not finite, that error counts as eps. Where the exact result is 0, errors are relative to eager's result.

Eager's error in a small tensor and its bias in any tensor vary from call to call. So a result that exceeds the bounds
of its call by rounding errors (below 0.1) is compared again, with eight more calls of eager on rescaled inputs: below
1,000 elements eager's error is the root mean square over all nine, and twice that of its bias is added to the bound of
the bias.
"""

from deco_kernels.testing.accuracy import (
    Comparison,
    Results,
    compare,
    compare_tensors,
    eager,
    eager_results,
    error_bound,
    exact_results,
    pooled,
    relative_bias,
    relative_error,
    run,
)
from deco_kernels.testing.equivalence import assert_equivalent
from deco_kernels.testing.inputs import OPS, Inputs, in_float64, random_inputs, rescaled, scale_factor, with_equal_rows

__all__ = [
    "OPS",
    "Comparison",
    "Inputs",
    "Results",
    "assert_equivalent",
    "compare",
    "compare_tensors",
    "eager",
    "eager_results",
    "error_bound",
    "exact_results",
    "in_float64",
    "pooled",
    "random_inputs",
    "relative_bias",
    "relative_error",
    "rescaled",
    "run",
    "scale_factor",
    "with_equal_rows",
]
