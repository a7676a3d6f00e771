"""What the second study's plan concludes from its main runs, as soon as they are there, and how many seeds they need.

python examples/study/second_report.py family
python examples/study/second_report.py power   # when the tuning is done: which difference of MMD would be seen
python examples/study/second_report.py report  # fills appendix.md; forest.png, work.png and rows_BASE.png beside it
"""

import argparse
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import power
import second  # first: it sets the path
import study
from measures import holm, mixed_model
from scipy import stats


PLACES = ("guidance 1", "own best")
MARGIN = 0.1  # of SFT's mean MMD
COLOURS = study.report.COLOURS | {"sft constant": "#1f77b4", "sft decaying": "#17becf", "hinge": "#8c564b"}
COLOURS |= {"unpaired": "#2ca02c", "extrapolated": "#e377c2"}
SHOWN = 6  # the seed of the sheets: the first whose weights were still on the machine when the study was complete
PRICES = {"score": 0.03, "second score": 0.03, "recall": 0.05}


def lines_of(base, row, seed, place, part="held out", half=False, task="T1", share=0.0):
    """{caption: what was measured of a row's final model, or half way}, empty where it has not run."""
    record = second.told(second.main_run(task, base, row, seed, share))
    _, model, guidance = second.chosen(base, row)
    wanted = "half" if half else model, 1.0 if place == "guidance 1" else guidance, part
    lines = record["captions"] if record else []
    return {line["caption"]: line for line in lines if (line["model"], line["guidance"], line["part"]) == wanted}


def mean_of(base, row, place, name, seeds=second.SEEDS, **where):
    """Mean over captions and seeds, or None where nothing was measured. `where` are arguments of lines_of."""
    lines = [line for seed in seeds for line in lines_of(base, row, seed, place, **where).values()]
    return float(np.mean([line[name] for line in lines])) if lines else None


def places_of(base, row):
    """{place: guidance} of a row; one place where it is best without guidance."""
    best = second.chosen(base, row)[2]
    return {PLACES[0]: 1.0} | ({PLACES[1]: best} if best != 1 else {})


def root(values):
    """Square roots that keep the sign: an MMD without bias may be below 0."""
    return np.sign(values) * np.sqrt(np.abs(values))


def compare(base, row, place, name="mmd", sft_place=None, scale=np.asarray, other=None, task="T1", share=0.0, **where):
    """
    A row minus SFT, both at guidance 1 or each at its own best, paired by seed and caption.

    A seed whose two runs began from different weights (see the plan's end) is left out.

    Args:
        sft_place: where SFT is another place than the row.
        scale: of the values before their difference, such as `root`.
        other: a row in SFT's place.
        task, share: T1, or T2 with its share of degraded winners.
        where: further arguments of lines_of.
    Returns:
        what mixed_model does; `sft`, the mean of SFT; `seeds`, how many there are; and `without`, (mean, caption)
        without the caption whose absence brings the mean nearest to 0 or past it. None for fewer than two seeds.
    """
    sft, pairs = other or second.best_sft(base), []
    for seed in second.SEEDS:
        records = [second.told(second.main_run(task, base, one, seed, share)) for one in (row, sft)]
        if all(records) and records[0]["start"] == records[1]["start"]:
            ours = lines_of(base, row, seed, place, task=task, share=share, **where)
            theirs = lines_of(base, sft, seed, sft_place or place, task=task, share=share, **where)
            pairs += [(seed, caption, ours[caption][name], theirs[caption][name]) for caption in ours]
    seeds, captions, ours, theirs = zip(*pairs) if pairs else [()] * 4
    if len(set(seeds)) < 2:
        return None
    gains = scale(ours) - scale(theirs)
    fitted = mixed_model(gains, seeds, captions)
    others = [(gains[np.not_equal(captions, one)].mean(), one) for one in sorted(set(captions))]
    without = min(others, key=lambda other: other[0] * np.sign(fitted["mean"]))
    return {**fitted, "sft": float(np.mean(theirs)), "seeds": len(set(seeds)), "without": without}


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
    within = all(furthest(one) < MARGIN * one["sft"] for one in compared)
    return "equivalent" if within else "not resolved"


def half_width(compared):
    """Of the 90 % interval, by which equivalence is judged."""
    return stats.t.ppf(0.95, compared["degrees"]) * compared["error"]


def furthest(compared):
    """The end of the 90 % interval that is further from 0, without its sign."""
    return abs(compared["mean"]) + half_width(compared)


def complete():
    """Whether all main runs of the family are there."""
    runs = [
        second.main_run("T1", base, row, seed)
        for base in study.BASES
        for row in second.T1_FIRST
        for seed in second.SEEDS
    ]
    return all(second.told(run) for run in runs)


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


def interval(compared):
    return f"{compared['mean']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]"


def table(told):
    head = ["row", "place", "seeds", *(f"{base} base: MMD − SFT's" for base in study.BASES), "Holm's p", "verdict"]
    lines = []
    for row, place, both, p, word in told:
        seeds = min(one["seeds"] for one in both)
        lines.append([row, place, str(seeds), *map(interval, both), f"{p:.3f}", word])
    return study.report.table(head, lines)


def beside_table(told):
    """What the plan wants beside the verdicts: score, the place that a recommendation asks for, one caption less."""
    head = ["row", "place", "base", "score − SFT's", "equivalent in score", "MMD − SFT's at its best guidance"]
    head += ["margin there", "not worse by more", "MMD − SFT's without one caption", "√MMD − SFT's"]
    head += ["MMD − SFT's, aligned"]
    lines = []
    for row, place, both, _, _ in told:
        for base, one in zip(study.BASES, both):
            score = compare(base, row, place, "score")
            best = compare(base, row, place, sft_place=PLACES[1])
            mean, caption = one["without"]
            lines.append([row, place, base, interval(score), "yes" if furthest(score) < PRICES["score"] else "no"])
            margin = MARGIN * best["sft"]
            no_worse = best["mean"] + half_width(best) < margin
            lines[-1] += [interval(best), f"{margin:.3f}", "yes" if no_worse else "no", f"{mean:+.3f} ({caption})"]
            lines[-1].append(interval(compare(base, row, place, scale=root)))
            lines[-1].append(interval(compare(base, row, place, part="aligned")))
    return study.report.table(head, lines)


def sft_table():
    """What SFT brings after the start, and what guidance brings to it, in MMD and recall on held-out captions."""
    differences = {f"{row} − start, guidance 1": (row, PLACES[0], {"other": "start"}) for row in second.SFT_ROWS}
    differences["best SFT: its own best guidance − guidance 1"] = (None, PLACES[1], {"sft_place": PLACES[0]})
    lines = []
    for what, (row, place, how) in differences.items():
        lines.append([what])
        for name in ("mmd", "recall"):
            for base in study.BASES:
                sft = second.best_sft(base)
                lines[-1].append(interval(compare(base, row or sft, place, name, **{"other": sft, **how})))
    head = [f"{name}, {base} base" for name in ("MMD", "recall") for base in study.BASES]
    return study.report.table(["difference", *head], lines)


def leads_table():
    """The rows beside the family on T1, which few seeds have: their MMD minus that of SFT and of unpaired."""
    lines = []
    for row in second.T1_THEN:
        for place in PLACES:
            for base in study.BASES:
                both = [compare(base, row, place, other=other) for other in (None, "unpaired")]
                if all(both):
                    lines.append([row, place, base, str(both[0]["seeds"]), *map(interval, both)])
    return study.report.table(["row", "place", "base", "seeds", "MMD − SFT's", "MMD − unpaired's"], lines)


def measures_table(base, rows, seeds):
    """Every measure of rows at both places, as means over captions and seeds, and what the rows cost."""
    names = ("mmd", "precision", "recall", "score", "second score")
    head = ["row", "guidance", "seeds", "MMD", "precision", "recall", "score", "second score"]
    head += ["MMD, aligned", "memorisation, aligned", "error", "thousands of latents", "processor's seconds"]
    lines = []
    for row in rows:
        there = [seed for seed in seeds if lines_of(base, row, seed, PLACES[0])]
        for place, guidance in places_of(base, row).items() if there else ():
            values = [mean_of(base, row, place, name, seeds) for name in names]
            values += [mean_of(base, row, place, name, seeds, part="aligned") for name in ("mmd", "memorisation")]
            lines.append([row, f"{guidance:g}", str(len(there)), *map(study.report.number, values)])
            records = [second.told(second.main_run("T1", base, row, seed)) for seed in there]
            # A record's error is of the last weights that it measured, which may not be the row's.
            own = all(record["captions"][-1]["model"] == second.chosen(base, row)[1] for record in records)
            lines[-1].append(f"{np.mean([record['error'] for record in records]):.4f}" if own else "")
            lines[-1] += [f"{value:.0f}" for value in work_of(base, row, there)]
    return study.report.table(head, lines)


def degraded_table():
    """T2: what each share of degraded winners makes of the rows, and the share of such pictures that they draw."""
    lines, sft = [], second.best_sft("first")
    for share in second.SHARES:
        for row in dict.fromkeys((*second.T2, sft)):
            where = dict(task="T2", share=share)
            there = [seed for seed in second.DEGRADED if lines_of("first", row, seed, PLACES[0], **where)]
            for place, guidance in places_of("first", row).items() if there else ():
                lines.append([f"{share:.0%}", row, f"{guidance:g}", str(len(there))])
                for part in ("held out", "aligned"):
                    for name in ("mmd", "spoiled"):
                        value = mean_of("first", row, place, name, there, part=part, **where)
                        lines[-1].append(study.report.number(value))
                for name in ("mmd", "spoiled"):
                    compared = compare("first", row, place, name, **where) if row != sft else None
                    lines[-1].append(interval(compared) if compared else "")
    head = ["winners degraded", "row", "guidance", "seeds", "MMD", "pictures degraded", "MMD, aligned"]
    head += ["pictures degraded, aligned", "MMD − SFT's", "pictures degraded − SFT's"]
    return study.report.table(head, lines)


def in_words(settings):
    """Tuned settings, {name: value}, as a table has them."""
    short = {"learning_rate": "rate", "beta_dpo": "β", "max_train_steps": "updates"}
    return ", ".join(f"{short.get(name, name)} {value:g}" for name, value in sorted(settings.items(), reverse=True))


def starts_table():
    """What the trials of the start left of the denoising error on unseen renders, the least of each base in bold."""
    lines = []
    for trial in sorted(second.START_GRID, key=lambda trial: [*sorted(trial.items(), reverse=True)]):
        lines.append([in_words(trial)])
        for base in study.BASES:
            errors = {run.settings: second.told(run)["error"] for run in second.start_trials(base)}
            error = errors[second.settings_of(trial)]
            lines[-1].append(f"**{error:.4f}**" if error == min(errors.values()) else f"{error:.4f}")
    return study.report.table(["start", *(f"{base} base" for base in study.BASES)], lines)


def tried_table(base):
    """All that the tuning tried: the criterion of each setting's best weights, with its first seed and with all."""
    lines = []
    for row in second.TUNED:
        further, trained = second.beyond_all(base, row), second.ROWS[row].trained
        for trial in [*second.ROWS[row].grid, *second.beyond(base, row), *further]:
            first = {model: value for value, _, model in second.ranked(base, row, [trial], second.TUNING[:1])}
            three = all(second.told(run) for seed in second.TUNING for run in second.trials(base, row, seed, [trial]))
            told = second.ranked(base, row, [trial], second.TUNING) if three else []
            best = {model: f"{value:.4f}" for value, _, model in told}
            if trial == dict(second.chosen(base, row)[0]):
                best = {
                    model: f"**{value}**" if value == min(best.values()) else value for model, value in best.items()
                }
            for model in [*(best or first)][: 1 if trained else None]:  # what is not trained has one setting: all
                lines.append([row, in_words(trial), model, f"{first[model]:.4f}", best.get(model, "")])
    return study.report.table(["row", "settings", "weights", "seed 100", "three seeds"], lines)


def tuned_table(base, ran):
    """
    What the tuning chose: its MMD there, and what its mean over both places gains on the start, there and, if they
    `ran`, in the main runs, over the seeds that the row has.
    """
    lines, start = [], None
    for row in second.TUNED:
        settings, model, guidance = second.chosen(base, row)
        runs = [second.trials(base, row, seed, [dict(settings)])[0] for seed in second.TUNING]
        tuning = [second.mean_mmd(runs, model, place) for place in (1.0, guidance)]
        start = start or np.mean(tuning)  # the first row is the start
        lines.append([row, in_words(dict(settings)), model, f"{guidance:g}", *(f"{value:.4f}" for value in tuning)])
        lines[-1] += [f"{np.mean(tuning) - start:+.4f}", ""]
        if there := [seed for seed in second.SEEDS if ran and lines_of(base, row, seed, PLACES[0])]:
            main, from_start = (
                np.mean([mean_of(base, one, place, "mmd", there) for place in PLACES]) for one in (row, "start")
            )
            lines[-1][-1] = f"{main - from_start:+.4f}"
    head = ["row", "settings", "weights", "own best guidance", "MMD at guidance 1", "at its own best"]
    return study.report.table([*head, "mean − the start's", "main runs: mean − the start's"], lines)


def way_table(base):
    """What metrics.jsonl tells of the rows with rivals (hinge: gaps only), over the seeds, of either half of a run."""
    names = {"dpo_fraction": 2, "implicit_accuracy": 2, "gap/winner": 5, "gap/rival": 5}
    lines = []
    for row in (*second.T1_FIRST, *second.T1_THEN):
        records = [second.told(second.main_run("T1", base, row, seed)) for seed in second.SEEDS]
        curves = [record["curves"] for record in records if record and "gap/rival" in record.get("curves", {})]
        if curves:
            lines.append([row, str(len(curves))])
            for half in (0, 1):
                for name, digits in names.items():
                    parts = [np.array_split(one[name], 2)[half] for one in curves if name in one]
                    lines[-1].append(study.report.number(np.mean(parts) if parts else None, digits))
    head = [f"{name}, {half} half" for half in ("first", "second") for name in names]
    return study.report.table(["row", "seeds", *head], lines)


def finer_table(base):
    """The first seeds' MMD on held-out captions by 10 sampler steps and by 20, in case a row learned its sampler."""
    lines = []
    for row in (*second.T1_FIRST, *second.T1_THEN):
        _, model, guidance = second.chosen(base, row)
        runs = [second.main_run("T1", base, row, seed) for seed in second.SEEDS[:3]]
        runs = {run: replace(run, steps=second.FINER) for run in runs}
        runs = {coarse: fine for coarse, fine in runs.items() if second.told(coarse) and second.told(fine)}
        for place in sorted({1.0, guidance}) if runs else ():
            means = [second.mean_mmd(side, model, place) for side in (runs.keys(), runs.values())]
            lines.append([row, f"{place:g}", str(len(runs)), *map(study.report.number, means)])
    return study.report.table(["row", "guidance", "seeds", "MMD, 10 steps", "MMD, 20 steps"], lines)


def work_of(base, row, seeds=second.SEEDS):
    """(thousands of latents, those with a gradient three times, and seconds) that a run of a row cost, its mean."""
    records = [second.told(second.main_run("T1", base, row, seed)) for seed in seeds]
    counted = [(one["forwards"] + 2 * one["backwards"], one["seconds"]) for one in records if one]
    return (np.mean([latents for latents, _ in counted]) / 1000, np.mean([seconds for _, seconds in counted]))


def plot_forest(told):
    """The family's differences to SFT in percent of SFT's MMD, with 95 % intervals; the margin is shaded."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharex=True, sharey=True)
    rows = list(reversed(second.FAMILY))
    for axis, place in zip(axes, PLACES):
        axis.axvspan(-100 * MARGIN, 100 * MARGIN, color="#eeeeee")
        axis.axvline(0, color="#888888", linewidth=1)
        for row, where, both, _, word in told:
            for shift, marker, one in zip((0.13, -0.13), "os", both if where == place else ()):
                middle, low, high = (100 * one[name] / one["sft"] for name in ("mean", "low", "high"))
                error, colour = [[middle - low], [high - middle]], COLOURS[row]
                axis.errorbar(middle, rows.index(row) + shift, None, error, fmt=marker, color=colour, capsize=3)
            if where == place:
                axis.annotate(
                    word, (1.02, rows.index(row)), xycoords=("axes fraction", "data"), va="center", fontsize=8
                )
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(place if place == PLACES[0] else "each at its own best guidance", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("MMD − SFT's, in % of SFT's; below 0 is better (round: first base, square: second)", fontsize=10)
    figure.tight_layout()
    return figure


def plot_work():
    """Held-out MMD at guidance 1 at the start, half way and at the end, against counted latents."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, base in zip(axes, study.BASES):
        start = mean_of(base, "start", PLACES[0], "mmd")
        for row in (*second.SFT_ROWS[:2], *(row for row in second.FAMILY if second.ROWS[row].trained)):
            values = [start, *(mean_of(base, row, PLACES[0], "mmd", half=half) for half in (True, False))]
            if None not in values:
                latents, _ = work_of(base, row)
                colour = COLOURS[row]
                axis.plot([0, latents / 2, latents], values, "o-", color=colour, label=row, markersize=4)
        axis.set_title(f"{base} base", fontsize=10)
        axis.set_xlabel("thousands of latents, those with a gradient three times")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MMD on held-out captions, guidance 1")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def sheet(base, seed=SHOWN, rows=None, task="T1", share=0.0):
    """
    What the rows draw of a seed's held-out captions without guidance, from each caption's first noise.

    It is drawn with the weights that the main runs kept: None where they were not made on this machine.
    """
    rows = rows or ("start", second.best_sft(base), *second.FAMILY)
    runs = {row: second.main_run(task, base, row, seed, share) for row in rows}
    weights = {row: second.kept(run, second.chosen(base, row)[1]) for row, run in runs.items()}
    if not all(path.exists() for path in weights.values()):
        return None
    pipeline, strips = study.load_pipeline(study.BASES[base], "cpu"), []
    for row, path in weights.items():
        pipeline.unet.load_state_dict(second.load_file(path))
        captions, _ = second.held_out(seed)
        drawn = [
            second.draw(pipeline, [caption], second.first_noise(seed, "held out", place), 1.0, second.STEPS)[0]
            for place, caption in enumerate(captions)
        ]
        strips.append((row, study.strip(drawn).convert("RGB")))
    return study.report.labelled(strips)


def mixed_starts():
    """The bases and seeds whose rows did not all begin from the same weights, as text."""
    found = []
    for base in study.BASES:
        for seed in second.SEEDS:
            runs = [second.main_run("T1", base, row, seed) for row in (*second.T1_FIRST, *second.T1_THEN)]
            if len({second.told(run)["start"] for run in runs if second.told(run)}) > 1:
                found.append(f"{base} {seed}")
    return ", ".join(found) or "none"


def tables(told):
    """{marker: text} of all that appendix.md shows between markers; the main runs' are missing without a family."""
    made = {"starts": starts_table()}
    for base in study.BASES:
        made |= {f"tried {base}": tried_table(base), f"tuned {base}": tuned_table(base, bool(told))}
    if told:
        made |= {"verdicts": table(told), "beside": beside_table(told), "leads": leads_table()}
        made |= {"sft": sft_table(), "degraded": degraded_table(), "mixed starts": mixed_starts()}
        for base in study.BASES:
            made[f"measures {base}"] = measures_table(base, second.T1_FIRST, second.SEEDS)
            few = measures_table(base, (*second.T1_FIRST, *second.T1_THEN), second.LATER)
            made |= {f"few {base}": few, f"way {base}": way_table(base), f"finer {base}": finer_table(base)}
    return made


def write(told):
    """Fills appendix.md; with the main runs, also saves both plots and sheets of pictures."""
    page = second.HERE / "appendix.md"
    page.write_text(study.report.fill_in({page.name: page.read_text()}, tables(told))[page.name])
    if not told:
        return
    for name, figure in {"forest": plot_forest(told), "work": plot_work()}.items():
        figure.savefig(second.HERE / f"{name}.png", dpi=80, metadata={"Software": None})
        plt.close(figure)
    rows = ("start", second.best_sft("first"), *second.T2[1:])
    sheets = {f"rows_{base}": sheet(base) for base in study.BASES}
    sheets["rows_degraded"] = sheet("first", second.DEGRADED[0], rows, "T2", second.SHARES[1])
    for name, pictures in sheets.items():
        if pictures:
            pictures.save(second.HERE / f"{name}.png", optimize=True)


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
    parser.add_argument("command", choices=["family", "power", "report"])
    command = parser.parse_args().command
    runs, _ = [*second.progress()][-1]
    if runs[0].stage == "tuning":
        print("The tuning is not done yet: python examples/study/second.py status")
    elif command == "power":
        for base in study.BASES:
            print(f"{base} base\n{tuning_power(base)}")
    elif command == "report":
        write(family() if complete() else [])
    elif made := family():
        seeds = {one["seeds"] for _, _, both, _, _ in made for one in both}
        print(f"seeds: {min(seeds)} to {max(seeds)} of {len(second.SEEDS)}\n{table(made)}")
    else:
        print("The main runs are not there yet: python examples/study/second.py status")


if __name__ == "__main__":
    main()
