"""Fisher geometry over torch."""

__version__ = "0.1.0"
