"""How many seeds the second study needs, from how much the first one's results vary.

    python examples/study/power.py  # what plan.md quotes

The variances are those of the differences of score, picture by picture, between the two rows of the confirmation that
did not break (rival weight 0.3, with one draw and with four) and SFT of their time: five seeds, eight captions, twelve
pictures of each, averaged over both bases, both regimes and both scorers.
"""

import math
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import report  # noqa: E402
from scipy import stats  # noqa: E402


ROWS = ("none, rival 0.3", "4 draws")
POOL = 40  # captions that there are: the held-out ones rotate over them


def components(gains):
    """
    Variances of a crossed design, from its mean squares and without bias, so that one may be below 0.

    Args:
        gains: (seeds, captions, pictures).
    Returns:
        (4,): of seeds, captions, seed with caption, and pictures.
    """
    a, b, n = gains.shape
    cells, mean = gains.mean(2), gains.mean()
    seeds, captions = cells.mean(1, keepdims=True), cells.mean(0, keepdims=True)
    pictures = ((gains - cells[..., None]) ** 2).sum() / (a * b * (n - 1))
    both = n * ((cells - seeds - captions + mean) ** 2).sum() / ((a - 1) * (b - 1))
    of_seeds, of_captions = n * b * seeds.var(ddof=1), n * a * captions.var(ddof=1)
    return np.array([(of_seeds - both) / (n * b), (of_captions - both) / (n * a), (both - pictures) / n, pictures])


def first_study():
    """`components`, averaged over the places, none below 0."""
    _, _, again = report.read_all()
    told = []
    for results in again.values():
        for regime in report.REGIMES:
            for row in ROWS:
                pair = results[regime, row], results[regime, report.SFT_OF_ITS_TIME[row]]
                for judged in (lambda runs: runs, report.by_second):
                    runs, sft = map(judged, pair)
                    told.append(components(np.stack([report.samples(runs[s]) - report.samples(sft[s]) for s in runs])))
    return np.mean(told, 0).clip(min=0)


def standard_error(variances, seeds, captions, pictures):
    """Of the mean difference, where each seed has the next `captions` of POOL."""
    seed, caption, both, picture = variances
    cells = seeds * captions
    of_caption = np.bincount(np.arange(cells) % POOL)
    caption_part = caption * (of_caption**2).sum() / cells**2
    return math.sqrt(seed / seeds + caption_part + both / cells + picture / (cells * pictures))


def seen(error, seeds, alpha, power=0.8):
    """The smallest true difference that a two-sided t test sees with this power."""
    critical, degrees = stats.t.ppf(1 - alpha / 2, seeds - 1), seeds - 1
    differences = np.linspace(0, 60, 6001)
    chances = stats.nct.sf(critical, degrees, differences) + stats.nct.cdf(-critical, degrees, differences)
    return error * differences[np.argmax(chances >= power)]


def equivalent(error, seeds, power=0.8):
    """The smallest margin within which two equal rows are told to be equivalent with this power (two t tests, 5 %)."""
    return error * (stats.t.ppf(0.95, seeds - 1) + stats.t.ppf((1 + power) / 2, seeds - 1))


def table(variances, family, designs):
    head = ["seeds", "captions", "pictures", "standard error", "seen alone", f"seen first of {family}", "margin"]
    lines = []
    for seeds, captions, pictures in designs:
        error = standard_error(variances, seeds, captions, pictures)
        numbers = error, seen(error, seeds, 0.05), seen(error, seeds, 0.05 / family), equivalent(error, seeds)
        lines.append([*map(str, (seeds, captions, pictures)), *(f"{number:.3f}" for number in numbers)])
    return report.table(head, lines)


DESIGNS = [(3, 12, 24), (6, 12, 24), (8, 12, 12), (8, 12, 24), (8, 12, 96), (10, 12, 24), (20, 12, 24)]


def main():
    variances = first_study()
    print("variances of seeds, captions, both, pictures:", ", ".join(f"{value:.5f}" for value in variances))
    print(table(variances, 12, DESIGNS))


if __name__ == "__main__":
    main()
