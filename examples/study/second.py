"""The second study: does self-sampling go on where fine-tuning stops?

plan.md, committed before the main runs, says what is run and concluded; here it is as data. A run is one training by
train_sspo_sd.py and what its pictures are like. It leaves one file in work/runs (ignored by git) and is not run again
while that file, or its line in data/runs.csv, is there: the study can be stopped and continued at any time.

    python examples/study/second.py run --workers 2  # what is missing, in the plan's order
    python examples/study/second.py tune             # the same, but no main runs: the plan has a step before them
    python examples/study/second.py collect          # work/runs into data/ (data/columns.md tells the columns)
    python examples/study/second.py status           # how much of the plan is there
"""

# ruff: noqa: E402, I001
import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import study  # first: it sets the number of threads and the path
import datasets
import diffusers
import measures
import numpy as np
import torch
from glyphs import CAPTIONS, WINNER_SEEDS, degrade, is_degraded, render, write_winners
from records import read_csv, update
from safetensors.torch import load_file, save_file
from scorer import load_scorer, scores, to_tensor
from second_scorer import load_second_scorer

import train_sspo_sd as script


HERE = Path(__file__).resolve().parent
WORK, DATA = HERE / "work", HERE / "data"

# ------------------------------------------------------------------------------------------------------------------
# The plan as data
# ------------------------------------------------------------------------------------------------------------------

TUNING, SEEDS = (100, 101, 102), tuple(range(10))
# Of the rows beside the family, and of T2: with seed 0 every random reference is the start.
LATER, DEGRADED = (3, 4, 6, 7), (1, 2, 3)
HELD_OUT = 12  # captions of a seed that no winner shows
STEPS = 10  # of the sampler, for rivals and for pictures
GUIDANCES = (1.0, 1.5, 2.0, 3.0)  # those that the tuning tries
PICTURES = {
    "tuning": {"held out": 8},
    "main": {"held out": 24, "aligned": 12},
    "finer": {"held out": 24},
}  # of a caption
FINER = 20  # steps, with which the first seeds' pictures are drawn once more
PER_CAPTION = 100  # winners

COMMON = {"resolution": 64, "train_mode": "full", "train_batch_size": 16}
COMMON |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5}
COMMON |= {"mixed_precision": "no", "report_to": "none", "checkpointing_steps": 1_000_000}
SFT = {"loss_type": "sft", "max_train_steps": 840}
SSPO = {"max_train_steps": 60, "draws_per_pair": 4, "replay_steps": 15, "rollout_steps": STEPS}
RATES = [{"learning_rate": rate} for rate in (3e-5, 1e-4, 3e-4, 1e-3)]
SSPO_GRID = [{"learning_rate": rate, "beta_dpo": beta} for beta in (200.0, 2000.0) for rate in (3e-5, 1e-4)]
HINGE_GRID = [{"learning_rate": rate, "margin": margin} for margin in (0.01, 0.001) for rate in (3e-5, 1e-4)]
# The neighbour that is tried too where a row's best setting lies at the edge of its grid.
BEYOND = {"learning_rate": {3e-5: 1e-5, 1e-4: 3e-4, 1e-3: 3e-3}, "margin": {0.001: 1e-4}}
START_RATES = (5e-4, 1e-3, 1e-4, 2.5e-4)  # the last two came later: see the plan's end
START_GRID = [{"learning_rate": rate, "max_train_steps": n} for n in (1500, 3000) for rate in START_RATES]
AVERAGES = tuple(f"average {decay}" for decay in (0.98, 0.99, 0.995))
FACTORS = tuple(f"k {k}" for k in (1.1, 1.2, 1.35, 1.5, 1.75))


@dataclass(frozen=True)
class Row:
    """A method: what it adds to COMMON, the settings that its tuning tries, and the weights that it offers."""

    flags: dict = field(default_factory=dict)
    grid: tuple = ({},)
    models: tuple = ("end",)  # the last weights, averages of all of them, or base + k (start - base)
    like: str | None = None  # the row whose tuned settings it takes
    of: str | None = None  # the row whose runs it shares

    @property
    def trained(self):
        return bool(self.flags)


UNPAIRED = {**SSPO, "ssr": "none", "unpaired": True}
ROWS = {
    "start": Row(models=("k 1.0",)),
    "sft constant": Row(SFT, RATES),
    "sft decaying": Row({**SFT, "lr_scheduler": "cosine"}, RATES),
    "sft averaged": Row(SFT, RATES, AVERAGES, of="sft constant"),
    "extrapolated": Row(models=FACTORS),
    "sign": Row({**SSPO, "ssr": "sign"}, SSPO_GRID),
    "indicator": Row({**SSPO, "ssr": "indicator"}, SSPO_GRID),
    "none, rival 0.3": Row({**SSPO, "ssr": "none", "rival_weight": 0.3}, SSPO_GRID),
    "hinge": Row({**SSPO, "ssr": "none"}, HINGE_GRID),
    "unpaired": Row(UNPAIRED, SSPO_GRID),
    "unpaired, rival 0.3": Row({**UNPAIRED, "rival_weight": 0.3}, SSPO_GRID),
    "unpaired, rival 4": Row({**UNPAIRED, "rival_weight": 4.0}, SSPO_GRID),
    # Not tuned: one change to "unpaired"
    "unpaired, latest": Row({**UNPAIRED, "reference": "latest"}, like="unpaired"),
    "unpaired, initial": Row({**UNPAIRED, "reference": "initial"}, like="unpaired"),
    "unpaired, base": Row({**UNPAIRED, "reference": "initial"}, like="unpaired"),  # the base, not the start
    # What is left of it without the rival, and SFT in as large updates: both of the same work
    "unpaired, no rival": Row({**UNPAIRED, "rival_weight": 0.0}, like="unpaired"),
    "sft, 4 draws": Row({"loss_type": "sft", "max_train_steps": 210, "draws_per_pair": 4}, like="sft constant"),
}
SFT_ROWS = ("sft constant", "sft decaying", "sft averaged")
FAMILY = ("sign", "indicator", "none, rival 0.3", "hinge", "unpaired", "extrapolated")
TUNED = tuple(row for row in ROWS if ROWS[row].like is None)
T1_FIRST = ("start", *SFT_ROWS, *FAMILY)  # all seeds
T1_THEN = ("unpaired, rival 0.3", "unpaired, rival 4", "unpaired, latest", "unpaired, initial")  # LATER seeds
T1_THEN += ("unpaired, no rival", "sft, 4 draws")
T2 = ("start", "extrapolated", "unpaired", "unpaired, latest", "unpaired, base")  # and the best SFT
SHARES = (0.2, 0.4)  # of T2's winners that are degraded


def held_out(seed):
    """(captions that no winner of this seed shows, all others); ten seeds in a row have each caption three times."""
    order = np.random.default_rng(16).permutation(CAPTIONS).tolist()
    mine = [order[(HELD_OUT * seed + place) % len(order)] for place in range(HELD_OUT)]
    return mine, [caption for caption in order if caption not in mine]


def measured(seed):
    """(held-out captions of a seed, as many of those that its winners show): both move on with the seed."""
    mine, others = held_out(seed)
    first = HELD_OUT * seed % len(others)
    return mine, (others[first:] + others[:first])[:HELD_OUT]


@dataclass(frozen=True)
class Run:
    """
    One training, or none, and the models that are measured after it.

    `task` is start, T1 or T2; `settings` what the tuning varies; `guidances` and `steps` are of the pictures; `share`
    is that of degraded winners.
    """

    task: str
    base: str
    row: str
    seed: int
    settings: tuple = ()
    models: tuple = ("end",)
    guidances: tuple = GUIDANCES
    share: float = 0.0
    steps: int = STEPS

    @property
    def name(self):
        settings = [f"{name}={value:g}" for name, value in self.settings]
        share = [f"{self.share:g} degraded"] if self.share else []
        steps = [f"{self.steps} steps"] if self.steps != STEPS else []
        return " ".join([self.task, self.base, self.row, *settings, *share, "seed", str(self.seed), *steps])

    @property
    def stage(self):
        return "tuning" if self.seed in TUNING else "main" if self.steps == STEPS else "finer"

    @property
    def trained(self):
        return ROWS[self.row].trained and self.stage != "finer"

    @property
    def result(self):
        return WORK / "runs" / f"{self.name}.json"

    # What study.run_all prints and names its logs by.
    @property
    def regime(self):
        return f"{self.task} {self.base}"

    def flags(self):
        """Those of train_sspo_sd.py but for files, and `margin`, which is none of its."""
        flags = {**COMMON, **ROWS[self.row].flags, **dict(self.settings), "seed": self.seed}
        if self.task != "start" and self.stage == "main":
            flags["seed"] += 1000  # else SFT would meet the noise again that its start was trained on
        if self.task == "start":
            flags["checkpointing_steps"] = 250  # it is long, and resumes
        elif "half" in self.models:
            flags["checkpointing_steps"] = flags["max_train_steps"] // 2
        return flags

    def command_line(self, start, winners, output):
        files = {"pretrained_model_name_or_path": start, "train_data_dir": winners, "output_dir": output}
        words = ["--cache_latents"]
        for flag, value in (files | self.flags()).items():
            words += [] if flag == "margin" else [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        return words


def settings_of(trial):
    return tuple(sorted(trial.items()))


# ------------------------------------------------------------------------------------------------------------------
# What the tuning chose
# ------------------------------------------------------------------------------------------------------------------


def told(run):
    """The record of a run that is there, from its file or from data/, or None."""
    if run.result.exists():
        return json.loads(run.result.read_text())
    return collected().get(run.name)


@functools.cache
def collected():
    """{name: record} of data/: its start, numbers and curves, and what was measured of each caption."""
    records = {}
    for line in read_csv(DATA / "runs.csv"):
        numbers = {name: float(line[name]) for name in ("error", "seconds", "forwards", "backwards")}
        records[line["run"]] = {"start": line["start"], **numbers, "captions": []}
    for line in read_csv(DATA / "captions.csv.gz"):
        numbers = {name: float(line[name]) for name in ("guidance", *LINES[5:]) if line.get(name)}
        records[line["run"]]["captions"].append(line | numbers)
    for line in read_csv(DATA / "curves.csv.gz"):
        curves = records[line["run"]].setdefault("curves", {})
        curves.setdefault(line["name"], []).append(float(line["value"]))
    return records


def start_trials(base):
    return [Run("start", base, "sft decaying", TUNING[0], settings_of(trial), ()) for trial in START_GRID]


def start_of(base, seed, share=0.0):
    """The run that makes the checkpoint from which T1 and T2 branch: SFT to the least error on unseen renders."""
    best = min(start_trials(base), key=lambda run: told(run)["error"])
    return Run("start", base, "sft decaying", seed, best.settings, (), share=share)


def trials(base, row, seed, grid=None):
    owner = ROWS[row].of or row
    models = [model for name, other in ROWS.items() if owner in (name, other.of) for model in other.models]
    grid = ROWS[row].grid if grid is None else grid
    return [Run("T1", base, owner, seed, settings_of(trial), tuple(models)) for trial in grid]


def mean_mmd(runs, model, guidance):
    """Over the held-out captions of all the runs."""
    lines = [line for run in runs for line in told(run)["captions"] if line["part"] == "held out"]
    return np.mean([line["mmd"] for line in lines if (line["model"], line["guidance"]) == (model, guidance)])


def criterion(runs, model):
    """What the tuning minimises: the mean of the MMD without guidance and of that at the best guidance."""
    values = [mean_mmd(runs, model, guidance) for guidance in GUIDANCES]
    return (values[0] + min(values)) / 2


def ranked(base, row, grid, seeds):
    """[(criterion, settings, model)] of all models of the settings over some tuning seeds, the best first."""
    found = []
    for trial in grid:
        runs = [run for seed in seeds for run in trials(base, row, seed, [trial])]
        found += [(criterion(runs, model), trial, model) for model in ROWS[row].models]
    return sorted(found, key=lambda one: one[0])


def neighbours(trial, tried):
    """The settings beyond an edge of the grid on which `trial` lies, but for those that were tried."""
    further = [{**trial, name: BEYOND.get(name, {}).get(value, value)} for name, value in trial.items()]
    return [other for other in further if other not in tried]


def beyond(base, row):
    """The settings that are tried too since the best with the first tuning seed lies at an edge of the grid."""
    (_, best, _), *_ = ranked(base, row, ROWS[row].grid, TUNING[:1])
    return neighbours(best, ROWS[row].grid)


def best_two(base, row):
    """The two settings that do best with the first tuning seed: these get the other seeds."""
    tried = [*ROWS[row].grid, *beyond(base, row)]
    order = [settings_of(trial) for _, trial, _ in ranked(base, row, tried, TUNING[:1])]
    return [dict(settings) for settings in dict.fromkeys(order)][:2]


def beyond_all(base, row):
    """The settings that get all seeds since the best over all seeds lies at an edge beyond which none was tried."""
    (_, best, _), *_ = ranked(base, row, best_two(base, row), TUNING)
    return neighbours(best, [*ROWS[row].grid, *beyond(base, row)])


@functools.cache
def chosen(base, row):
    """(settings, model, guidance) of a row: the best over the three tuning seeds."""
    if ROWS[row].like:
        return chosen(base, ROWS[row].like)
    tried = [*best_two(base, row), *beyond_all(base, row)]
    (_, settings, model), *_ = ranked(base, row, tried, TUNING)
    runs = [run for seed in TUNING for run in trials(base, row, seed, [settings])]
    guidance = min(GUIDANCES, key=lambda guidance: mean_mmd(runs, model, guidance))
    return runs[0].settings, model, guidance


def best_sft(base):
    """The row of SFT that the others are compared with: the one that the tuning found best."""

    def value(row):
        settings, model, _ = chosen(base, row)
        return criterion([run for seed in TUNING for run in trials(base, row, seed, [dict(settings)])], model)

    return min(SFT_ROWS, key=value)


# ------------------------------------------------------------------------------------------------------------------
# The order of the runs
# ------------------------------------------------------------------------------------------------------------------


def main_run(task, base, row, seed, share=0.0):
    """Rows whose settings agree may share a run (the weights and their average): it is drawn for all of them."""
    settings, _, _ = chosen(base, row)
    owner = ROWS[row].of or row
    sharing = [chosen(base, name) for name, other in ROWS.items() if owner in (name, other.of)]
    _, models, guidances = zip(*(one for one in sharing if one[0] == settings))
    half = ["half"] if ROWS[row].trained else []
    models = sorted(models, key="end".__eq__)  # last, so that the record's error is its own
    return Run(task, base, owner, seed, settings, (*half, *models), tuple(sorted({1.0, *guidances})), share)


def finer_runs():
    """The main runs of the first seeds whose weights were kept on this machine: their pictures in twice the steps."""
    for seed in SEEDS[:3]:
        for run in dict.fromkeys(main_run("T1", base, row, seed) for base in study.BASES for row in T1_FIRST):
            models = tuple(model for model in run.models if model != "half")
            if all(kept(run, model).exists() for model in models):
                yield replace(run, models=models, steps=FINER)


def tuning_stages():
    """Functions that give runs, each to be called when those of the one before are there."""
    for base in study.BASES:
        yield lambda base=base: start_trials(base)
        yield lambda base=base: [start_of(base, seed) for seed in TUNING]
        yield lambda base=base: [run for row in TUNED for run in trials(base, row, TUNING[0])]
        yield lambda base=base: [run for row in TUNED for run in trials(base, row, TUNING[0], beyond(base, row))]
        yield lambda base=base: [
            run for row in TUNED for seed in TUNING[1:] for run in trials(base, row, seed, best_two(base, row))
        ]
        yield lambda base=base: [
            run for row in TUNED for seed in TUNING for run in trials(base, row, seed, beyond_all(base, row))
        ]


def main_stages():
    """The same of the main runs, for when the tuning is there."""
    for seed in SEEDS:
        yield lambda seed=seed: [start_of(base, seed) for base in study.BASES]
        yield lambda seed=seed: [main_run("T1", base, row, seed) for base in study.BASES for row in T1_FIRST]
        if seed == SEEDS[2]:  # as soon as they can be: the weights are on this machine alone
            yield finer_runs
        if seed in LATER:  # while the seed's start is on this machine: see the plan's end
            yield lambda seed=seed: [main_run("T1", base, row, seed) for base in study.BASES for row in T1_THEN]
    for seed in DEGRADED:
        yield lambda seed=seed: [start_of("first", seed, share) for share in SHARES]
        yield lambda seed=seed: [
            main_run("T2", "first", row, seed, share) for share in SHARES for row in (*T2, best_sft("first"))
        ]


def stages():
    """All of the plan."""
    yield from tuning_stages()
    yield from main_stages()


# ------------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------------


def hinge_loss(policy_winner, policy_rival, reference_winner, reference_rival, *_, margin):
    """The loss of Diffusion-DRO (arXiv 2510.18353), max(0, margin + gap_w - gap_r), on what sspo_loss is given."""
    gap_winner, gap_rival = policy_winner - reference_winner, policy_rival - reference_rival
    loss = (margin + gap_winner - gap_rival).clamp(min=0).mean()
    return loss, {"gap/winner": gap_winner.detach().mean(), "gap/rival": gap_rival.detach().mean()}


def extrapolated(base, other, k):
    """base + k (other - base), weight by weight."""
    return {name: weight + k * (other[name] - weight) for name, weight in base.items()}


@contextlib.contextmanager
def patched(run, notes):
    """
    The script, with what a row wants that no flag of it can do, and with a count of what it costs.

    Args:
        notes: gets `seconds` of the processor in the loop of updates; `forwards`, the latents that the denoiser was
            called on, and `backwards`, those of them with a gradient; and `averages`, {decay: weights}.
    """
    notes.update({"seconds": 0.0, "forwards": 0, "backwards": 0, "averages": {}})
    decays = [float(name.removeprefix("average ")) for name in run.models if name.startswith("average")]
    predict, prepare, write_metrics = script.predict, script.prepare_denoiser, script.write_metrics
    load, weights = script.ReplayBank.load, {}

    def counted(denoiser, noisy, *others):
        notes["forwards"] += len(noisy)
        notes["backwards"] += len(noisy) * torch.is_grad_enabled()
        return predict(denoiser, noisy, *others)

    def prepared(models, *others):
        prepare(models, *others)
        weights.update(models.denoiser.named_parameters())
        for decay in decays:
            notes["averages"][decay] = {name: weight.detach().clone() for name, weight in weights.items()}

    def averaged(args, metrics):
        write_metrics(args, metrics)
        for decay, average in notes["averages"].items():
            torch._foreach_lerp_([*average.values()], [weights[name].detach() for name in average], 1 - decay)

    def load_or_base(bank, index):
        unet = study.BASES[run.base] / "unet" / "diffusion_pytorch_model.safetensors"
        return {name: weight.float() for name, weight in load_file(unet).items()} if index == 0 else load(bank, index)

    patches = {"predict": counted, "prepare_denoiser": prepared, "write_metrics": averaged}
    if run.row == "hinge":
        patches["sspo_loss"] = functools.partial(hinge_loss, margin=dict(run.settings)["margin"])
    with contextlib.ExitStack() as stack:
        for name in ("make_loader", "save_result"):  # time_the_loop's
            stack.enter_context(mock.patch.object(script, name, getattr(script, name)))
        study.time_the_loop(notes)
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(script, name, function))
        if run.row == "unpaired, base":
            stack.enter_context(mock.patch.object(script.ReplayBank, "load", load_or_base))
        yield


@contextlib.contextmanager
def only_one(name, wait=True):
    """Of the processes that are side by side; without `wait`, BlockingIOError where another one is there."""
    WORK.mkdir(exist_ok=True)
    with (WORK / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def alone(name, function):
    """The function, which waits for other processes that are in one of this name."""

    @functools.wraps(function)
    def waiting(*given):
        with only_one(name):
            return function(*given)

    return waiting


def winner(run, caption, index):
    """One of the run's winners, a PIL picture."""
    seed = WINNER_SEEDS + 1000 * run.seed + index
    picture = render(caption, seed)
    return degrade(picture, caption, seed) if is_degraded(caption, seed, run.share) else picture


def winners_of(run):
    """The folder of a seed's winners, written if it is missing; the same for all rows of the seed."""
    _, aligned = held_out(run.seed)
    folder = WORK / "winners" / f"seed {run.seed}, {100 * run.share:.0f} % degraded"
    with only_one("winners"):
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            write_winners(partial, PER_CAPTION, aligned, WINNER_SEEDS + 1000 * run.seed)
            for name in aligned if run.share else ():
                for index in range(PER_CAPTION):
                    winner(run, name, index).save(partial / f"{name.replace(' ', '-')}-{index:03d}.png")
            partial.rename(folder)
    return folder


def start_folder(run):
    """The pipeline that a run starts from: the base, or what SFT made of it, trained now if it is missing."""
    if run.task == "start":
        return study.BASES[run.base]
    start = start_of(run.base, run.seed, run.share)
    folder = WORK / "starts" / start.name
    with only_one("start"):
        if not folder.exists():
            carry_out(start)
    return folder


def train(run, folder):
    """Trains into `folder`. Returns notes (see `patched`) and curves."""
    args = script.parse_args(run.command_line(start_folder(run), winners_of(run), folder))
    args.cache_dir = str(WORK / "datasets")
    if list(folder.glob("checkpoint-*")):
        args.resume_from_checkpoint = "latest"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").is_symlink():
        (WORK / "cache").mkdir(exist_ok=True)
        (folder / "cache").symlink_to(WORK / "cache")  # the latents are the same for all branches of a start
    notes = {}
    with patched(run, notes), contextlib.ExitStack() as stack:
        for place, name in ((script.LatentCache, "fill"), (script, "clean_up")):  # both write into the common folder
            stack.enter_context(mock.patch.object(place, name, alone("cache", getattr(place, name))))
        script.main(args)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return notes, study.thinned(lines)


def kept(run, model):
    """Where the weights of a main run are kept, in half precision, for what may yet have to be measured."""
    return WORK / "weights" / f"{replace(run, steps=STEPS).name} {model}.safetensors"


def weights_of(folder):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    return unet.state_dict()


def models_of(run, folder, notes):
    """Yields (name, the denoiser's weights) of all that is measured after a run."""
    for name in run.models:
        kind, _, value = name.partition(" ")
        if run.stage == "finer":
            yield name, load_file(kept(run, name))
        elif kind == "k":
            yield name, extrapolated(weights_of(study.BASES[run.base]), weights_of(start_folder(run)), float(value))
        elif kind == "average":
            yield name, notes["averages"][float(value)]
        else:
            checkpoints = script.list_checkpoints(folder).values()
            yield name, weights_of(folder if kind == "end" else next(iter(checkpoints)))


@functools.cache
def real(caption):
    """The features of unseen renders of a caption; computed once for all runs."""
    file = WORK / "real.safetensors"
    with only_one("real"):
        if not file.exists():
            made = {name: torch.from_numpy(measures.real_features(name).copy()) for name in CAPTIONS}
            save_file(made, file.with_suffix(".partial"))
            os.replace(file.with_suffix(".partial"), file)
    return load_file(file)[caption].numpy()


def draw(pipeline, texts, first_seed, guidance, steps):
    noise = [torch.Generator().manual_seed(first_seed + place) for place in range(len(texts))]
    return pipeline(texts, generator=noise, num_inference_steps=steps, guidance_scale=guidance).images


def first_noise(seed, part, place):
    """The seed of a caption's first picture; the others follow, and all rows have the same."""
    return 50_000_000 + 100_000 * seed + 50_000 * (part == "aligned") + 1000 * place


def measure(pipeline, run, model):
    """A dict for each guidance and caption: what data/columns.md names, and `pictures`, the scorers' word on each."""
    lines = []
    for guidance in run.guidances[:1] if model == "half" else run.guidances:
        for part, captions in zip(("held out", "aligned"), measured(run.seed)):
            count = PICTURES[run.stage].get(part, 0)
            for place, caption in enumerate(captions if count else ()):
                noise = first_noise(run.seed, part, place)
                pictures = draw(pipeline, [caption] * count, noise, guidance, run.steps)
                made = measures.features(to_tensor(pictures))
                precision, recall = measures.precision_recall(made, real(caption))
                line = {"model": model, "guidance": guidance, "part": part, "caption": caption}
                line |= {"mmd": measures.mmd(made, real(caption), measures.WIDTH)}
                line |= {"precision": precision, "recall": recall}
                if part == "aligned":
                    shown = [winner(run, caption, index) for index in range(PER_CAPTION)]
                    unseen = [render(caption, measures.UNSEEN + 1000 + index) for index in range(PER_CAPTION)]
                    line["memorisation"] = measures.memorisation(*map(pixels, (pictures, shown, unseen)))
                scorers = load_scorer(), load_second_scorer()
                judged = [scores(pictures, [caption] * count, scorer) for scorer in scorers]
                line["score"], line["second score"] = (verdict["score"].mean().item() for verdict in judged)
                line["spoiled"] = (judged[0]["preference"] < 0.5).float().mean().item()
                columns = [verdict[name].tolist() for verdict in judged for name in ("preference", "identity")]
                line["pictures"] = [[round(value, 3) for value in picture] for picture in zip(*columns)]
                lines.append({name: round(v, 5) if isinstance(v, float) else v for name, v in line.items()})
    return lines


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]) / 255


@functools.cache
def provenance():
    """Of the code that runs: asked for when the runs begin, since the folder may get another commit meanwhile."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = f"python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    return {"commit": commit.strip(), "versions": versions, "cpu": cpu[0]}


def carry_out(run):
    """Trains, measures and writes the result."""
    if run.result.exists() and run.task != "start":
        return
    for library in (study.diffusers_logging, study.transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    datasets.disable_progress_bars()
    record = {"run": run.name, "task": run.task, "base": run.base, "row": run.row, "seed": run.seed}
    record |= {"stage": run.stage, "winners": len(CAPTIONS[HELD_OUT:]) * PER_CAPTION, "degraded": run.share}
    record |= {"flags": run.flags() if run.trained else {}, **provenance()}
    record["date"] = time.strftime("%Y-%m-%d %H:%M")
    if run.task != "start":  # made again on another machine it may differ in its last bits
        unet = start_folder(run) / "unet" / "diffusion_pytorch_model.safetensors"
        record["start"] = hashlib.sha256(unet.read_bytes()).hexdigest()[:12]
    with contextlib.ExitStack() as stack:
        if run.task == "start":
            folder = WORK / "starts" / f"{run.name}.partial"
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        notes = {"seconds": 0.0, "forwards": 0, "backwards": 0}
        if run.trained:
            notes, record["curves"] = train(run, folder)
        record |= {name: notes[name] for name in ("seconds", "forwards", "backwards")}
        pipeline = study.load_pipeline(folder if run.task == "start" else study.BASES[run.base], "cpu")
        record["captions"] = []
        for model, weights in models_of(run, folder, notes):
            pipeline.unet.load_state_dict(weights)
            record["captions"] += measure(pipeline, run, model)
            if run.stage == "main":
                in_half = {name: weight.half().contiguous() for name, weight in weights.items()}
                script.write_tensors(kept(run, model), in_half)
        record["error"] = round(study.heldout_error(pipeline, CAPTIONS), 5)
        if run.task == "start":
            pipeline.to(torch.float16).save_pretrained(folder.with_suffix(".half"))
            shutil.rmtree(WORK / "starts" / run.name, ignore_errors=True)
            folder.with_suffix(".half").rename(WORK / "starts" / run.name)
    run.result.parent.mkdir(parents=True, exist_ok=True)
    partial = run.result.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    os.replace(partial, run.result)
    if run.task == "start":  # only now: until it has a result, a run that is killed resumes from its checkpoints
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------------
# The data
# ------------------------------------------------------------------------------------------------------------------

RUNS = ("run", "task", "stage", "base", "row", "seed", "winners", "degraded", "flags", "seconds", "forwards")
RUNS += ("backwards", "error", "start", "commit", "versions", "cpu", "date")
LINES = ("run", "model", "guidance", "part", "caption", "mmd", "precision", "recall", "memorisation", "score")
LINES += ("second score", "spoiled")
JUDGED = ("run", "model", "guidance", "part", "caption", "noise", "clean", "right", "second clean", "second right")
POINTS = ("run", "step", "name", "value")


def collect():
    """Writes data/: all records of work/runs, and what it had of other runs. Returns the number of runs."""
    records = [json.loads(path.read_text()) for path in sorted((WORK / "runs").glob("*.json"))]
    runs, captions, pictures, curves = [], [], [], []
    for record in records:
        run = {"run": record["run"]}
        runs.append(record | {"flags": json.dumps(record["flags"])})
        for line in record["captions"]:
            captions.append(line | run)
            for noise, values in enumerate(line["pictures"] if record["stage"] == "main" else ()):
                pictures.append(line | run | dict(zip(JUDGED[5:], (noise, *values))))
        for name, values in record.get("curves", {}).items():
            for step, value in zip(record["curves"]["step"], values):
                curves.append({**run, "step": step, "name": name, "value": value})
    tables = {"runs.csv": (RUNS, runs), "captions.csv.gz": (LINES, captions)}
    tables |= {"pictures.csv.gz": (JUDGED, pictures), "curves.csv.gz": (POINTS, curves)}
    update(DATA, tables, {record["run"] for record in records})
    return len(read_csv(DATA / "runs.csv"))


def run_all(workers, stages):
    """Runs what is missing, stage by stage. Returns the number of runs that failed; the stages after one wait."""
    provenance()
    with only_one("run", wait=False):
        for stage in stages:
            missing = [run for run in dict.fromkeys(stage()) if told(run) is None]
            if failed := study.run_all(missing, workers, WORK / "logs", carry_out):
                return failed
    return 0


def progress():
    """Yields (runs, how many of them are there) of each stage, as far as those before it tell which runs it has."""
    for stage in stages():
        runs = list(dict.fromkeys(stage()))
        there = sum(told(run) is not None for run in runs)
        if runs:
            yield runs, there
        if there < len(runs):
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "tune", "collect", "status"])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one core each (default: 2)")
    args = parser.parse_args()
    if args.command == "status":
        for number, (runs, there) in enumerate(progress()):
            print(f"stage {number}: {there} of {len(runs)} runs, from {runs[0].name!r} on")
        return
    wanted = {"run": stages, "tune": tuning_stages}.get(args.command)
    failed = run_all(args.workers, wanted()) if wanted else 0
    print(f"{collect()} runs in {DATA}")
    if failed:
        raise SystemExit(f"{failed} runs failed: see {WORK / 'logs'}")


if __name__ == "__main__":
    main()
