"""`tff.aggregators`: the factories of TFF that are one of fedlens's aggregators, for `model_aggregator`."""

from __future__ import annotations

from fedlens.compat.tff.absent import refusing
from fedlens.learning.aggregators import Aggregator, clip_by_norm, mean, weighted_mean

__getattr__ = refusing(__name__)


def MeanFactory() -> Aggregator:  # noqa: N802
    """The mean, weighted by the clients' examples."""
    return weighted_mean


def UnweightedMeanFactory() -> Aggregator:  # noqa: N802
    """The mean over the clients that have examples; TFF counts those without as well."""
    return mean


def clipping_factory(clipping_norm: float, inner_agg_factory: Aggregator) -> Aggregator:
    """Scales each client's update to an L2 norm of at most `clipping_norm`, then aggregates with the inner one.

    Raises:
      ConfigError: the norm is not a positive number; TFF's norms that adapt over rounds have no counterpart.
    """
    return clip_by_norm(clipping_norm, inner_agg_factory)
