"""How noisy is the gradient, and what do more draws of (t, noise) for each pair do to it?

A run of "none, rival 0.3" on the first base is stopped half way. There, with its weights and its reference, the
gradient is taken for many batches of pairs, with two independent sets of draws for each batch. What differs within a
batch comes from the draws; what differs between batches, from the pairs too.

    python examples/study/gradients.py  # writes gradients.json, from which report.py makes its table
"""

# ruff: noqa: E402
import argparse
import copy
import json
import tempfile
from pathlib import Path

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


def measure(policy, models, batches, args, accelerator):
    """{method: noise_to_signal} at the present weights; batches as training_loss takes them."""
    parameters = [weight for weight in policy.parameters() if weight.requires_grad]

    def gradient(batch, loss_type, draws, seed):
        other = copy.copy(args)
        other.loss_type, other.draws_per_pair, other.seed = (
            loss_type,
            draws,
            seed,
        )  # the seed draws noise and timesteps
        loss, _ = script.training_loss(policy, models, batch, other, accelerator.autocast)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    told = {}
    for loss_type in ("sft", "sspo"):
        for draws in DRAWS:
            pairs = [[gradient(batch, loss_type, draws, seed) for seed in (1001, 1002)] for batch in batches]
            told[f"{loss_type}, {draws}"] = noise_to_signal(torch.stack([torch.stack(two) for two in pairs]))
            print(loss_type, draws, told[f"{loss_type}, {draws}"], flush=True)
    return told


class Measured(Exception):
    """The run has served its purpose."""


def half_way(regime):
    """Trains for UPDATES updates, then measures. Returns what `measure` does."""
    tuned = study.best_trial("first", regime, "none, rival 0.3")
    job = study.Job(regime, "none, rival 0.3", 5, tuned)
    told, steps, update = {}, 0, script.update

    def measured(policy, models, optimizer, schedule, loader, empty_prompt, args, accelerator, x=None):
        nonlocal steps
        if steps < UPDATES:
            steps += 1
            return update(policy, models, optimizer, schedule, loader, empty_prompt, args, accelerator, x)
        batches = []
        for _ in range(BATCHES):
            batch = script.collate(next(loader)[0], empty_prompt, args, accelerator.device)
            batch["rival"] = script.sample_rivals(models, batch, args, accelerator.autocast)
            batches.append(batch)
        told.update(measure(policy, models, batches, args, accelerator))
        raise Measured

    script.update = measured
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_winners(folder / "winners", study.REGIMES[regime].winners, first_seed=WINNER_SEEDS + 1000 * job.seed)
        args = script.parse_args(study.command_line(job.settings(), folder / "winners", folder / "run"))
        args.cache_dir = str(folder / "datasets")
        try:
            script.main(args)
        except Measured:
            return told
        finally:
            script.update = update


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "gradients.json")
    args = parser.parse_args()
    told = {regime: half_way(regime) for regime in study.TUNED}
    args.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
