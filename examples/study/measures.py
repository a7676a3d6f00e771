"""What the second study measures, and its statistics.

Pictures are compared with renders that no model has seen, caption by caption: the distance of the two distributions
(MMD), precision and recall, all in the features of the second scorer, which no training uses; and how much nearer a
picture is to a winner than to such a render.
"""

# ruff: noqa: E402
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

import numpy as np
import torch
from glyphs import TEST_SEEDS, render
from scipy import optimize, stats
from scorer import to_tensor
from second_scorer import load_second_scorer, through_autoencoder


UNSEEN = TEST_SEEDS + 800_000  # first seed of the renders that pictures are compared with
WIDTH = 4.75  # of the kernel: the median distance of two renders of one caption


@torch.no_grad()
def features(pictures):
    """The second scorer's class token of pictures as it takes them, (n, 3, 64, 64) in -1..1: (n, 96) fp64 numpy."""
    parts = [load_second_scorer().trunk(part).last_hidden_state[:, 0] for part in pictures.split(64)]
    return torch.cat(parts).double().numpy()


def real_features(caption, count=64):
    """Those of `count` unseen renders, passed through the autoencoder as every picture of a model has been."""
    pictures = to_tensor([render(caption, UNSEEN + index) for index in range(count)])
    return features(through_autoencoder(pictures).clamp(-1, 1))


def squared_distances(x, y):
    """(n, m) of (n, d) and (m, d)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


def mmd(x, y, width):
    """
    The squared maximum mean discrepancy of two samples, without bias, so that it may be below 0.

    The kernel is exp(-|a - b|^2 / (2 width^2)). Source: Gretton et al. 2012, equation 3.

    Args:
        x, y: (n, d) and (m, d) features.
    """

    def kernel(a, b):
        return np.exp(-squared_distances(a, b) / (2 * width**2))

    n, m = len(x), len(y)
    within_x = (kernel(x, x).sum() - n) / (n * (n - 1))
    within_y = (kernel(y, y).sum() - m) / (m * (m - 1))
    return within_x + within_y - 2 * kernel(x, y).mean()


def precision_recall(made, real, k=3):
    """
    The share of `made` within reach of `real`, and of `real` within reach of `made` (arXiv 1904.06991): a sample's
    reach is the distance to its k-th nearest neighbour in its own set.
    """

    def covered(points, by):
        reach = np.sort(squared_distances(by, by), axis=1)[:, k]  # the nearest is the sample itself
        return float((squared_distances(points, by) <= reach).any(1).mean())

    return covered(made, real), covered(real, made)


def memorisation(pictures, winners, unseen):
    """
    Mean distance of the pictures to their nearest winner over that to their nearest unseen render, pixel by pixel: 1
    where they know no more of the winners than of what these are drawn from, 0 where they are winners.

    Args:
        pictures, winners, unseen: (n, ...) of one caption, winners and unseen as many.
    """
    flat = [np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (pictures, winners, unseen)]
    to_winner, to_unseen = (np.sqrt(squared_distances(flat[0], other).min(1)).mean() for other in flat[1:])
    return float(to_winner / to_unseen)


# ------------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------------


def mixed_model(values, seeds, captions):
    """
    The mean of differences that share seeds and captions: value = mean + seed + caption + rest, all but the mean
    random, fitted by restricted maximum likelihood. Not every seed needs every caption.

    Args:
        values: (n,), one for each seed and caption that were run.
        seeds, captions: (n,) labels.
    Returns:
        dict: mean, error (its standard error), degrees (of freedom of t: seeds - 1, the fewest that the design has),
        p (two-sided, against 0), low and high (95 %), and components, the variances (seed, caption, rest).
    """
    values = np.asarray(values, dtype=np.float64)
    same = [np.equal.outer(np.asarray(labels), np.asarray(labels)).astype(float) for labels in (seeds, captions)]
    scale = values.var() or 1.0

    def fit(logs):
        variances = scale * np.exp(logs)
        covariance = variances[0] * same[0] + variances[1] * same[1] + variances[2] * np.eye(len(values))
        weights = np.linalg.solve(covariance, np.ones(len(values)))
        mean = weights @ values / weights.sum()
        rest = values - mean
        cost = np.linalg.slogdet(covariance)[1] + np.log(weights.sum()) + rest @ np.linalg.solve(covariance, rest)
        return cost, mean, weights.sum() ** -0.5, variances

    best = optimize.minimize(
        lambda logs: fit(logs)[0], np.log([0.2, 0.2, 0.6]), method="L-BFGS-B", bounds=[(-16, 4)] * 3
    )
    _, mean, error, variances = fit(best.x)
    degrees = len(set(seeds)) - 1
    reach = stats.t.ppf(0.975, degrees) * error
    told = {"mean": mean, "error": error, "degrees": degrees, "p": 2 * stats.t.sf(abs(mean) / error, degrees)}
    return {**told, "low": mean - reach, "high": mean + reach, "components": tuple(variances)}


def holm(p_values):
    """Holm's adjusted p-values of a family, in the order given."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return adjusted
