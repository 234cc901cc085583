"""Which embeddings are alike: vectors (N, F), compared by the cosine of their angle once their mean is taken away."""

from __future__ import annotations

import numpy as np

MOST_AXES = 512  # of the vectors whose principal components are computed
BLOCK = 1024  # vectors that are compared with all others at a time


def directions(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(N, F) float32 of length 1, seen from `mean` (F,): without that, all outputs of a ReLU look alike. A vector that
    is the mean has length 0."""
    moved = vectors.astype(np.float32) - mean.astype(np.float32)
    lengths: np.ndarray = np.linalg.norm(moved, axis=1, keepdims=True)
    unit: np.ndarray = moved / np.maximum(lengths, 1e-12)
    return unit


def find_nearest(vectors: np.ndarray, others: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of directions (N, F), the `count` most similar of others (M, F), the most similar first: their cosines and their
    positions, (N, count); fewer where there are fewer others."""
    count = min(count, len(others))
    cosines, places = np.empty((len(vectors), count), np.float32), np.empty((len(vectors), count), np.int64)
    for start in range(0, len(vectors), BLOCK):
        found = vectors[start : start + BLOCK] @ others.T
        best = np.argpartition(-found, max(count - 1, 0), axis=1)[:, :count]
        values = np.take_along_axis(found, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        cosines[start : start + BLOCK] = np.take_along_axis(values, order, axis=1)
        places[start : start + BLOCK] = np.take_along_axis(best, order, axis=1)
    return cosines, places


def principal_components(vectors: np.ndarray, count: int) -> np.ndarray:
    """(N, count) float32, or (N, F) where that is less: the directions in which the vectors differ most."""
    moved = vectors.astype(np.float32) - vectors.mean(0, dtype=np.float64).astype(np.float32)
    if min(moved.shape) > MOST_AXES:  # a random projection keeps distances, and solving takes the cube of the width
        moved = moved @ np.random.default_rng(0).standard_normal((moved.shape[1], MOST_AXES), np.float32)
    if moved.shape[1] <= moved.shape[0]:
        _, axes = np.linalg.eigh((moved.T @ moved).astype(np.float64))
        return np.asarray(moved @ axes[:, ::-1][:, :count].astype(np.float32))
    values, axes = np.linalg.eigh((moved @ moved.T).astype(np.float64))  # of fewer examples than numbers
    return np.asarray((axes * np.sqrt(values.clip(0)))[:, ::-1][:, :count], np.float32)
