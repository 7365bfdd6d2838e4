"""FID, sFID, Inception score, precision and recall from features, computed by torch-fidelity."""

from collections.abc import Mapping

import numpy as np
import torch

Statistics = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name of features → mean [F] and covariance [F, F], float64."""

LEAST_IMAGES = 10  # one per split of the Inception score; precision and recall need 4
_PAIRS_AT_ONCE = 2000


def statistics_of(features: Mapping[str, torch.Tensor]) -> Statistics:
    """Mean and covariance of "pool" and, if present, "spatial"."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = {
        name: fid_features_to_statistics(features[name].double()) for name in ("pool", "spatial") if name in features
    }
    return {name: (each["mu"], each["sigma"]) for name, each in found.items()}


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2·(Σ1·Σ2)^½) of two Gaussians (mean, covariance)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one, two = ({"mu": mean, "sigma": covariance} for mean, covariance in (first, second))
    return fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID]


def evaluate(
    samples: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor] | None,
    statistics: Statistics,
) -> tuple[dict[str, float], dict[str, str]]:
    """(metrics, reasons of the metrics that are missing).

    Args:
        samples: features [n, F] of the samples.
        reference: features of the reference, or None if it has no images.
        statistics: of the reference; those that are missing are computed from its features.

    Raises ValueError for statistics of another number of features.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    metrics: dict[str, float] = {}
    missing: dict[str, str] = {}
    ours = statistics_of(samples)
    theirs = {**({} if reference is None else statistics_of(reference)), **statistics}
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        if name not in ours:
            missing[metric] = f"the extractor has no features {name!r}"
        elif name not in theirs:
            missing[metric] = f"the reference has no statistics of the features {name!r}"
        else:
            _require_same_features(name, ours[name], theirs[name])
            metrics[metric] = frechet_distance(ours[name], theirs[name])
    score = isc_features_to_metric(samples["logits"])
    metrics |= {"inception_score": score[KEY_METRIC_ISC_MEAN], "inception_score_std": score[KEY_METRIC_ISC_STD]}
    if reference is None:
        missing |= dict.fromkeys(("precision", "recall"), "the reference has no images")
    else:
        options = dict(save_cpu_ram=True, prc_batch_size=_PAIRS_AT_ONCE, verbose=False)
        found = prc_features_to_metric(samples["pool"], reference["pool"], **options)
        metrics |= {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
    return metrics, missing


def _require_same_features(
    name: str, ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> None:
    (mean, _), (other, covariance) = ours, theirs
    if other.shape != mean.shape or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"reference: expected the mean and covariance of {len(mean)} features {name!r}, as the extractor computes "
            f"them, got shapes {other.shape} and {covariance.shape}; give statistics of the same extractor"
        )
