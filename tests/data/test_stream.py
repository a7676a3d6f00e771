"""The order in which winners are served, which is the same for every layout and can be resumed anywhere."""

import itertools
import time
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
from helpers import SCRIPTS, flags, open_winners, served, with_shared_code


@pytest.fixture(params=[False, True], ids=["files", "streamed"])
def winners_of(request, script, tmp_path):
    """Opens six winners of the script's kind, as files and as a stream."""
    folder = tmp_path / "six"
    make = tiny.folder_of_clips if script is SCRIPTS["video"] else tiny.folder_of_winners
    make(folder, 6)
    return lambda **options: open_winners(script, tmp_path, folder, streaming=request.param, **options)


def places(examples):
    return [(example["epoch"], example["row"], example["caption"]) for example in examples]


def test_order_is_a_permutation_that_changes_with_epoch_and_seed(winners_of):
    order = [example["caption"] for example in served(winners_of(), 18)]
    epochs = [order[:6], order[6:12], order[12:]]
    assert all(sorted(epoch) == sorted(tiny.CAPTIONS[:6]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order == [example["caption"] for example in served(winners_of(), 18)]
    assert order != [example["caption"] for example in served(winners_of(seed=1), 18)]


def test_processes_share_the_same_sequence(winners_of):
    """1 x 4, 2 x 2 and 4 x 1 processes x batch see the same global batches; an epoch of 6 is no multiple of 4."""

    def global_batches(world):
        winners = winners_of(train_batch_size=4 // world)
        ranks = [places(served(winners, 12 // world, rank=rank, world=world)) for rank in range(world)]
        size = 4 // world
        return [sorted(place for rank in ranks for place in rank[i * size : (i + 1) * size]) for i in range(3)]

    assert global_batches(1) == global_batches(2) == global_batches(4)
    assert len({place for batch in global_batches(2) for place in batch}) == 12, "no row twice in an epoch"


def test_a_stream_resumes_at_any_cursor(script, winners_of):
    winners = winners_of(train_batch_size=4)
    batches = list(itertools.islice(script.WinnerStream(winners.load, winners, winners.args), 6))
    for i in range(5):
        resumed = script.WinnerStream(winners.load, winners, winners.args, cursor=batches[i][1])
        for (ours, cursor), (theirs, expected) in zip(resumed, batches[i + 1 :]):
            assert cursor == expected
            assert places(ours) == places(theirs)
            assert all(torch.equal(one["pixels"], other["pixels"]) for one, other in zip(ours, theirs))


def test_a_batch_may_be_larger_than_the_data(script, tmp_path):
    """The one winner comes round again, each time with draws of its own."""
    make = tiny.folder_of_clips if script is SCRIPTS["video"] else tiny.folder_of_winners
    winners = open_winners(script, tmp_path, make(tmp_path / "one", 1), train_batch_size=3)
    assert places(served(winners, 6)) == [(i, 0, tiny.CAPTIONS[0]) for i in range(6)]


def test_streaming_reads_no_more_than_it_needs(tmp_path, winners, monkeypatch):
    """A stream of 100,000 rows serves its first batch from the shuffle buffer, not from the whole set."""
    script, touched = SCRIPTS["sd"], []

    def rows():
        for i in range(100_000):
            touched.append(i)
            yield {"image": tiny.picture("a red circle"), "text": "a red circle"}

    monkeypatch.setattr(script, "open_winners", lambda args: datasets.IterableDataset.from_generator(rows))
    data = open_winners(script, tmp_path, winners, streaming=True)
    assert len(served(data, 4)) == 4
    assert script.SHUFFLE_BUFFER <= len(touched) <= script.SHUFFLE_BUFFER + 6


def loaded(script, winners, batches):
    """What a run's loader gives."""
    loader = script.make_loader(script.WinnerStream(winners.load, winners, winners.args), winners.args)
    return [example for examples, _ in itertools.islice(loader, batches) for example in examples]


def test_loader_processes_keep_the_order(script, winners_of):
    """
    Several of them take turns. A stream has one, for a second would change its order; that of one is not that of none,
    because `datasets` shuffles otherwise there.
    """
    winners = [winners_of(dataloader_num_workers=workers) for workers in (0, 1, 2)]
    none, one, two = (loaded(script, each, 5) for each in winners)
    assert places(two) == places(one)
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(one, two))
    if not winners[0].args.streaming:
        assert places(none) == places(one)
        assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(none, one))


@with_shared_code
def test_a_stream_is_not_resumed_in_another_order(each):
    """With a loader process where there was none, some of the epoch would come twice and others not at all."""
    options = dict(streaming=True, checkpointing_steps=2, rollout_steps=1)
    each(max_train_steps=2, **options)
    for result in each.script.RESULTS:
        (each.directory / "run" / result).unlink(missing_ok=True)
    with pytest.raises(each.script.UserError, match="loader processes"):
        each(max_train_steps=3, dataloader_num_workers=1, resume_from_checkpoint="latest", **options)


def test_the_next_rollout_is_loaded_ahead():
    """Two loader processes have all eight micro-batches of a rollout ready while the one before is trained on."""
    script = SCRIPTS["sd"]
    options = dict(train_batch_size=1, rollout_batch_size=8, gradient_accumulation_steps=8, dataloader_num_workers=2)
    args = script.parse_args(flags("unused", "unused", "unused", **options))
    loaded = torch.zeros(64).share_memory_()

    def load(epoch, row, example):
        loaded[row] = 1
        return {"row": row}

    rows = SimpleNamespace(rows=lambda epoch, offset: ((row, None) for row in range(offset, 64)))
    loader = script.make_loader(script.WinnerStream(load, rows, args), args)
    assert [next(loader) for _ in range(8)] == [([{"row": row}], (0, row + 1)) for row in range(8)]
    for _ in range(1000):
        if loaded[:16].all():
            break
        time.sleep(0.01)
    assert loaded[:16].all() and not loaded[24:].any()
