"""
Whole short runs of every script on a pretended GPU (fake_cuda/), for machines without one: what lies on the wrong
device raises as on a real one, and what makes the host wait in the sampler's loop is named by its line.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import report
from helpers import ENVIRONMENT, ROOT, SCRIPTS, WAN, Run, assert_same_result, flags, forget_result, long


THREE_UPDATES = dict(max_train_steps=3, replay_steps=2, reference="latest", train_batch_size=4)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """gpu(script, argv, fault=None) runs a script there and gives the report (see fake_cuda/run.py)."""
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    if compiler is None:
        pytest.skip("the pretended GPU needs a C++ compiler, g++ or clang++")
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        pytest.skip("the pretended GPU needs Linux and a build of torch for the CPU alone")
    folder, torch_folder = tmp_path_factory.mktemp("fake_cuda"), Path(torch.__file__).parent
    library = folder / "hooks.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-o", library, ROOT / "tests" / "fake_cuda" / "hooks.cpp"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-I{torch_folder / 'include'}"]
    command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    subprocess.run(command, check=True)

    environment = {**ENVIRONMENT, "LD_PRELOAD": str(library), "TOKENIZERS_PARALLELISM": "false"}
    del environment["ACCELERATE_USE_CPU"]
    command = [sys.executable, "-m", "fake_cuda.run"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT / "tests", env=environment, stderr=log, **pipes)

        def run(script, argv, fault=None):
            log.truncate(0)
            print(json.dumps(dict(script=str(script), argv=argv, fault=fault)), file=process.stdin, flush=True)
            reply = process.stdout.readline()
            print((folder / "log").read_text(errors="replace")[-4000:])  # pytest shows it if the test fails
            assert reply, "the process that runs scripts has ended"
            return json.loads(reply)

        yield run
        process.kill()
        process.wait()


@pytest.fixture
def train(gpu, request, tmp_path):
    """train(kind, name, flag=value, ...) trains a tiny model for three updates and gives the report and the Run."""

    def train(kind="sd", name="run", fault=None, **options):
        model = request.getfixturevalue("motion" if kind == "video" else kind)
        data = "pairs" if options.get("rivals") == "given" else "clips" if kind in ("video", "wan") else "winners"
        if kind == "video":
            model, adapter = model
            options |= dict(motion_adapter_name_or_path=adapter, num_frames=4, frame_stride=2, resolution=32)
        if kind == "wan":
            options |= WAN
        argv = flags(model, request.getfixturevalue(data), tmp_path / name, **{**THREE_UPDATES, **options})
        return gpu(ROOT / f"train_sspo_{kind}.py", argv, fault), Run(tmp_path / name)

    return train


CACHED = dict(
    cache_latents=True,
    proportion_empty_prompts=0.5,
    rollout_strength=0.7,
    mixed_precision="fp16",
    validation_prompts=["a red circle", "a blue square"],
    validation_steps=2,
)
STREAMED = dict(
    streaming=True,
    train_batch_size=2,
    gradient_checkpointing=True,
    split_pairs=True,
    draws_per_pair=2,
    rollout_guidance_scale=3,
    rollout_scheduler="ddim",
    mixed_precision="bf16",
)
ROWS = {f"{kind}-{mode}": (kind, dict(CACHED, train_mode=mode)) for kind in SCRIPTS for mode in ("lora", "full")}
ROWS |= {f"{kind}-streamed": (kind, STREAMED) for kind in SCRIPTS}
FLUX2 = dict(CACHED, mixed_precision="bf16")
ROWS |= {f"flux2-{mode}": ("flux2", dict(FLUX2, train_mode=mode)) for mode in ("lora", "full")}
ROWS |= {f"wan-{mode}": ("wan", dict(FLUX2, train_mode=mode)) for mode in ("lora", "full")}
ROWS["flux2-streamed"] = ("flux2", {name: value for name, value in STREAMED.items() if name != "rollout_scheduler"})
ROWS["wan-streamed"] = ("wan", dict(STREAMED, rollout_scheduler="euler", negative_prompt="still"))
ROWS["sdxl-sft"] = ("sdxl", dict(CACHED, loss_type="sft", train_mode="full", optimizer="adafactor"))
ROWS["sdxl-given-rivals"] = ("sdxl", dict(rivals="given", cache_latents=True, mixed_precision="fp16"))
ROWS["sd-kept-rivals"] = ("sd", dict(rivals_per_winner=1, cache_latents=True, mixed_precision="fp16", unpaired=True))


SLOW = ("sdxl-full", "sdxl-streamed", "sdxl-sft", "video-full", "video-streamed")


@pytest.mark.parametrize(
    "kind, options", [pytest.param(*row, id=name, marks=[long] * (name in SLOW)) for name, row in ROWS.items()]
)
def test_fake_cuda(train, kind, options):
    """
    Nothing is on the wrong device, and the host never waits between two steps of the sampler. Where the reference is
    the policy, at updates 1 and 3, the gaps are exactly 0 under autocast; between them the policy has moved.
    """
    report, run = train(kind, **options)
    assert report["error"] is None
    unipc = kind == "wan" and "rollout_scheduler" not in options  # it copies its coefficients to the device itself
    assert [wait for wait in report["waits_in_sampler"] if not (unipc and "scheduler.step(" in wait)] == []
    assert all(norm is not None for norm in run.column("grad_norm")), "no update was skipped"
    if options.get("loss_type") != "sft":
        assert [gap == 0 for gap in run.column("gap/winner")] == [True, False, True]
        assert run.column("gap/rival")[::2] == [0, 0]
        assert run.column("loss")[::2] == pytest.approx([math.log(4 if "unpaired" in options else 2)] * 2)


def test_fake_cuda_resumes(train):
    """
    A checkpoint with the state of the scaler and of an optimizer on the device leads to the same end. The scale has
    fallen by then: a run that began with the first one would skip updates again.
    """
    options = dict(CACHED, validation_prompts=None, checkpointing_steps=2, sft_weight=2e5)
    report, whole = train(name="whole", **options)
    assert report["error"] is None
    assert whole.column("grad_norm")[0] is None, "an update before the checkpoint was skipped"
    report, part = train(name="part", **options, max_train_steps=2)
    assert report["error"] is None
    forget_result(part)
    report, part = train(name="part", **options, resume_from_checkpoint="latest")
    assert report["error"] is None
    assert part.column("grad_norm") == whole.column("grad_norm")
    assert_same_result(whole, part)


def test_fake_cuda_skips_an_update_that_overflows(train):
    """What fp16's scaler skips changes neither weights nor schedule. Here a term is too steep for its start."""
    options = dict(mixed_precision="fp16", sft_weight=2e5, reference="initial", max_train_steps=8)
    report, run = train(**options, lr_scheduler="constant_with_warmup", lr_warmup_steps=10)
    assert report["error"] is None
    taken = [norm is not None for norm in run.column("grad_norm")]
    assert taken[0] is False and sum(taken) >= 2, "some were skipped, and some were not"
    assert run.column("lr") == pytest.approx([1e-4 * sum(taken[:step]) for step in range(8)])
    moved = [sum(taken[:step]) > 1 for step in range(8)]  # the first step that is taken has a rate of 0
    assert [gap != 0 for gap in run.column("gap/winner")] == moved


def test_fake_cuda_computes_what_the_cpu_does(train, trains):
    """Or what passes there would say little."""
    options = dict(CACHED, mixed_precision="no")
    report, there = train(**options)
    assert report["error"] is None
    here = trains["sd"]("here", **options, **THREE_UPDATES)
    assert here.metrics[0]["mse/policy_rival"] == there.metrics[0]["mse/policy_rival"]
    for name in ("mse/policy_winner", "mse/policy_rival"):
        assert there.column(name) == pytest.approx(here.column(name), rel=1e-5)


def test_fake_cuda_notices_a_wrong_device(train):
    report, _ = train(**CACHED, fault="stack_before_moving")
    assert report["error"].startswith("RuntimeError: Expected all tensors to be on the same device")


def test_fake_cuda_names_the_line_that_waits(train):
    """A look in each call of the model: the first comes before the sampler's second step."""
    report, _ = train(**CACHED, fault="look_at_each_timestep")
    waits = report["waits_in_sampler"]
    assert len(waits) == 3 * 2 + 3 * 3, "three rollouts of two steps, three of validation pictures of three steps"
    assert all("_local_scalar_dense, line " in wait and " in self_sample: " in wait for wait in waits)
    assert all("predict(" in wait for wait in waits)


@pytest.mark.parametrize("item", [name for name in report.ITEMS if name not in ("versions", "nccl")])
def test_every_item_of_the_gpu_report_runs_there(gpu, tmp_path, item):
    """On tiny models, so that a card's owner does not meet our mistakes. The other two: test_gpu_report.py."""
    figures = tmp_path / "figures"
    told = gpu(ROOT / "tests" / "gpu" / "report.py", ["--item", item, "--figures", str(figures), "--tiny"])
    assert told["error"] is None
    found = [json.loads(line) for line in figures.read_text().splitlines()]
    assert found and [figure for figure in found if figure["passed"] is False] == []
