"""Runs as users start them: from the command line, on two processes, killed and resumed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Run, flags
from test_training import LAYOUT, assert_same_but_for_rounding, assert_same_result


SCRIPT = ROOT / "train_sspo_sd.py"
ENVIRONMENT = {**os.environ, "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}


def launch(words, processes=1):
    """Starts the script by `accelerate launch`; two processes talk through gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]  # a free one: tests run side by side
    command = [str(word) for word in [*command, SCRIPT, *words]]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_make_the_same_run(train, sd, winners, tmp_path):
    """2 x 2 pairs equal 1 x 4: losses, references and weights; the data order, draws and rivals too, then."""
    options = dict(LAYOUT, checkpointing_steps=3)
    two = tmp_path / "two"
    words = flags(sd, winners, two, train_batch_size=2, validation_prompts=["a red circle"], **options)
    process = launch(words, processes=2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    one, two = train("one", train_batch_size=4, **options), Run(two)
    assert_same_but_for_rounding(one, two)
    assert (two.path / "checkpoint-3" / "random_states_1.pkl").is_file(), "every process took part in the checkpoint"
    assert (two.path / "samples" / "step-6.png").is_file()
    # Half of it again, on one process.
    (two.path / "pytorch_lora_weights.safetensors").unlink()
    options.update(train_batch_size=1, gradient_accumulation_steps=4, resume_from_checkpoint="checkpoint-3")
    assert_same_but_for_rounding(one, train("two", **options))


def recipe(rank, *words, **variables):
    """Starts examples/launch.sh on one machine of several."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**ENVIRONMENT, "PATH": path, "RANK": rank, **variables}
    return subprocess.Popen(
        [str(word) for word in [ROOT / "examples" / "launch.sh", *words]],
        env={name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_machines_make_the_run_of_one(train, sd, winners, tmp_path):
    """The paper's recipe and --split_pairs, as examples/launch.sh starts them on each machine; here both are this."""
    short = dict(max_train_steps=4, replay_steps=2, rollout_steps=2, resolution=64, report_to="none")
    words = [word for name, value in short.items() for word in (f"--{name}", value)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(MODEL=sd, DATA=winners, OUTPUT=tmp_path / "two", MACHINES=2, GPUS=1, MICRO=2, PAIRS=8, PORT=port)
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


def wait_for_updates(run, count, process):
    """Waits until metrics.jsonl has `count` lines."""
    for _ in range(1200):
        if (run.path / "metrics.jsonl").exists() and len(
            (run.path / "metrics.jsonl").read_text().splitlines()
        ) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail("the run does not move")


def start(sd, winners, output, **options):
    command = [sys.executable, SCRIPT, *flags(sd, winners, output, **options)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_run_goes_on_as_if_never_stopped(train, sd, winners, tmp_path, number):
    """SIGTERM and SIGINT save a checkpoint first; after SIGKILL the last one serves."""
    options = dict(max_train_steps=400, checkpointing_steps=5, replay_size=3, checkpoints_total_limit=2)
    run = Run(tmp_path / "stopped")
    process = start(sd, winners, run.path, **options)
    wait_for_updates(run, 8, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    stopped_at = len((run.path / "metrics.jsonl").read_text().splitlines())
    assert stopped_at < 400
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert (run.path / f"checkpoint-{stopped_at}").is_dir()
        assert "Traceback" not in output
    assert not (run.path / "pytorch_lora_weights.safetensors").exists()

    options["max_train_steps"] = stopped_at + 4
    again = train("stopped", resume_from_checkpoint="latest", **options)
    whole = train("whole", **options)
    assert [line["step"] for line in again.metrics] == list(range(1, stopped_at + 5))
    assert_same_result(whole, again)
