"""The kinds of modules whose weights can be captured: what each reads, and how its gradient is made of (a, g)."""
