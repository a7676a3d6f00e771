"""How noisy is the gradient, and what do more draws of (t, noise) for each pair do to it?

A run of "none, rival 0.3" on the first base is stopped half way. There, with its weights and its reference, the
gradient is taken for many batches of pairs, with two independent sets of draws for each batch. What differs within a
batch comes from the draws; what differs between batches, from the pairs too. The timesteps of a pair's draws are
independent, as in the study's runs, or spread over the schedule, as in the script now.

    python examples/study/gradients.py  # writes gradients.json, from which report.py makes its table
"""

# ruff: noqa: E402
import argparse
import contextlib
import copy
import itertools
import json
import tempfile
from pathlib import Path
from unittest import mock

import study  # first: it sets the number of threads
import torch
from glyphs import WINNER_SEEDS, write_winners

import train_sspo_sd as script


HERE = Path(__file__).resolve().parent
DRAWS, BATCHES, UPDATES = (1, 2, 4, 8), 32, 20


def noise_to_signal(gradients):
    """
    How large the gradient's noise is.

    Args:
        gradients: (batches, 2, parameters): of each batch of pairs, by two independent sets of draws.
    Returns:
        dict: `fixed pairs`, the trace of the covariance over draws for given pairs, and `all`, that over pairs and
        draws, both over the squared norm of the expected gradient. All three are estimated without bias.
    """
    batches = len(gradients)
    means = gradients.mean(1)
    between = (means - means.mean(0)).square().sum() / (batches - 1)  # of the mean of two sets of draws
    within = (gradients[:, 0] - gradients[:, 1]).square().sum(1).mean() / 2
    squared = means.mean(0).square().sum() - between / batches
    return {"fixed pairs": (within / squared).item(), "all": ((between + within / 2) / squared).item()}


def measure(policy, models, batches, args, autocast):
    """{method: noise_to_signal} at the present weights; batches as training_loss takes them."""
    parameters = [weight for weight in policy.parameters() if weight.requires_grad]

    def gradient(batch, loss_type, draws, seed):
        other = copy.copy(args)
        other.loss_type, other.draws_per_pair = loss_type, draws
        other.seed = seed  # draws noise and timesteps
        loss, _ = script.training_loss(policy, models, batch, other, autocast)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    told, ways = {}, {"independent": study.independent_timesteps, "spread": script.draw_timesteps}
    for loss_type, draws, way in itertools.product(("sft", "sspo"), DRAWS, ways):
        if draws > 1 or way == "independent":  # one draw is the same in both
            with mock.patch.object(script, "draw_timesteps", ways[way]):
                pairs = [[gradient(batch, loss_type, draws, seed) for seed in (1001, 1002)] for batch in batches]
            name = f"{loss_type}, {draws}, {way}"
            told[name] = noise_to_signal(torch.stack([torch.stack(two) for two in pairs]))
            print(name, told[name], flush=True)
    return told


class Measured(Exception):
    """The run has served its purpose."""


def half_way(regime):
    """Trains for UPDATES updates, then measures. Returns what `measure` does."""
    tuned = study.best_trial("first", regime, "none, rival 0.3")
    job = study.Job(regime, "none, rival 0.3", 5, tuned)
    loader, updates, told = None, 0, {}
    make_loader, training_loss = script.make_loader, script.training_loss

    def kept_loader(*given, **named):
        nonlocal loader
        loader = make_loader(*given, **named)
        return loader

    def measured(policy, models, batch, args, autocast):
        nonlocal updates
        if updates < UPDATES:
            updates += 1
            return training_loss(policy, models, batch, args, autocast)
        batches, empty_prompt = [batch], script.encode_prompt(models, [""])[0]
        while len(batches) < BATCHES:
            batches.append(script.collate(next(loader)[0], empty_prompt, args, batch["winner"].device))
            batches[-1]["rival"] = script.sample_rivals(models, batches[-1], args, autocast)
        with mock.patch.object(script, "training_loss", training_loss):
            told.update(measure(policy, models, batches, args, autocast))
        raise Measured

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(script, "make_loader", kept_loader),
        mock.patch.object(script, "training_loss", measured),
        contextlib.suppress(Measured),
    ):
        folder = Path(folder)
        write_winners(folder / "winners", study.REGIMES[regime].winners, first_seed=WINNER_SEEDS + 1000 * job.seed)
        args = script.parse_args(study.command_line(job.settings(), folder / "winners", folder / "run"))
        args.cache_dir = str(folder / "datasets")
        script.main(args)
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "gradients.json")
    args = parser.parse_args()
    told = {regime: half_way(regime) for regime in study.TUNED}
    args.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
