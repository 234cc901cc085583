"""A map of points: neighbours stay neighbours, and distances between groups mean little.

Source: L. van der Maaten and G. Hinton, "Visualizing Data using t-SNE", 2008; the learning rate is that of A. Belkina
et al., 2019. For a few hundred points all pairs are cheap: scikit-learn's takes five times as long for them (20 times
with its threads).
"""

from __future__ import annotations

import numpy as np

ITERATIONS, EXAGGERATED = 400, 120
EXAGGERATION = 12.0
PERPLEXITY = 30.0
BISECTIONS = 30


def t_sne(points: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Points (N, F) in two dimensions, (N, 2) float32, from their places at the `start`, near 0. The same each time."""
    shares = _neighbour_shares(points.astype(np.float32))
    rate = max(len(points) / EXAGGERATION / 4, 50.0)
    places, speed, gains = start.astype(np.float32), np.zeros_like(start, np.float32), np.ones_like(start, np.float32)
    for step in range(ITERATIONS):
        early = step < EXAGGERATED
        kernel = 1 / (1 + _squared_distances(places))
        np.fill_diagonal(kernel, 0)
        forces = (shares * (EXAGGERATION if early else 1.0) - kernel / kernel.sum()) * kernel
        gradient = 4 * (forces.sum(1)[:, None] * places - forces @ places)
        gains = np.where(gradient * speed < 0, gains + 0.2, gains * 0.8).clip(0.01).astype(np.float32)
        speed = (0.5 if early else 0.8) * speed - rate * gains * gradient
        places = places + speed
    return places


def _neighbour_shares(points: np.ndarray) -> np.ndarray:
    """(N, N): how near each pair is, as shares of all: by Gaussians that are as wide as it takes for each point to have
    about as many neighbours."""
    distances = _squared_distances(points)
    np.fill_diagonal(distances, np.inf)
    distances -= distances.min(1, keepdims=True)
    wanted = np.log(min(PERPLEXITY, (len(points) - 1) / 3))
    low, high = np.full((len(points), 1), 1e-10, np.float32), np.full((len(points), 1), 1e10, np.float32)
    shares = np.zeros_like(distances)
    for _ in range(BISECTIONS):
        precision = np.sqrt(low * high)
        shares = np.exp(-distances * precision)
        shares /= shares.sum(1, keepdims=True)
        entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(1, keepdims=True)
        low, high = np.where(entropy > wanted, precision, low), np.where(entropy > wanted, high, precision)
    both: np.ndarray = (shares + shares.T) / (2 * len(points))
    return both


def _squared_distances(points: np.ndarray) -> np.ndarray:
    squares = (points * points).sum(1)
    distances: np.ndarray = np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0)
    return distances
