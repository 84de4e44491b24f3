"""The networks' mathematics written for one kind of hardware, or with derivatives written by hand.

Nothing here computes anything else than the plain formulas do: `Compute` chooses, and `model.plain()` does without.
"""
