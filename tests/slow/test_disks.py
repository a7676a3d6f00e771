"""Disks that are full or read-only for real: a tmpfs, which only root may mount."""

import os
import subprocess

import pytest
from faults import OPTIONS, assert_as_never_stopped, at, run_script


pytestmark = pytest.mark.long


@pytest.fixture
def disk(train):
    """disk(options) mounts a tmpfs where "disk/run" will be, or changes the one there; disk() takes it away."""
    place = train.directory / "disk"

    def mount(options=None):
        if options is None:  # lazily: the reference's weights are still a map of a file there
            return subprocess.run(["umount", "--lazy", place], check=True)
        options = f"remount,{options}" if place.is_mount() else options
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)

    place.mkdir()
    try:
        mount("size=1m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this needs the right to mount a tmpfs")
    mount()
    yield mount
    if place.is_mount():
        mount()


@pytest.mark.parametrize("mode, sizes", [("lora", range(80, 1000, 90)), ("full", range(400, 6000, 510))])
def test_a_full_disk_costs_nothing(train, whole, disk, mode, sizes):
    """One line, whatever was being written; with room again, `latest` ends as the run that always had it."""
    options, met = dict(OPTIONS, train_mode=mode), []
    expected = whole(train, **options)
    for size in sizes:
        disk(f"size={size}k")
        code, said = run_script(train, name="disk/run", **options)
        assert not [line for line in said if "Traceback" in line], said
        if code:
            start, end = "train_sspo_sd.py: ", "; fix it and add --resume_from_checkpoint latest"
            assert said[-1].startswith(start) and said[-1].endswith(end), said[-1]
            met.append(said[-1])
        disk("size=100m")
        again = train("disk/run", resume_from_checkpoint="latest", **options)
        assert_as_never_stopped(expected, again)
        disk()
    assert len(sizes) // 2 < len(met) < len(sizes)
    assert 0 < sum("checkpoint-" in line for line in met) < len(met), "in checkpoints, and elsewhere"


@pytest.mark.parametrize("file", ["iteration-0.partial", "iteration-2.partial", "checkpoint-6.partial"])
def test_a_disk_that_becomes_read_only_costs_nothing(train, whole, disk, file):
    disk("size=100m")
    code, said = run_script(
        train, lambda: at(None, (os, "replace", file, "before"), lambda: disk("ro")), "disk/run", **OPTIONS
    )
    assert code == 1
    assert "Read-only file system" in said[-1] and said[-1].startswith("train_sspo_sd.py: ")
    disk("rw")
    again = train("disk/run", resume_from_checkpoint="latest", **OPTIONS)
    assert_as_never_stopped(whole(train, **OPTIONS), again)


def test_a_disk_that_is_read_only_is_refused_before_the_models_load(train, disk):
    disk("size=100m,ro")
    code, said = run_script(train, name="disk/run")
    assert code == 1
    assert said == [
        f"train_sspo_sd.py: --output_dir {train.directory}/disk/run cannot be written: Read-only file system"
    ]
