"""The histogram of an arbiter's scores that requests are told apart by."""

SCORE_EDGES = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Between its bins, close together where most of a trained arbiter's scores lie; a score on an edge belongs to the bin
above it."""
NUM_BINS = len(SCORE_EDGES) + 1
