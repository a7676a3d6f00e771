"""What the second study's plan concludes from its main runs, as soon as they are there, and how many seeds they need.

python examples/study/second_report.py family
python examples/study/second_report.py power   # when the tuning is done: which difference of MMD would be seen
"""

import argparse

import numpy as np
import power
import second  # first: it sets the path
import study
from measures import holm, mixed_model
from scipy import stats


PLACES = ("guidance 1", "own best")
MARGIN = 0.1  # of SFT's mean MMD
PRICES = {"score": 0.03, "second score": 0.03, "recall": 0.05}


def held_out_lines(base, row, seed, place):
    """{caption: what was measured of a row's final model on T1}, empty where it has not run."""
    record = second.told(second.main_run("T1", base, row, seed))
    _, model, guidance = second.chosen(base, row)
    wanted = model, 1.0 if place == "guidance 1" else guidance, "held out"
    lines = record["captions"] if record else []
    return {line["caption"]: line for line in lines if (line["model"], line["guidance"], line["part"]) == wanted}


def compare(base, row, place, name="mmd"):
    """
    A row minus SFT on T1, both at guidance 1 or each at its own best, paired by seed and caption.

    Returns:
        what mixed_model does, `sft`, the mean of SFT, and `seeds`, how many there are; None for fewer than two.
    """
    sft, pairs = second.best_sft(base), []
    for seed in second.SEEDS:
        ours, theirs = (held_out_lines(base, one, seed, place) for one in (row, sft))
        pairs += [(seed, caption, ours[caption][name], theirs[caption][name]) for caption in ours if caption in theirs]
    seeds, captions, ours, theirs = zip(*pairs) if pairs else [()] * 4
    if len(set(seeds)) < 2:
        return None
    fitted = mixed_model(np.subtract(ours, theirs), seeds, captions)
    return {**fitted, "sft": float(np.mean(theirs)), "seeds": len(set(seeds))}


def verdict(p, compared, prices):
    """
    The plan's word for a row in one place.

    Args:
        p: Holm's, of both bases together.
        compared: compare's result for each base.
        prices: for each base {measure: the mean difference}.
    """
    if p < 0.05:
        if compared[0]["mean"] > 0:
            return "behind"
        dear = any(prices[base][name] < -most for base in range(len(prices)) for name, most in PRICES.items())
        return "ahead, at a price" if dear else "ahead"
    reaches = [abs(one["mean"]) + stats.t.ppf(0.95, one["degrees"]) * one["error"] for one in compared]
    within = all(reach < MARGIN * one["sft"] for reach, one in zip(reaches, compared))
    return "equivalent" if within else "not resolved"


def family():
    """[(row, place, compare of each base, Holm's p, verdict)] of the twelve hypotheses, [] before their runs."""
    hypotheses = [(row, place) for row in second.FAMILY for place in PLACES]
    compared = [[compare(base, *hypothesis) for base in study.BASES] for hypothesis in hypotheses]
    if any(one is None for both in compared for one in both):
        return []
    agree = [both[0]["mean"] * both[1]["mean"] > 0 for both in compared]
    adjusted = holm([max(one["p"] for one in both) if same else 1.0 for both, same in zip(compared, agree)])
    told = []
    for (row, place), both, p in zip(hypotheses, compared, adjusted):
        prices = [{name: compare(base, row, place, name)["mean"] for name in PRICES} for base in study.BASES]
        told.append((row, place, both, float(p), verdict(p, both, prices)))
    return told


def table(told):
    head = ["row", "place", *(f"{base} base: MMD − SFT's" for base in study.BASES), "Holm's p", "verdict"]
    lines = []
    for row, place, both, p, word in told:
        cells = [f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" for one in both]
        lines.append([row, place, *cells, f"{p:.3f}", word])
    return study.report.table(head, lines)


def tuning_power(base, seeds=(8, 10)):
    """
    A table: by the tuning's three seeds, which difference of the MMD each row of the family would show at guidance 1.

    No caption is held out twice in the tuning, so a caption's variance cannot be told from the rest: all of it is
    taken for the caption's, the less favourable reading. So is 8 pictures of a caption instead of 24.
    """
    sft, lines = second.best_sft(base), []
    for row in second.FAMILY:
        mmd = []
        for one in (row, sft):
            settings, model, _ = second.chosen(base, one)
            runs = [second.trials(base, one, seed, [dict(settings)])[0] for seed in second.TUNING]
            told = [(run.seed, line) for run in runs for line in second.told(run)["captions"]]
            wanted = [(seed, line) for seed, line in told if (line["model"], line["guidance"]) == (model, 1.0)]
            mmd.append({(seed, line["caption"]): line["mmd"] for seed, line in wanted})
        keys = sorted(mmd[0])
        fitted = mixed_model([mmd[0][key] - mmd[1][key] for key in keys], *zip(*keys))
        of_seed, of_caption, rest = fitted["components"]
        errors = {n: power.standard_error((of_seed, of_caption + rest, 0, 0), n, second.HELD_OUT, 24) for n in seeds}
        cells = [f"{power.seen(errors[n], n, alpha):.4f}" for n in seeds for alpha in (0.05, 0.05 / 12)]
        lines.append([row, f"{np.mean([*mmd[1].values()]):.4f}", *cells])
    head = ["row", "SFT's MMD", *(f"{n} seeds: {what}" for n in seeds for what in ("seen alone", "seen first of 12"))]
    return study.report.table(head, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["family", "power"])
    command = parser.parse_args().command
    runs, _ = [*second.progress()][-1]
    if runs[0].stage == "tuning":
        print("The tuning is not done yet: python examples/study/second.py status")
    elif command == "power":
        for base in study.BASES:
            print(f"{base} base\n{tuning_power(base)}")
    elif made := family():
        seeds = {one["seeds"] for _, _, both, _, _ in made for one in both}
        print(f"seeds: {min(seeds)} to {max(seeds)} of {len(second.SEEDS)}\n{table(made)}")
    else:
        print("The main runs are not there yet: python examples/study/second.py status")


if __name__ == "__main__":
    main()
