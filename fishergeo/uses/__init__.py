"""What a Fisher is good for: earlier tasks remembered, models merged, ranks and pruning, influence, error bars, steps."""

from fishergeo.uses.laplace import Laplace
from fishergeo.uses.merging import Merged, input_grams, merge_weights
from fishergeo.uses.penalty import QuadraticPenalty
from fishergeo.uses.preconditioning import NaturalGradient, natural_gradient
from fishergeo.uses.pruning import Pruned, n_of_m_mask, obs_step, saliency
from fishergeo.uses.ranks import rank_pattern
from fishergeo.uses.tracing import Influence, influence

__all__ = [
    "Influence",
    "Laplace",
    "Merged",
    "NaturalGradient",
    "Pruned",
    "QuadraticPenalty",
    "influence",
    "input_grams",
    "merge_weights",
    "n_of_m_mask",
    "natural_gradient",
    "obs_step",
    "rank_pattern",
    "saliency",
]
