"""Sparse semi-nonnegative factorisation: the updates, rivals, concepts, the result."""
