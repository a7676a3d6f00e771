"""examples/benchmark.py: its formula, and that it runs."""

import sys

from helpers import ROOT, flags

import train_sspo_sd as script


sys.path.insert(0, str(ROOT / "examples"))

import benchmark  # noqa: E402


def test_the_formula_is_that_of_the_docstring():
    """P = 3 x 2 pairs in rollouts of 4 and 2 with 5 steps; then per micro-batch 2 calls on 2 x 2 x 3 latents."""
    options = dict(
        gradient_accumulation_steps=3,
        rollout_batch_size=4,
        rollout_steps=5,
        draws_per_pair=3,
        rollout_guidance_scale=7.5,
    )
    args = script.parse_args(flags("unused", "unused", "unused", **options))
    assert benchmark.expected_calls(args) == 5 * [8] + 4 * [12] + 5 * [4] + 2 * [12]


def test_benchmark_runs(capsys):
    """Its lines come out as a table, from a model too small for their numbers to mean anything."""
    benchmark.main(["--quick", "--lines", "turnover"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("turnover")]
    assert [line.split()[1] for line in lines] == ["lora,", "full,"]
    assert all(0 < float(line.split()[7]) < 100 for line in lines)
