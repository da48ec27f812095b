"""What a Fisher is good for: earlier tasks remembered, models merged, ranks and pruning, influence, error bars, steps."""

from fishergeo.uses.penalty import QuadraticPenalty

__all__ = ["QuadraticPenalty"]
