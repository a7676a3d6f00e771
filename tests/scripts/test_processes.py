"""Runs as users start them: from the command line, on two processes, killed and resumed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from faults import ranks_in_children, run_of_two
from helpers import (
    ENVIRONMENT,
    LAYOUT,
    ROOT,
    Run,
    assert_same_but_for_rounding,
    assert_same_result,
    forget_result,
    launch,
    long,
    start,
    updates,
    wait_for,
)


def test_two_processes_make_the_same_run(train, tmp_path):
    """2 x 2 pairs equal 1 x 4: losses, references and weights; the data order, draws and rivals too, then."""
    options = dict(LAYOUT, checkpointing_steps=3)
    words = train.words("two", train_batch_size=2, validation_prompts=["a red circle"], **options)
    process = launch(words, processes=2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    one, two = train("one", train_batch_size=4, **options), Run(tmp_path / "two")
    assert_same_but_for_rounding(one, two)
    assert (two.path / "checkpoint-3" / "random_states_1.pkl").is_file(), "every process took part in the checkpoint"
    assert (two.path / "samples" / "step-6.png").is_file()
    # Half of it again, on one process.
    (two.path / "pytorch_lora_weights.safetensors").unlink()
    options.update(train_batch_size=1, gradient_accumulation_steps=4, resume_from_checkpoint="checkpoint-3")
    assert_same_but_for_rounding(one, train("two", **options))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("sd", dict(train_mode="full", cache_latents=True)),
        ("sd", dict(split_pairs=True, gradient_accumulation_steps=2, train_batch_size=1)),
        ("sdxl", dict(split_pairs=True, train_mode="full")),
        pytest.param("sd", dict(split_pairs=True), marks=long),
        pytest.param("sdxl", dict(), marks=long),
        pytest.param("video", dict(split_pairs=True), marks=long),
        pytest.param("video", dict(train_mode="full", gradient_checkpointing=True), marks=long),
    ],
)
def test_two_processes_are_one(trains, kind, options):
    """
    The global batch of one process, with both halves of its pairs together, whichever way two processes go about it.
    """
    train, options = trains[kind], {**LAYOUT, "train_batch_size": 2, **options}
    alone = dict(train_batch_size=4, gradient_accumulation_steps=1, split_pairs=False)
    assert_same_but_for_rounding(train("one", **{**options, **alone}), run_of_two(train, "two", **options))


def test_a_run_may_be_resumed_on_more_processes(train):
    options = dict(LAYOUT, checkpointing_steps=3)
    one = train("one", train_batch_size=4, **options)
    forget_result(train("two", train_batch_size=4, **{**options, "max_train_steps": 3}))
    two = run_of_two(train, "two", train_batch_size=2, resume_from_checkpoint="latest", **options)
    assert_same_but_for_rounding(one, two)


def test_machines_may_have_copies_of_the_data(train):
    """By the files' times datasets takes them for different ones; the cache is one."""

    def copied(rank):
        init = train.script.Winners.__init__

        def elsewhere(winners, args):
            init(winners, args)
            winners.dataset._fingerprint += str(rank)

        train.script.Winners.__init__ = elsewhere

    options = dict(LAYOUT, cache_latents=True)
    one = train("one", train_batch_size=4, **options)
    assert ranks_in_children(train, "two", copied, train_batch_size=2, **options) == [0, 0]
    two = Run(train.directory / "two")
    assert_same_but_for_rounding(one, two)
    assert len(list(two.path.glob("cache/*"))) == 1


def test_each_process_encodes_its_share_of_the_cache(train, tmp_path):
    """Files of two winners: four for each of two processes, none of them twice."""

    def counted(rank):
        encode, train.script.CACHE_FILE = train.script.encode_latents, 2

        def encode_latents(models, examples):
            with open(tmp_path / "encoded", "a") as file:
                file.write("".join(f"{example['row']}\n" for example in examples))
            return encode(models, examples)

        train.script.encode_latents = encode_latents

    options = dict(LAYOUT, cache_latents=True)
    one = train("one", train_batch_size=4, **options)
    assert ranks_in_children(train, "two", counted, train_batch_size=2, **options) == [0, 0]
    assert sorted((tmp_path / "encoded").read_text().split()) == [str(row) for row in range(8)]
    assert_same_but_for_rounding(one, Run(train.directory / "two"))


def test_all_processes_resume_from_the_main_ones_checkpoint(train):
    """Another machine may be shown the folder as it was half a minute ago."""

    def stale(rank):
        find = train.script.list_checkpoints
        train.script.list_checkpoints = lambda folder: dict([*find(folder).items()][: 1 if rank else None])

    options = dict(LAYOUT, checkpointing_steps=2)
    one = train("one", train_batch_size=4, **options)
    forget_result(train("two", train_batch_size=4, **{**options, "max_train_steps": 4}))
    resumed = dict(options, train_batch_size=2, resume_from_checkpoint="latest")
    assert ranks_in_children(train, "two", stale, **resumed) == [0, 0]
    assert_same_but_for_rounding(one, Run(train.directory / "two"))


def recipe(rank, *words, **variables):
    """Starts launch.sh on one machine of several."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**ENVIRONMENT, "PATH": path, "RANK": rank, **variables}
    (script,) = (ROOT / "examples").rglob("launch.sh")
    return subprocess.Popen(
        [str(word) for word in [script, *words]],
        env={name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_machines_make_the_run_of_one(train, sd, winners, tmp_path):
    """The paper's recipe and --split_pairs, as launch.sh starts them on each machine; here both are this one."""
    short = dict(max_train_steps=4, replay_steps=2, rollout_steps=2, resolution=64, report_to="none")
    words = [word for name, value in short.items() for word in (f"--{name}", value)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(MODEL=sd, DATA=winners, OUTPUT=tmp_path / "two", PRECISION="no")
    shared |= dict(MACHINES=2, GPUS=1, MICRO=2, PAIRS=8, PORT=port)
    machines = [recipe(rank, *words, "--split_pairs", **shared) for rank in (1, 0)]
    for machine in machines:
        output, _ = machine.communicate(timeout=240)
        assert machine.returncode == 0, output
    two = Run(tmp_path / "two")
    recipes = dict(train_mode="full", learning_rate=2e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=20)
    one = train("one", train_batch_size=4, gradient_accumulation_steps=2, center_crop=None, **recipes, **short)
    assert two.column("reference/index") == one.column("reference/index")
    assert two.column("lr") == pytest.approx(one.column("lr"))
    assert two.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-3)
    assert two.column("loss") == pytest.approx(one.column("loss"), rel=1e-3)
    assert (two.path / "model_index.json").is_file()


def test_recipe_that_does_not_divide_is_refused(tmp_path):
    script = recipe(0, MODEL="-", DATA="-", OUTPUT=tmp_path / "never", GPUS=3)
    output, _ = script.communicate()
    assert script.returncode == 2
    assert output == "launch.sh: 2048 pairs cannot be dealt to 3 GPUs in micro-batches of 1: change MICRO\n"
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=long)])
def test_stopped_run_is_resumed_as_if_never_stopped(train, number):
    """SIGTERM and SIGINT save a checkpoint first; after SIGKILL the last one serves."""
    options = dict(max_train_steps=400, checkpointing_steps=5, replay_size=3, checkpoints_total_limit=2)
    run = Run(train.directory / "stopped")
    process = start(train, "stopped", **options)
    wait_for(lambda: updates(run) >= 8, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    stopped_at = updates(run)
    assert stopped_at < 400
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert (run.path / f"checkpoint-{stopped_at}").is_dir()
        assert "Traceback" not in output
        assert f"--resume_from_checkpoint latest resumes after update {stopped_at}." in output
    assert not (run.path / "pytorch_lora_weights.safetensors").exists()

    options["max_train_steps"] = stopped_at + 4
    again = train("stopped", resume_from_checkpoint="latest", **options)
    assert [line["step"] for line in again.metrics] == list(range(1, stopped_at + 5))
    assert_same_result(train("whole", **options), again)


def test_a_test_that_hangs_fails_and_ends_what_it_started(tmp_path):
    """Else what it has forked holds the pipes for whose end whoever runs the tests waits."""
    lines = ["import os, time", "def test_hanging():", "    os.fork() or time.sleep(1000)", "    os.wait()"]
    (tmp_path / "test_hanging.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--timeout", "2"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT / "tests")}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert "FAILED test_hanging.py::test_hanging - Failed: Timeout" in ended.stdout
