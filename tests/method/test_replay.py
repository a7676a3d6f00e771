"""The replay bank and what the reference is made of."""

from collections import Counter

import pytest
import torch

from train_sspo_sd import ReplayBank, UserError


def weights(value):
    return {"layer": torch.full((2, 3), float(value))}


def test_random_reference_is_uniform_over_the_kept(tmp_path):
    """Five entries, 4000 draws with fixed seeds: each within 80 of 800, about three standard deviations."""
    counts = Counter(ReplayBank(tmp_path, 8, "random", seed).draw(5) for seed in range(4000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert all(720 < count < 880 for count in counts.values())


def test_draw_is_a_function_of_seed_and_iteration(tmp_path):
    draws = [ReplayBank(tmp_path, 8, "random", 3).draw(k) for k in range(1, 60)]
    assert draws == [ReplayBank("elsewhere", 8, "random", 3).draw(k) for k in range(1, 60)]
    assert draws != [ReplayBank(tmp_path, 8, "random", 4).draw(k) for k in range(1, 60)]
    assert all(0 <= index < k for k, index in enumerate(draws, start=1))


def test_latest_and_initial(tmp_path):
    assert [ReplayBank(tmp_path, 8, "latest").draw(k) for k in (1, 2, 9, 20)] == [0, 1, 8, 19]
    assert [ReplayBank(tmp_path, 8, "initial").draw(k) for k in (1, 2, 9, 20)] == [0, 0, 0, 0]


def test_bank_is_bounded_and_keeps_the_base(tmp_path):
    """The base and the newest three; an entry leaves only when neither the run nor a checkpoint draws from it."""
    bank = ReplayBank(tmp_path / "replay", 4)
    for index in range(10):
        bank.push(index, weights(index))
        bank.evict([index + 1])
        kept = sorted(int(path.stem.split("-")[1]) for path in bank.directory.iterdir())
        assert kept == bank.live(index + 1)
        assert len(kept) == min(index + 1, 4)
    assert kept == [0, 7, 8, 9]
    assert torch.equal(bank.load(7)["layer"], weights(7)["layer"])
    assert ReplayBank(tmp_path, 1).live(9) == [0]


def test_entries_that_a_checkpoint_needs_outlive_the_bound(tmp_path):
    bank = ReplayBank(tmp_path, 3)
    for index in range(8):
        bank.push(index, weights(index))
    bank.evict([8, 5])  # the run is in iteration 8, an old checkpoint in iteration 5
    assert sorted(path.stem for path in tmp_path.iterdir()) == [f"iteration-{i}" for i in (0, 3, 4, 6, 7)]


def test_lost_entry_is_named(tmp_path):
    with pytest.raises(UserError, match="iteration-3"):
        ReplayBank(tmp_path, 8).load(3)


def test_references_of_a_run(train):
    """The reference changes with the iteration, and metrics say which entry it is."""
    run = train(max_train_steps=8, replay_steps=2, replay_size=3, reference="latest")
    assert run.column("reference/index") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(path.stem for path in (run.path / "replay").iterdir()) == [f"iteration-{i}" for i in (0, 3, 4)]
    # A reference that was pushed a moment ago is the policy itself.
    assert [step for step, gap in enumerate(run.column("gap/winner"), start=1) if gap == 0] == [1, 3, 5, 7]
    run = train("random", max_train_steps=8, replay_steps=2, seed=5)
    bank = ReplayBank(run.path / "replay", 8, "random", 5)
    assert run.column("reference/index") == [bank.draw(k) for k in (1, 1, 2, 2, 3, 3, 4, 4)]
