"""The study: does SSPO bring more than fine-tuning on the same winners, and by which of its parts?

A run is one training by train_sspo_sd.py on an emoji base, then pictures of captions that it never saw, judged by
examples/quickstart/scorer.py. Each leaves one file in work/first (ignored by git) and is not run again while that file
or its line in data/first/runs.csv is there, so the study can be stopped and continued. What is run and concluded was
written down in plan_first.md before the runs.

    python examples/study/study.py run                  # what is missing, in the plan's order, then the report
    python examples/study/study.py run --rows sft sign  # some rows
    python examples/study/study.py second               # the main rows on the second base
    python examples/study/study.py later                # what the plan adds, on both
    python examples/study/study.py again                # the confirmation: tuning of its own, fresh seeds, two scorers
    python examples/study/study.py pilot                # the tuning, on captions and seeds of its own
    python examples/study/study.py report               # the runs into data/first, from it tables and plots
"""

# ruff: noqa: E402
import argparse
import inspect
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path


# Before torch is imported: a run is one process on one core, and its models are too small for more.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1], HERE.parent / "benchmark", HERE.parent / "quickstart"):
    sys.path.insert(0, str(folder))

import datasets
import numpy as np
import report
import torch
from benchmark import expected_calls
from diffusers import DDPMScheduler
from diffusers.utils import logging as diffusers_logging
from glyphs import HELD_OUT, TEST_SEEDS, WINNER_SEEDS, render, write_winners
from PIL import Image
from quickstart import load_aligned, load_pipeline
from records import update
from scorer import judge, load_scorer, scores, to_tensor
from second_scorer import load_second_scorer
from transformers.utils import logging as transformers_logging

import train_sspo_sd as script


BASES = {"first": HERE.parent / "quickstart" / "base", "second": HERE / "base"}
WORK = HERE / "work" / "first"

# Of the captions that no winner has, a third chose the settings (plan_first.md); the others are only for the results.
SELECTION = HELD_OUT[::3]
TEST = [caption for caption in HELD_OUT if caption not in SELECTION]


# ------------------------------------------------------------------------------------------------------------------
# The plan as data
# ------------------------------------------------------------------------------------------------------------------

# Guidance favours clean pictures by itself: at the quickstart's 3 there would be little left to prefer.
SAMPLER = {"num_inference_steps": 10, "guidance_scale": 1.5}
COMMON = {
    "resolution": 64,
    "rank": 16,
    "train_batch_size": 8,
    "replay_steps": 10,
    "rollout_steps": SAMPLER["num_inference_steps"],
    "mixed_precision": "no",
    "report_to": "none",
}


@dataclass(frozen=True)
class Regime:
    """`winners` of each of the 28 aligned captions, and how long is trained on them."""

    winners: int
    updates: int
    matched_updates: int  # of SFT, in the time that SSPO takes for `updates`


REGIMES = {"plenty": Regime(20, 40, 300), "few": Regime(1, 40, 300), "long": Regime(1, 120, 900)}


@dataclass(frozen=True)
class Row:
    """A method: the settings that it adds to COMMON. Rows of a lower tier run first."""

    tier: int
    flags: dict = field(default_factory=dict)
    like: str | None = None  # the row whose tuned settings it takes
    matched: bool = False  # whether it trains for as long as SSPO does, not for as many updates
    switch: str | None = None  # what decides it in place of the errors: coin, oracle
    updates: int | None = None  # in place of the regime's
    redrawn: bool = False  # whether the reference is drawn for every update, not for an iteration
    safeguarded: bool = False  # whether the rival's gradient is held back where it would raise the winner's error


ROWS = {
    "base": Row(1),
    "sft": Row(1, {"loss_type": "sft"}),
    "sft matched": Row(1, {"loss_type": "sft"}, matched=True),
    "sign": Row(1, {"ssr": "sign"}),
    "indicator": Row(1, {"ssr": "indicator"}),
    "none": Row(1, {"ssr": "none"}),
    "none, rival 0.3": Row(1, {"ssr": "none", "rival_weight": 0.3}),
    # Controls
    "winner only": Row(2, {"ssr": "none", "rival_weight": 0.0}, like="none"),
    "sign by coin": Row(2, {"ssr": "sign"}, like="sign", switch="coin"),
    "sign by oracle": Row(2, {"ssr": "sign"}, like="sign", switch="oracle"),
    "indicator by oracle": Row(2, {"ssr": "indicator"}, like="indicator", switch="oracle"),
    "sign, scope iteration": Row(2, {"ssr": "sign", "ssr_scope": "iteration"}, like="sign"),
    "indicator, scope iteration": Row(2, {"ssr": "indicator", "ssr_scope": "iteration"}, like="indicator"),
    # Ablations
    **{
        name: Row(3, {"ssr": "none", "rival_weight": 0.3, **change}, like="none, rival 0.3")
        for name, change in {
            "rivals at guidance 1.5": {"rollout_guidance_scale": 1.5},
            "rivals at guidance 3": {"rollout_guidance_scale": 3.0},
            "rivals at guidance 7.5": {"rollout_guidance_scale": 7.5},
            "reference latest": {"reference": "latest"},
            "reference initial": {"reference": "initial"},
            "4 draws": {"draws_per_pair": 4},
            "beta 100": {"beta_dpo": 100.0},
            "beta 500": {"beta_dpo": 500.0},
            "beta 5000": {"beta_dpo": 5000.0},
            "rival weight 0.1": {"rival_weight": 0.1},
            "sft_weight 100": {"sft_weight": 100.0},
            "rollout_strength 0.7": {"rollout_strength": 0.7},
        }.items()
    },
    # Later
    "sft, 500 updates": Row(4, {"loss_type": "sft"}, like="sft matched", updates=500),  # in the time of 4 draws
    "2 draws": Row(4, {"ssr": "none", "rival_weight": 0.3, "draws_per_pair": 2}, like="none, rival 0.3"),
    "8 draws": Row(4, {"ssr": "none", "rival_weight": 0.3, "draws_per_pair": 8}, like="none, rival 0.3"),
    "reference drawn each update": Row(4, {"ssr": "none", "rival_weight": 0.3}, like="none, rival 0.3", redrawn=True),
    "none, reference latest": Row(4, {"ssr": "none", "reference": "latest"}, like="none"),  # as SPIN-Diffusion
    "none, reference initial": Row(4, {"ssr": "none", "reference": "initial"}, like="none"),  # as DITTO
    "none, safeguarded": Row(4, {"ssr": "none"}, like="none", safeguarded=True),
}
SFT_GRID = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 6e-3, 12e-3)]
SSPO_GRID = [
    {"learning_rate": rate, "rollout_guidance_scale": guidance} for guidance in (1.0, 3.0) for rate in (1e-3, 3e-3)
]
# Without what had failed in plenty, which was tuned first: the highest rate, and guidance for the rivals.
GRIDS = {"plenty": (SFT_GRID, SSPO_GRID), "few": (SFT_GRID[:3], SSPO_GRID[:2])}


@dataclass(frozen=True)
class Job:
    """One run, and what it is judged by: captions, and for each noise set the first seed of its pictures."""

    regime: str
    row: str
    seed: int
    tuned: dict
    part: str = "results"  # of the study
    captions: tuple = tuple(TEST)
    noise: tuple = (10_000, 20_000)
    per_caption: int = 6
    base: str = "first"
    half_way: bool = True  # whether the checkpoint in the middle is judged too

    @property
    def name(self):
        return f"{self.part}/{self.regime}/{report.file_name(self.row)}-{self.seed}"

    @property
    def result(self):
        return WORK / f"{self.name}.json"

    def settings(self):
        """The flags of train_sspo_sd.py but for those that name files, and OWN_SETTINGS."""
        row, regime = ROWS[self.row], REGIMES[self.regime]
        updates = row.updates or (regime.matched_updates if row.matched else regime.updates)
        length = {"max_train_steps": updates, "checkpointing_steps": updates // 2, "seed": self.seed}
        return {**COMMON, **length, **self.tuned, **row.flags}


# What the tuning chose: for each regime and method the best trial on the selection captions (all: appendix_first.md).
# Long was not tuned: it takes few's settings.
UNGUIDED = {"learning_rate": 0.003, "rollout_guidance_scale": 1.0}
TUNED = {
    "plenty": {
        "sft": {"learning_rate": 0.006},
        "sft matched": {"learning_rate": 0.003},
        "sign": {"learning_rate": 0.003, "rollout_guidance_scale": 3.0},
        **dict.fromkeys(("indicator", "none", "none, rival 0.3"), UNGUIDED),
    },
    "few": {
        "sft": {"learning_rate": 0.006},
        "sft matched": {"learning_rate": 0.001},
        **dict.fromkeys(("sign", "indicator", "none", "none, rival 0.3"), UNGUIDED),
    },
}

# Which tiers run, and with which seeds: a stop at any time leaves about as many seeds of one row as of another.
ORDER = [(1, range(3)), (2, range(2)), (1, range(3, 5)), (3, range(1)), (2, range(2, 3)), (3, range(1, 3))]


def main_jobs():
    """All runs of the plan, in its order. The base is no training, and one run of it serves all."""
    yield Job("plenty", "base", 0, {})
    for tier, seeds in ORDER:
        for seed in seeds:
            for regime in TUNED:
                for name, row in ROWS.items():
                    if row.tier == tier and name != "base":
                        yield Job(regime, name, seed, TUNED[regime][row.like or name])


def second_jobs():
    """The main rows on the second base, with the settings that the first one's tuning chose."""
    base = {"base": "second", "part": "results_second"}
    yield Job("plenty", "base", 0, {}, **base)
    for seed in range(3):
        for regime in TUNED:
            for row, tuned in TUNED[regime].items():
                yield Job(regime, row, seed, tuned, **base)


def later_jobs():
    """What the plan adds, in its order."""
    first, second = {}, {"base": "second", "part": "results_second"}

    def jobs(regimes, rows, seeds, base):
        for seed in seeds:
            for regime in regimes:
                tuned = TUNED["few" if regime == "long" else regime]
                for row in rows:
                    yield Job(regime, row, seed, tuned[ROWS[row].like or row], **base)

    for seed in range(3):
        yield from jobs(["long"], ["sft matched", "sign", "indicator", "none, rival 0.3"], [seed], first)
        yield from jobs(TUNED, ["sft, 500 updates"], [seed], first)
        yield from jobs(TUNED, ["4 draws", "sft, 500 updates"], [seed], second)
    yield from jobs(TUNED, ["2 draws", "reference drawn each update"], range(3), first)
    yield from jobs(TUNED, TUNED["few"], range(3, 5), second)
    yield from jobs(TUNED, ["8 draws"], range(3), first)


def pilots():
    """The tuning, on selection captions and on winners and seeds of its own."""
    for regime, (sft_grid, sspo_grid) in GRIDS.items():
        for row in ROWS:
            if row != "base" and ROWS[row].tier == 1:
                for trial in sft_grid if "sft" in row else sspo_grid:
                    name = "_".join(f"{value:g}" for value in trial.values())
                    yield Job(regime, row, 100, trial, f"pilots/{name}", tuple(SELECTION), (30_000,), 16)


# The confirmation: what it compares, and the rates that every row tries. Where the best of the three is the lowest or
# the highest, the next one beyond it is tried too.
CONFIRMED = ("sft matched", "sft, 500 updates", "sign", "indicator", "none", "none, rival 0.3", "4 draws")
PICTURED = ("base", "sft", *CONFIRMED)
CONTROLS = ("winner only", "sign by coin", "sign by oracle", "indicator by oracle")
CONTROLS += ("sign, scope iteration", "indicator, scope iteration")  # on the second base; the first one has had them
RATES, BEYOND = (1e-3, 3e-3, 6e-3), {1e-3: 3e-4, 6e-3: 12e-3}
FRESH_NOISE = (40_000, 50_000)


def told(job):
    """The record of a run that is there, from its file or from data/first, or None."""
    if job.result.exists():
        return json.loads(job.result.read_text())
    return report.read_records().get(job.name)


def missing(jobs):
    return [job for job in jobs if told(job) is None]


def trial(base, regime, row, rate, seed=101):
    tuned = {"learning_rate": rate} | ({} if "sft" in row else {"rollout_guidance_scale": 1.0})
    part = f"pilots_again/{base}/{rate:g}"
    return Job(regime, row, seed, tuned, part, tuple(SELECTION), (30_000,), 16, base, half_way=False)


def trial_scores(base, regime, row, seed=101):
    """{rate: score} of the trials that have run."""
    made = {rate: told(trial(base, regime, row, rate, seed)) for rate in (*RATES, *BEYOND.values())}
    return {rate: report.samples(result).mean() for rate, result in made.items() if result}


def best_trial(base, regime, row):
    """The settings of the best trial, by the mean of both where rates had two."""
    first, second = (trial_scores(base, regime, row, seed) for seed in (101, 102))
    scores = {rate: first[rate] + second[rate] for rate in second} or first
    return trial(base, regime, row, max(scores, key=scores.get)).tuned


def confirmed_rows():
    return [(base, regime, row) for base in BASES for regime in TUNED for row in CONFIRMED]


def first_trials():
    return [trial(*row, rate) for row in confirmed_rows() for rate in RATES]


def trials_beyond():
    scores = {row: trial_scores(*row) for row in confirmed_rows()}
    best = {row: max(of, key=of.get) for row, of in scores.items()}
    return [trial(*row, BEYOND[rate]) for row, rate in best.items() if rate in BEYOND]


def second_trials():
    """Of SFT's rates, those that come within 0.05 of the best."""
    scores = {row: trial_scores(*row) for row in confirmed_rows() if "sft" in row[2]}
    return [trial(*row, rate, 102) for row, of in scores.items() for rate in of if of[rate] > max(of.values()) - 0.05]


def confirmation_jobs():
    """The confirmation's runs in the plan's order, with each row's best rate, or that of the row which it changes."""

    def job(base, regime, row, seed):
        tuned = {} if row == "base" else best_trial(base, regime, row if row in CONFIRMED else ROWS[row].like)
        return Job(regime, row, seed, tuned, f"results_again/{base}", noise=FRESH_NOISE, base=base, half_way=False)

    for base in BASES:
        yield job(base, "plenty", "base", 0)
    for seed in range(5, 10):
        for row in confirmed_rows():
            yield job(*row, seed)
    for seed in range(5, 8):
        for regime in TUNED:
            for row in CONTROLS:
                yield job("second", regime, row, seed)
            for base in BASES:
                for row in ("none, safeguarded", "none, reference latest", "none, reference initial"):
                    yield job(base, regime, row, seed)


# Settings that are no flags of the script; `patch` does what they say. ssr_scope was one when the runs were made.
OWN_SETTINGS = {"ssr_scope"}


def command_line(settings, winners, output, base="first"):
    """`settings` as train_sspo_sd.py's words."""
    files = {"pretrained_model_name_or_path": BASES[base], "train_data_dir": winners, "output_dir": output}
    flags = {**files, **{name: value for name, value in settings.items() if name not in OWN_SETTINGS}}
    return [*(text for flag, value in flags.items() for text in (f"--{flag}", str(value))), "--cache_latents"]


# ------------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------------


def patch(job):
    """
    Patches the script, in the process of this run: the scorer judges every rival, and what a row wants that no flag
    of the script can do is done: a switch by that verdict, by a coin or by the iteration, a reference for each update,
    a safeguard. A pair's timesteps are drawn as they were when the runs were made.

    Returns:
        notes, filled as the run goes: for each update the share of rivals that are clean (rivals/clean), that of
        switches that agree with the scorer (switch/right) and, of a safeguarded row, the factor on the rival
        (safeguard); and `seconds`, which the judging took.
    """
    notes = {"rivals/clean": [], "switch/right": [], "safeguard": [], "seconds": 0.0}
    row, settings = ROWS[job.row], job.settings()
    sample_rivals, sspo_loss = script.sample_rivals, script.sspo_loss
    arguments_of = inspect.signature(sspo_loss)
    coin = torch.Generator().manual_seed(job.seed)
    clean, parameters, x_of_iteration = None, [], 0.0

    def judged_rivals(models, *others):
        nonlocal clean
        if row.safeguarded:
            parameters[:] = [weight for weight in models.denoiser.parameters() if weight.requires_grad]
        latents = sample_rivals(models, *others)
        started = time.process_time()
        pictures = [script.decode_latents(models, one) for one in latents.split(1)]
        clean = judge(load_scorer(), pictures)[1] > 0.5
        notes["rivals/clean"].append(clean.float().mean().item())
        notes["seconds"] += time.process_time() - started
        return latents

    def switched_loss(*given, **named):
        nonlocal x_of_iteration
        told = arguments_of.bind(*given, **named)
        told.apply_defaults()
        told = told.arguments
        x = (told["reference_winner"] - told["policy_winner"]).detach().mean(1)
        notes["switch/right"].append(((x < 0) == clean).float().mean().item())
        by_iteration = settings.get("ssr_scope") == "iteration"
        if row.safeguarded:
            loss, metrics = sspo_loss(**told)
            loss, factor = safeguarded(loss, told["policy_winner"], told["policy_rival"], parameters)
            notes["safeguard"].append(factor)
            return loss, metrics
        if row.switch is None and not by_iteration:
            return sspo_loss(**told)
        if by_iteration:  # the mean of x over the iteration's updates before this one; only its sign counts
            is_winner = torch.full_like(x, x_of_iteration) < 0
        else:
            is_winner = clean if row.switch == "oracle" else torch.rand(len(x), generator=coin) < 0.5
        s = torch.where(is_winner, {"sign": -1.0, "indicator": 0.0}[told["ssr"]], 1.0)
        loss, metrics = sspo_loss(**told | {"ssr": "none", "rival_weight": told["rival_weight"] * s[:, None]})
        ended = len(notes["switch/right"]) % settings["replay_steps"] == 0
        x_of_iteration = 0.0 if ended else x_of_iteration - metrics["gap/winner"].item()
        return loss, metrics | {"dpo_fraction": (s == 1).float().mean()}

    def drawn_each_update(bank, iteration):
        live, update = bank.live(iteration), len(notes["rivals/clean"])
        generator = script.keyed_generator("reference of an update", bank.seed, update)
        return live[torch.randint(len(live), (), generator=generator).item()]

    script.sample_rivals, script.sspo_loss, script.draw_timesteps = judged_rivals, switched_loss, independent_timesteps
    if row.redrawn:
        script.ReplayBank.draw = drawn_each_update
    return notes


def time_the_loop(notes):
    """Patches the script so that notes["seconds"] ends as the processor's in the loop, without what it began with."""
    make_loader, save_result, started = script.make_loader, script.save_result, None

    def timed_loader(*given, **named):
        loader = make_loader(*given, **named)

        def batches():
            nonlocal started
            started = time.process_time()  # the machine may have other work
            yield from loader

        return batches()

    def timed_result(*given, **named):
        begun = started or time.process_time()  # a run that resumed behind its last update had no loop
        notes["seconds"] = time.process_time() - begun - notes["seconds"]
        save_result(*given, **named)

    script.make_loader, script.save_result = timed_loader, timed_result


def independent_timesteps(models, generator, draws):
    """Several timesteps of a pair, each drawn by itself. The script spreads them over the schedule."""
    return torch.randint(models.noise_scheduler.config.num_train_timesteps, (draws,), generator=generator)


def safeguarded(loss, policy_winner, policy_rival, parameters):
    """
    The loss with its rivals' part of the gradient held back, so that to first order a step down the whole does not
    raise what a step down the winners' part lowers (the idea is that of arXiv 2511.03317, there from the output's
    gradients; here with those of all weights, for the whole batch).

    Returns:
        the loss, of the same value, and the factor on the rivals' part: 1 where the parts do not oppose each other.
    """
    parts = [
        (gradient.detach() * errors).sum()
        for errors, gradient in zip(
            (policy_winner, policy_rival), torch.autograd.grad(loss, (policy_winner, policy_rival), retain_graph=True)
        )
    ]
    winner, rival = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(part, parameters, retain_graph=True)])
        for part in parts
    )
    opposed = -winner.dot(rival)
    factor = min(1.0, (winner.dot(winner) / opposed).item()) if opposed > 0 else 1.0
    whole = parts[0] + factor * parts[1]
    return loss.detach() + whole - whole.detach(), factor


def train(job, folder):
    """
    Trains into folder/run.

    Returns:
        dict of the processor's `seconds` in the loop of updates, without the judging of rivals; of `latents`, how many
        the UNet was called on; and of `curves`.
    """
    write_winners(folder / "winners", REGIMES[job.regime].winners, first_seed=WINNER_SEEDS + 1000 * job.seed)
    args = script.parse_args(command_line(job.settings(), folder / "winners", folder / "run", job.base))
    args.cache_dir = str(folder / "datasets")
    notes = patch(job)
    time_the_loop(notes)
    script.main(args)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("rivals/clean", "switch/right", "safeguard"):
        for line, value in zip(lines, notes[name]):
            line[name] = value
    latents = sum(expected_calls(args)) * args.max_train_steps
    return {"seconds": round(notes["seconds"], 1), "latents": latents, "curves": thinned(lines)}


def draw(pipeline, captions, per_caption, first_seed):
    """`per_caption` pictures of every caption, one caption after the other; noise belongs to the place."""
    texts = [caption for caption in captions for _ in range(per_caption)]
    noise = [torch.Generator().manual_seed(first_seed + place) for place in range(len(texts))]
    pictures = []
    for start in range(0, len(texts), 32):
        piece = slice(start, start + 32)
        pictures += pipeline(texts[piece], generator=noise[piece], **SAMPLER).images
    return pictures, texts


def strip(pictures):
    """The pictures side by side, in few colours: the file is committed."""
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1)).quantize(96)


@torch.no_grad()
def heldout_error(pipeline, captions, per_caption=8):
    """The denoising error on clean pictures of `captions`: rises where the training overfits its winners."""
    texts = [caption for caption in captions for _ in range(per_caption)]
    pictures = [render(text, TEST_SEEDS + 500_000 + place) for place, text in enumerate(texts)]
    latents = pipeline.vae.encode(to_tensor(pictures)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.linspace(0, 999, len(texts)).long()[torch.randperm(len(texts), generator=generator)]
    embeds, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
    noisy = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(latents, noise, timesteps)
    return (pipeline.unet(noisy, timesteps, embeds).sample - noise).square().mean().item()


CURVES = ("dpo_fraction", "implicit_accuracy", "mse", "gap", "rivals", "switch", "safeguard")


def thinned(lines, points=20):
    """The curves of metrics.jsonl as means over `points` stretches of the run."""
    names = [name for name in lines[0] if name.split("/")[0] in CURVES]
    pieces = [piece for piece in np.array_split(np.arange(len(lines)), points) if len(piece)]
    curves = {"step": [lines[piece[-1]]["step"] for piece in pieces]}
    for name in names:
        curves[name] = [round(float(np.mean([lines[i][name] for i in piece])), 6) for piece in pieces]
    return curves


def judge_pictures(pipeline, job, first_seed, result):
    """Draws one noise set; adds what the scorers say to the lists of `result`. Returns the pictures."""
    pictures, texts = draw(pipeline, job.captions, job.per_caption, first_seed)
    for scorer, told in ((load_scorer(), result), (load_second_scorer(), result.setdefault("second scorer", {}))):
        verdict = scores(pictures, texts, scorer)
        for name in ("preference", "identity"):
            told.setdefault(name, []).extend(round(value, 3) for value in verdict[name].tolist())
    return pictures


def run(job):
    """Trains, draws and judges; writes the result."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    datasets.disable_progress_bars()
    result = {"regime": job.regime, "row": job.row, "seed": job.seed}
    started, base = time.time(), BASES[job.base]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if job.row == "base":
            pipeline = load_pipeline(base, "cpu")
        else:
            result["settings"] = job.settings()
            result |= train(job, folder)
            if job.half_way:
                checkpoint = folder / "run" / f"checkpoint-{result['settings']['checkpointing_steps']}"
                pipeline = load_aligned(base, checkpoint, "cpu")
                judge_pictures(pipeline, job, job.noise[0], result.setdefault("half way", {}))
            pipeline = load_aligned(base, folder / "run", "cpu")
    job.result.parent.mkdir(parents=True, exist_ok=True)
    result["error"] = round(heldout_error(pipeline, job.captions), 5)
    result |= {"captions": job.captions, "per_caption": job.per_caption, "noise": job.noise}
    for first_seed in job.noise:
        pictures = judge_pictures(pipeline, job, first_seed, result)
        if job.row in PICTURED and job.seed in (0, 5) and first_seed == job.noise[0]:  # each part's first seed
            strip(pictures[:: job.per_caption]).save(job.result.with_suffix(".png"), optimize=True)
    result["wall"] = round(time.time() - started, 1)
    partial = job.result.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    os.replace(partial, job.result)


# ------------------------------------------------------------------------------------------------------------------
# All runs
# ------------------------------------------------------------------------------------------------------------------


def collect():
    """Writes data/first: all records below work/first, and what it had of other runs."""
    records = {str(path.relative_to(WORK).with_suffix("")): path for path in sorted(WORK.rglob("*.json"))}
    records = {run: json.loads(path.read_text()) for run, path in records.items()}
    runs, pictures, curves = [], [], []
    for run, record in records.items():
        noise = " ".join(map(str, record["noise"]))
        runs.append({"run": run, **record, "noise": noise, "settings": json.dumps(record.get("settings", {}))})
        for when, judged in (("half way", record.get("half way", {})), ("end", record)):
            second = judged.get("second scorer", {})
            told = [judged.get("preference", ()), judged.get("identity", ())]
            told += [second.get("preference", ()), second.get("identity", ())]
            count = len(record["captions"]) * record["per_caption"]
            for place, values in enumerate(itertools.zip_longest(*told)):
                line = {"run": run, "when": when, "noise": record["noise"][place // count] + place % count}
                line["caption"] = record["captions"][place % count // record["per_caption"]]
                pictures.append(line | dict(zip(report.PICTURES[4:], values)))
        for name, values in record.get("curves", {}).items():
            for step, value in zip(record["curves"]["step"], values):
                curves.append({"run": run, "step": step, "name": name, "value": value})
    tables = {"runs.csv": (report.RUNS, runs), "pictures.csv.gz": (report.PICTURES, pictures)}
    update(report.DATA, tables | {"curves.csv.gz": (report.POINTS, curves)}, set(records))
    report.read_records.cache_clear()


def in_child(job, log, carry_out):
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stderr.fileno(), descriptor)
    carry_out(job)


def run_all(jobs, workers, logs, carry_out=None):
    """
    Runs the jobs, `workers` at a time, each in a process of its own, by `carry_out` or `run`.

    They are forked from this one, which has imported everything (half a minute) but never trained: accelerate's state
    and the patches of a run are its own.

    Returns:
        how many failed.
    """
    context, running, failed = multiprocessing.get_context("fork"), {}, 0
    waiting = list(jobs)
    logs.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            log = logs / ("-".join(job.result.with_suffix(".log").parts[-4:]))
            process = context.Process(target=in_child, args=(job, log, carry_out or run))
            process.start()
            running[process.sentinel] = process, job, log, time.time()
        for sentinel in multiprocessing.connection.wait(list(running)):
            process, job, log, started = running.pop(sentinel)
            process.join()
            failed += process.exitcode != 0
            what = "done" if process.exitcode == 0 else f"FAILED, see {log}"
            print(f"{time.time() - started:5.0f} s  {job.regime} {job.row} {job.seed}: {what}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "second", "later", "again", "pilot", "report"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="default: all")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one core each (default: 2)")
    parser.add_argument("--logs", type=Path, default=HERE / "logs", help="where the runs print")
    args = parser.parse_args()
    commands = {"run": [main_jobs], "second": [second_jobs], "later": [later_jobs], "pilot": [pilots], "report": []}
    commands["again"] = [first_trials, trials_beyond, second_trials, confirmation_jobs]
    failed = 0
    for jobs in commands[args.command]:
        chosen = list(jobs())
        if jobs not in (first_trials, trials_beyond, second_trials):  # what a row is tuned by has all of its rates
            chosen = [job for job in chosen if job.row in args.rows and job.regime in args.regimes]
        if failed := run_all(missing(chosen), args.workers, args.logs):
            break
    collect()
    if args.command != "pilot":
        report.write(WORK, {name: row.like for name, row in ROWS.items()})
    if failed:
        sys.exit(f"{failed} runs failed: see {args.logs}")


if __name__ == "__main__":
    main()
