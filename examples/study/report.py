"""The first study's tables and plots, from data/first and nothing else."""

import functools
import json
import re
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from records import read_csv  # noqa: E402

from train_sspo_sd import ReplayBank  # noqa: E402


HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "first"
REGIMES, WINNERS = ("plenty", "few"), {"plenty": 560, "few": 28}
MAIN = ("base", "sft", "sft matched", "sign", "indicator", "none", "none, rival 0.3")
DRAWS = ("4 draws", "sft, 500 updates")  # of equal time
BASES = ("first", "second")
SFT_OF_ITS_TIME = {**dict.fromkeys(MAIN[3:], "sft matched"), "4 draws": "sft, 500 updates"}
SFT_OF_ITS_TIME["none, safeguarded"] = "sft matched"
COLOURS = dict(zip(MAIN, ("#777777", "#1f77b4", "#17becf", "#d62728", "#ff7f0e", "#2ca02c", "#9467bd")))


# ------------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------------


def file_name(row):
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in row)


RUNS = ("run", "regime", "row", "seed", "settings", "noise", "per_caption", "seconds", "latents", "error", "wall")
PICTURES = ("run", "when", "caption", "noise", "clean", "right", "second clean", "second right")
POINTS = ("run", "step", "name", "value")


@functools.cache
def read_records():
    """{run: record} of data/first, as study.py's runs write them; in the order of the names."""
    records = {}
    for line in sorted(read_csv(DATA / "runs.csv"), key=lambda line: line["run"].split("/")):
        record = {"regime": line["regime"], "row": line["row"], "captions": []}
        record["noise"] = [int(first) for first in line["noise"].split()]
        record |= {name: int(line[name]) for name in ("seed", "per_caption", "latents") if line[name]}
        record |= {name: float(line[name]) for name in ("seconds", "error", "wall") if line[name]}
        settings = json.loads(line["settings"])
        records[line["run"]] = record | ({"settings": settings} if settings else {})
    for line in read_csv(DATA / "pictures.csv.gz"):
        record = records[line["run"]]
        judged = record.setdefault("half way", {}) if line["when"] == "half way" else record
        if line["caption"] not in record["captions"]:
            record["captions"].append(line["caption"])
        for prefix in ("", "second ") if line["second clean"] else ("",):
            told = judged.setdefault("second scorer", {}) if prefix else judged
            told.setdefault("preference", []).append(float(line[prefix + "clean"]))
            told.setdefault("identity", []).append(float(line[prefix + "right"]))
    for line in read_csv(DATA / "curves.csv.gz"):
        curves = records[line["run"]].setdefault("curves", {})
        value = float(line["value"])
        curves.setdefault(line["name"], []).append(int(value) if line["name"] == "step" else value)
    return records


def read_results(part):
    """{(regime, row): {seed: record}} of a part of the study."""
    results = {}
    for run, record in read_records().items():
        if run.rsplit("/", 2)[0] == part:
            results.setdefault((record["regime"], record["row"]), {})[record["seed"]] = record
    return results


def read_all():
    """The results of both bases, as the plan's first sections had them, and {base: results} of the confirmation."""
    again = {base: read_results(f"results_again/{base}") for base in BASES}
    return read_results("results"), read_results("results_second"), again


def trial_records(part):
    """Those of a tuning."""
    return [record for run, record in read_records().items() if run.startswith(f"{part}/")]


def samples(result, name="score"):
    """A result's numbers as (captions, pictures of a caption), those of all noise sets side by side."""
    preference, identity = np.array(result["preference"]), np.array(result["identity"])
    values = {"preference": preference, "identity": identity, "score": preference * identity}[name]
    captions = len(result["captions"])
    return values.reshape(len(result["noise"]), captions, -1).swapaxes(0, 1).reshape(captions, -1)


def half_way(runs):
    """The runs as they were judged half way, by the first noise set."""
    return {
        seed: run | run["half way"] | {"noise": run["noise"][:1]} for seed, run in runs.items() if "half way" in run
    }


def by_second(runs):
    """The runs as the second scorer judged them."""
    return {seed: run | run["second scorer"] for seed, run in runs.items()}


def mean(runs, name="score"):
    return float(np.mean([samples(run, name).mean() for run in runs.values()]))


def spread(runs):
    """The standard deviation of the score over training seeds, or None for a single one."""
    return float(np.std([samples(run).mean() for run in runs.values()], ddof=1)) if len(runs) > 1 else None


def crossed_bootstrap(values, resamples=10_000, seed=0):
    """
    The 95 % percentile interval of the mean of `values` (..., seeds, captions) over its last two axes.

    Seeds and captions are drawn again, each as a whole: evaluate.py's bootstrap is over captions alone, since it
    judges given models and not how they were trained.
    """
    generator = np.random.default_rng(seed)
    seeds, captions = values.shape[-2:]
    rows = generator.integers(seeds, size=(resamples, seeds, 1))
    columns = generator.integers(captions, size=(resamples, 1, captions))
    means = values[..., rows, columns].mean((-2, -1))
    return np.quantile(means, [0.025, 0.975], axis=-1)


def compare(runs, others):
    """
    `runs` against `others`, picture by picture, on the seeds that both have.

    Returns:
        dict of `difference` of the score and `win_rate` (ties count half), each (mean, low, high), and `seeds`; None
        if they have no seed in common.
    """
    seeds = sorted(set(runs) & set(others))
    if not seeds:
        return None
    gained = np.stack([samples(runs[seed]) - samples(others[seed]) for seed in seeds])
    values = np.stack([gained.mean(-1), ((np.sign(gained) + 1) / 2).mean(-1)])
    low, high = crossed_bootstrap(values)
    named = {
        name: (float(values[i].mean()), float(low[i]), float(high[i]))
        for i, name in enumerate(("difference", "win_rate"))
    }
    return {**named, "seeds": len(seeds)}


def curve(runs, name, part=slice(None)):
    """The mean over runs and over a part of the run of a curve, or None where it is not told."""
    told = [np.mean(run["curves"][name][part]) for run in runs.values() if name in run.get("curves", {})]
    return float(np.mean(told)) if told else None


# ------------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------------


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, digits=3):
    return "" if value is None else f"{value:.{digits}f}"


def interval(compared, name="difference"):
    if compared is None:
        return ""
    middle, low, high = compared[name]
    return (
        f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]" if name == "difference" else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    )


def scores_table(results, regime, parents):
    """
    How good, against what, at what price.

    Args:
        parents: {row: the row that it changes, or None}. Where there is one, the row is compared with that too.
    """
    changed = any(parents.values())
    head = ["row", "seeds", "half way", "score ± sd", "preference", "identity", "− SFT, equal updates"]
    head += ["− sft matched", "− the row it changes" if changed else "win rate over sft matched"]
    head += ["held-out error", "core seconds", "UNet, thousand latents"]
    lines = []
    for row, parent in parents.items():
        runs = results.get((regime, row))
        if not runs:
            continue
        against = {name: compare(runs, results.get((regime, name), {})) for name in ("sft", "sft matched", parent)}
        if row == "base":  # one run of it, where the others have one of each seed
            against = dict.fromkeys(against)
        against[row] = None
        line = [row, str(len(runs)), "" if row == "base" else number(mean(half_way(runs)))]
        line += [number(mean(runs)) + (f" ± {spread(runs):.3f}" if len(runs) > 1 else "")]
        line += [number(mean(runs, "preference")), number(mean(runs, "identity"))]
        line += [interval(against["sft"]), interval(against["sft matched"])]
        line += [interval(against[parent]) if changed else interval(against["sft matched"], "win_rate")]
        line.append(number(np.mean([run["error"] for run in runs.values()]), 4))
        if row == "base":
            line += ["", ""]
        else:
            line.append(number(np.median([run["seconds"] for run in runs.values()]), 0))
            line.append(number(np.median([run["latents"] for run in runs.values()]) / 1000, 1))
        lines.append(line)
    return table(head, lines)


def curves_table(results, regime, rows):
    """What the runs told on their way."""
    head = ["row", "seeds", "dpo_fraction", "implicit_accuracy, first half", "second half", "gap/winner, second half"]
    head += ["gap/rival, second half", "rivals that are clean", "switch agrees with the scorer", "s = +1 would agree"]
    lines = []
    for row in rows:
        runs = results.get((regime, row))
        if not runs or curve(runs, "dpo_fraction") is None:
            continue
        late, clean = slice(10, None), curve(runs, "rivals/clean")
        lines.append(
            [row, str(len(runs)), number(curve(runs, "dpo_fraction"), 2)]
            + [number(curve(runs, "implicit_accuracy", part), 2) for part in (slice(0, 10), late)]
            + [number(curve(runs, name, late), 5) for name in ("gap/winner", "gap/rival")]
            + [number(clean, 2), number(curve(runs, "switch/right"), 2), number(1 - clean, 2)]
        )
    return table(head, lines)


def pilots_table(results):
    """Every trial of the tuning; the chosen ones are those of TUNED in study.py."""
    trials = {}
    for result in results:
        settings = result["settings"]
        trial = f"{settings['learning_rate']:g}"
        if "rollout_guidance_scale" in settings:
            trial += f", guidance {settings['rollout_guidance_scale']:g}"
        trials.setdefault((result["regime"], result["row"]), {})[trial] = float(samples(result).mean())
    lines = []
    for (regime, row), scores in sorted(
        trials.items(), key=lambda item: (item[0][0] != "plenty", MAIN.index(item[0][1]))
    ):
        best = max(scores.values())
        shown = [
            f"**{score:.3f}** ({trial})" if score == best else f"{score:.3f} ({trial})"
            for trial, score in scores.items()
        ]
        lines.append([regime, row, *shown])
    return table(["regime", "row", "", "", "", ""], lines)


def confirmation_table(results, regime):
    """What ran again on fresh seeds, by both scorers; each against SFT of its time."""
    head = ["row", "seeds", "rate", "score ± sd", "by the second scorer", "− SFT of its time", "by the second scorer"]
    head += ["win rate over it", "preference", "identity", "held-out error", "core seconds"]
    lines = []
    for row in ("base", "sft matched", "sft, 500 updates", *SFT_OF_ITS_TIME):
        runs = results.get(("plenty" if row == "base" else regime, row))
        if not runs:
            continue
        second = by_second(runs)
        line = [row, str(len(runs)), "" if row == "base" else f"{learning_rate(runs):g}"]
        line += [number(mean(of)) + (f" ± {spread(of):.3f}" if len(of) > 1 else "") for of in (runs, second)]
        sft = results.get((regime, SFT_OF_ITS_TIME.get(row)), {})
        line += [interval(compare(runs, sft)), interval(compare(second, by_second(sft)))]
        line += [interval(compare(runs, sft), "win_rate")]
        line += [number(mean(runs, "preference")), number(mean(runs, "identity"))]
        line.append(number(np.mean([run["error"] for run in runs.values()]), 4))
        line.append("" if row == "base" else number(np.median([run["seconds"] for run in runs.values()]), 0))
        lines.append(line)
    return table(head, lines)


def summary_table(bases):
    """What each row has over SFT of its time, by the first scorer; `bases` are the results of each base."""
    places = [(base, regime) for base in bases for regime in REGIMES]
    lines = []
    for row, sft in SFT_OF_ITS_TIME.items():
        compared = [
            compare(bases[base].get((regime, row), {}), bases[base].get((regime, sft), {})) for base, regime in places
        ]
        lines.append([row, *map(interval, compared)])
    return table(["row", *(f"{base} base, {WINNERS[regime]} winners" for base, regime in places)], lines)


def captions_table(bases):
    """From which captions the difference of four draws to SFT of their time comes: each one's part of it."""
    head, lines = [], []
    for base, results in bases.items():
        for regime in REGIMES:
            runs, sft = (results.get((regime, row), {}) for row in DRAWS)
            gained = [
                samples(runs[seed]).mean(1) - samples(sft[seed]).mean(1) for seed in sorted(set(runs) & set(sft))
            ]
            if gained:
                parts = np.mean(gained, axis=0)
                head = next(iter(runs.values()))["captions"]
                lines.append([base, regime, f"{parts.mean():+.3f}", *(f"{part / len(parts):+.3f}" for part in parts)])
    return table(["base", "regime", "difference", *head], lines)


def ranks(values):
    """The place of each value in the order of all; equal ones share theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


SIGNALS = ("gap/winner", "gap/rival", "implicit_accuracy", "dpo_fraction", "mse/policy_winner", "mse/policy_rival")


def signals_table(places):
    """
    Whether a curve tells a good run: the rank correlation, over runs, of its mean in the second half with the score.

    Args:
        places: {name: results}; a regime of one is a line for all SSPO rows, and one for those without a switch.
    """
    lines = []
    for place, results in places.items():
        for regime in REGIMES:
            every = [
                (run["settings"]["ssr"], samples(run).mean(), [np.mean(run["curves"][name][10:]) for name in SIGNALS])
                for (of, _), runs in results.items()
                for run in runs.values()
                if of == regime and "gap/winner" in run.get("curves", {})
            ]
            for rows, chosen in {"all": every, "no switch": [told for told in every if told[0] == "none"]}.items():
                _, scores, curves = zip(*chosen)
                told = [
                    # without a switch all have the same dpo_fraction
                    f"{np.corrcoef(ranks(scores), ranks(values))[0, 1]:+.2f}" if np.ptp(values) else ""
                    for values in zip(*curves)
                ]
                lines.append([place, regime, rows, str(len(chosen)), *told])
    return table(["part, base", "regime", "rows", "runs", *SIGNALS], lines)


def learning_rate(runs):
    (rate,) = {run["settings"]["learning_rate"] for run in runs.values()}
    return rate


def changes_table(bases, parents):
    """The confirmation's rows against the row that each changes; `bases` are the results of each base."""
    pairs = [(row, parent) for row, parent in parents.items() if parent not in (None, "sft matched")]
    pairs.append(("none, safeguarded", "none, rival 0.3"))
    head = ["base", "regime", "row", "against", "seeds", "score", "against's", "difference", "by the second scorer"]
    head += ["rivals that are clean", "switch agrees with the scorer"]
    lines = []
    for base, results in bases.items():
        for regime in REGIMES:
            for row, parent in pairs:
                runs, others = (results.get((regime, name), {}) for name in (row, parent))
                compared = compare(runs, others)
                if compared is None:
                    continue
                others = {seed: run for seed, run in others.items() if seed in runs}
                line = [base, regime, row, parent, str(compared["seeds"]), number(mean(runs)), number(mean(others))]
                line += [interval(compared), interval(compare(by_second(runs), by_second(others)))]
                lines.append([*line, *(number(curve(runs, name), 2) for name in ("rivals/clean", "switch/right"))])
    return table(head, lines)


def rates_table(results):
    """The confirmation's tuning: every trial, the best in bold. `results` are those of each base."""
    trials = {}
    for base, result in ((base, result) for base, told in results.items() for result in told):
        scores = trials.setdefault((base, result["regime"], result["row"]), {})
        scores.setdefault(result["settings"]["learning_rate"], []).append(float(samples(result).mean()))
    rates = sorted({rate for scores in trials.values() for rate in scores})
    lines = []
    for (base, regime, row), scores in sorted(
        trials.items(), key=lambda item: (item[0][0], item[0][1] != "plenty", ("sft" not in item[0][2], item[0][2]))
    ):
        shown = [", ".join(map(number, scores.get(rate, []))) for rate in rates]
        best = rates.index(max(scores, key=lambda rate: (len(scores[rate]), np.mean(scores[rate]))))
        shown[best] = f"**{shown[best]}**"
        lines.append([base, regime, row, *shown])
    return table(["base", "regime", "row", *(f"{rate:g}" for rate in rates)], lines)


def gradients_table(path):
    """The noise of the gradient against the draws."""
    told = json.loads(Path(path).read_text()) if Path(path).exists() else {}  # it is measured last
    head = ["regime", "loss", "draws", "timesteps", "noise over draws, pairs fixed", "over pairs and draws"]
    lines = [
        [regime, *name.split(", "), number(noise["fixed pairs"], 1), number(noise["all"], 1)]
        for regime, measured in told.items()
        for name, noise in measured.items()
    ]
    return table(head, lines)


def draws_table(bases):
    """Four draws a pair against SFT of their time; `bases` are the results of each."""
    lines = []
    for base, results in bases.items():
        for regime in REGIMES:
            runs, sft = (results.get((regime, row), {}) for row in DRAWS)
            compared = compare(runs, sft)
            if compared is not None:
                scores = [f"{mean(of):.3f}" for of in (runs, sft)]
                intervals = [interval(compared), interval(compared, "win_rate")]
                lines.append([base, regime, str(compared["seeds"]), *scores, *intervals])
    return table(["base", "regime", "seeds", *DRAWS, "difference", "win rate"], lines)


def ages_table(results, rows=("sign", "indicator", "none", "none, rival 0.3")):
    """
    What the age of the reference does: of iterations 2 to 4, each of which is five points of a curve.

    The age is in iterations: 0 is the newest entry of the bank. Which one was drawn is a function of the seed.
    """
    names = ("implicit_accuracy", "gap/winner", "gap/rival", "rivals/clean", "switch/right")
    values = {}
    for regime in REGIMES:
        for row in rows:
            for seed, run in results.get((regime, row), {}).items():
                bank = ReplayBank("", size=30, seed=seed)
                for iteration in (2, 3, 4):
                    age, piece = iteration - 1 - bank.draw(iteration), slice(5 * (iteration - 1), 5 * iteration)
                    told = [np.mean(run["curves"][name][piece]) for name in names]
                    values.setdefault((row, age), []).append(told)
    lines = [
        [row, str(age), str(len(told)), *map(number, np.mean(told, axis=0), (2, 5, 5, 2, 2))]
        for (row, age), told in sorted(values.items(), key=lambda item: (rows.index(item[0][0]), item[0][1]))
    ]
    head = ["row", "age", "iterations", "implicit_accuracy", "gap/winner", "gap/rival"]
    return table([*head, "rivals that are clean", "switch agrees with the scorer"], lines)


def tables(parents):
    """{marker: text} of all that the pages show between markers. `parents` has all rows, see scores_table."""
    results, second, again = read_all()
    told = {"pilots": pilots_table(trial_records("pilots")), "gradients": gradients_table(HERE / "gradients.json")}
    told["rates"] = rates_table({base: trial_records(f"pilots_again/{base}") for base in BASES})
    told["draws"] = draws_table({"first": results, "second": second})
    told["changes"] = changes_table(again, parents)
    told |= {"summary": summary_table(again), "captions": captions_table(again)}
    places = {"first part, first": results, "first part, second": second}
    told["signals"] = signals_table(places | {f"confirmation, {base}": again[base] for base in BASES})
    for base in BASES:
        for regime in REGIMES:
            told[f"again {base} {regime}"] = confirmation_table(again[base], regime)
    told["main long"] = scores_table(results, "long", dict.fromkeys(MAIN))
    told["ages"] = ages_table(results)
    for regime in REGIMES:
        told[f"main {regime}"] = scores_table(results, regime, dict.fromkeys(MAIN))
        told[f"second {regime}"] = scores_table(second, regime, dict.fromkeys([*MAIN, *DRAWS]))
        others = {row: parent for row, parent in parents.items() if row not in MAIN}
        told[f"others {regime}"] = scores_table(results, regime, others)
        told[f"curves {regime}"] = curves_table(results, regime, parents)
    return told


PAGES = ("appendix_first.md",)


def fill_in(pages, told):
    """
    The pages with what is between `<!-- NAME -->` and `<!-- end -->` replaced.

    Args:
        pages: {file name: text}.
        told: {marker: text}; each has to have its place on one of the pages, and each place its text.
    """
    placed = [name for text in pages.values() for name in re.findall("<!-- (.+?) -->", text) if name != "end"]
    if sorted(placed) != sorted(told):
        raise ValueError(f"the pages' places and the tables differ: {sorted(set(placed) ^ set(told))}")
    filled = {}
    for page, text in pages.items():
        filled[page] = re.sub(
            "<!-- (?!end)(.+?) -->.*?<!-- end -->",
            lambda found: f"<!-- {found[1]} -->\n{told[found[1]]}\n<!-- end -->",
            text,
            flags=re.DOTALL,
        )
    return filled


# ------------------------------------------------------------------------------------------------------------------
# Plots
# ------------------------------------------------------------------------------------------------------------------


def plot_scores(results, rows):
    """Score by row: a dot for each seed, a bar for their mean, the ceiling as a line."""
    shown = [row for row in rows if any((regime, row) in results for regime in REGIMES)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.28 * len(shown)), sharex=True, sharey=True)
    for axis, regime in zip(axes, REGIMES):
        for place, row in enumerate(reversed(shown)):
            runs = results.get((regime, row), {})
            values = [samples(run).mean() for run in runs.values()]
            colour = COLOURS.get(row, "#444444")
            axis.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.7)
            if values:
                axis.plot([np.mean(values)] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2)
        axis.axvline(0.966, color="#bbbbbb", linestyle=":")
        axis.set_title(f"{regime}: {WINNERS[regime]} winners")
        axis.set_yticks(range(len(shown)), list(reversed(shown)))
        axis.set_xlabel("score on test captions")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return figure


def plot_confirmation(bases):
    """What each row has over SFT of its time, on each base and in each regime, by both scorers."""
    rows = [row for row in SFT_OF_ITS_TIME if any((regime, row) in of for of in bases.values() for regime in REGIMES)]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharex=True, sharey=True)
    places = [(base, regime) for base in bases for regime in REGIMES]
    for axis, (base, regime) in zip(axes, places):
        for place, row in enumerate(reversed(rows)):
            runs, sft = (bases[base].get((regime, name), {}) for name in (row, SFT_OF_ITS_TIME[row]))
            for shift, marker, judged in ((0.13, "o", lambda of: of), (-0.13, "s", by_second)):
                compared = compare(judged(runs), judged(sft))
                if compared is None:
                    continue
                middle, low, high = compared["difference"]
                error = [[middle - low], [high - middle]]
                colour = COLOURS.get(row, "#444444")
                axis.errorbar(middle, place + shift, None, error, fmt=marker, color=colour, capsize=3, markersize=5)
        axis.axvline(0, color="#888888", linewidth=1)
        axis.set_yticks(range(len(rows)), list(reversed(rows)))
        axis.set_title(f"{base} base, {WINNERS[regime]} winners", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("score − score of SFT of the same time (round: first scorer, square: second)", fontsize=10)
    figure.tight_layout()
    return figure


def plot_cost(results):
    """Score against the processor's seconds, half way and at the end, with intervals over captions and seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, regime in zip(axes, REGIMES):
        for row in MAIN[1:]:
            runs = results.get((regime, row))
            if not runs:
                continue
            seconds = np.median([run["seconds"] for run in runs.values()])
            values = [np.stack([samples(run).mean(1) for run in of.values()]) for of in (half_way(runs), runs)]
            middle = np.array([value.mean() for value in values])
            low, high = np.transpose([crossed_bootstrap(value) for value in values])
            error = np.stack([middle - low, high - middle]).clip(0)
            axis.errorbar([seconds / 2, seconds], middle, error, fmt="o-", color=COLOURS[row], capsize=3, label=row)
        if ("plenty", "base") in results:
            axis.axhline(mean(results["plenty", "base"]), color=COLOURS["base"], linestyle=":", label="base")
        axis.set_title(f"{regime}: {WINNERS[regime]} winners")
        axis.set_xlabel("training, seconds of one core")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score on test captions")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def plot_curves(results):
    """What there is to watch while it trains: mean over seeds, with the range as a band."""
    names = {"dpo_fraction": "share of s = +1", "implicit_accuracy": "implicit accuracy"}
    names |= {
        "gap/winner": "gap of the winner",
        "gap/rival": "gap of the rival",
        "rivals/clean": "rivals that are clean",
    }
    figure, axes = plt.subplots(len(REGIMES), len(names), figsize=(13, 5), sharey="col")
    for line, regime in zip(axes, REGIMES):
        for axis, (name, title) in zip(line, names.items()):
            for row in ("sign", "indicator", "none", "none, rival 0.3"):
                runs = results.get((regime, row))
                if not runs:
                    continue
                steps = next(iter(runs.values()))["curves"]["step"]
                values = np.array([run["curves"][name] for run in runs.values()])
                axis.plot(steps, values.mean(0), color=COLOURS[row], label=row)
                axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[row], alpha=0.12, linewidth=0)
            axis.set_title(f"{regime}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def picture_sheet(folder, results, rows, seed, regimes):
    """
    The rows' first pictures of one training seed, by the same noise: the strips that the runs left in `folder`.

    Returns:
        a PIL picture, or None where not all the runs of `results` were made on this machine: strips are in no table.
    """
    strips = [("base", folder / "plenty" / "base-0.png")]
    for regime in regimes:
        there = [row for row in rows if seed in results.get((regime, row), {})]
        strips += [(f"{regime}: {row}", folder / regime / f"{file_name(row)}-{seed}.png") for row in there]
    if not all(path.exists() for _, path in strips):
        return None
    return labelled([(name, Image.open(path).convert("RGB")) for name, path in strips])


def labelled(pictures, left=150):
    """A sheet of strips, one below the other, each behind its name: `pictures` are pairs of the two."""
    width, height = pictures[0][1].size
    canvas = Image.new("RGB", (left + width, len(pictures) * (height + 2)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for place, (name, picture) in enumerate(pictures):
        canvas.paste(picture, (left, place * (height + 2)))
        pen.text((left - 6, place * (height + 2) + height / 2), name, "black", font, anchor="rm")
    return canvas.quantize(128)


def write(strips, parents):
    """The pages' tables and the plots, from data/first, and the sheets of pictures from the runs' `strips`."""
    results, second, again = read_all()
    pages = {name: (HERE / name).read_text() for name in PAGES}
    for name, text in fill_in(pages, tables(parents)).items():
        (HERE / name).write_text(text)
    for name, figure in {
        "scores": plot_scores(results, parents),
        "scores_second": plot_scores(second, [*MAIN, *DRAWS]),
        "confirmation": plot_confirmation(again),
        "cost": plot_cost(results),
        "curves": plot_curves(results),
    }.items():
        figure.savefig(HERE / f"{name}.png", dpi=80, metadata={"Software": None})
        plt.close(figure)
    confirmed = ("sft matched", "sft, 500 updates", *MAIN[3:], "4 draws")
    sheets = {"pictures": picture_sheet(strips / "results", results, MAIN[1:], 0, (*REGIMES, "long"))}
    for base in BASES:
        shown = picture_sheet(strips / "results_again" / base, again[base], confirmed, 5, REGIMES)
        sheets[f"pictures_{base}"] = shown
    for name, sheet in sheets.items():
        if sheet:
            sheet.save(HERE / f"{name}.png", optimize=True)
