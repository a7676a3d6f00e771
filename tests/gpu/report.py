"""
What the scripts do on a GPU: a list of measurements, the most important first. `make test-gpu` runs them all.

Each item runs in a process of its own and has a limit of seconds, so that one that fails or hangs does not end the
rest. The report, gpu-report.md, is written anew after each: what was interrupted has all that was found by then.
Nothing is downloaded: models of the real sizes are built with random weights. A figure that says how it should be is
marked ok or FAILED; the exit status is 1 if one failed.

    python tests/gpu/report.py                      # ten minutes at most
    python tests/gpu/report.py --list
    python tests/gpu/report.py --only gap sdxl --minutes 30
    python tests/gpu/report.py --tiny               # shows that it runs, on tiny models; also on a CPU
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples" / "benchmark")]
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")

# The scripts that are measured; another one is another entry:
#   tiny        the function of tests/tiny.py that makes its model, and flags of its runs there
#   precisions  which it can be trained in; fp16 first, which cards of any age have
#   named       flags without which the real one does not start, beside those of the base model and the winners
#   runs        at the real size: updates, flags, and the peak in GiB that docs/memory.md computes for them
SHORT = "--gradient_accumulation_steps 2 --gradient_checkpointing --rollout_steps 4"
CLIP = f"{SHORT} --rollout_batch_size 1 --frame_stride 0 --num_frames 16 --resolution 256"
SCRIPTS = {
    "sd": dict(
        tiny=("stable_diffusion", "--resolution 64 --center_crop"),
        precisions=("fp16", "bf16"),
        runs=[(6, "--gradient_accumulation_steps 4 --rollout_batch_size 4", 3.7)],
    ),
    "sdxl": dict(
        tiny=("stable_diffusion_xl", "--resolution 64 --center_crop"),
        precisions=("fp16", "bf16"),
        runs=[(2, f"{SHORT} --rollout_batch_size 2 --resolution 1024", 8.3)],
    ),
    "video": dict(
        tiny=("animate_diff", "--resolution 32 --num_frames 4 --frame_stride 2"),
        precisions=("fp16", "bf16"),
        named="--motion_adapter_name_or_path -",
        runs=[(2, CLIP, 4.8), (2, f"{CLIP} --split_pairs", 3.6)],
    ),
    "flux2": dict(
        tiny=("flux2", "--resolution 64 --center_crop"),
        precisions=("bf16",),
        runs=[(2, f"{SHORT} --rollout_batch_size 2", 8.6)],
    ),
    "wan": dict(
        tiny=("wan", "--height 32 --width 32 --num_frames 5"),
        precisions=("bf16",),
        named="--fps 16",
        runs=[(2, f"{SHORT} --rollout_batch_size 1 --frame_stride 0", 11.3)],
    ),
}
FULL = "--train_mode full --gradient_checkpointing --gradient_accumulation_steps 2 --rollout_batch_size 2"


# ------------------------------------------------------------------------------------------------------------------
# What the items are made of
# ------------------------------------------------------------------------------------------------------------------


def tell(name, value, passed=None):
    """Notes a figure of the item that runs, and with `passed` whether it is as it should be."""
    passed = None if passed is None else bool(passed)
    with open(os.environ["GPU_FIGURES"], "a") as file:
        print(json.dumps(dict(name=name, value=str(value), passed=passed)), file=file)
    print(name, value, {None: "", True: "ok", False: "FAILED"}[passed], flush=True)


def on_gpu():
    import torch

    return torch.cuda.is_available()


def synchronize():
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def half(kind, small):
    """The half precision in which a script is measured: fp16 if it can; in tiny runs bf16, which a CPU has."""
    return SCRIPTS[kind]["precisions"][-1 if small else 0]


def gib(value):
    return f"{value / 2**30:.2f} GiB"


def build_real(kind, script, args, dtype):
    """A load_models of the real size with random weights, made on the GPU, where that takes no time."""
    import torch
    from estimate_memory import build_models

    os.environ.pop("ACCELERATE_USE_CPU", None)  # which is for estimate_memory's own runs
    with torch.device("cuda" if on_gpu() else "cpu"):
        models = build_models(kind, script, args, dtype)
    for module in (*models.encoders, models.denoiser):
        module.to("cpu")
    return models


class Run:
    """
    A run of a script's main in this process, on its tiny model or on one of the real size.

    Attributes:
        path, metrics: its output_dir, and the lines of its metrics.jsonl.
        scales: fp16's, before each update.
        allocated, reserved: the most bytes that PyTorch had, from when the models were loaded.
        weights: the policy's at the end.
    """

    def __init__(self, kind, folder, flags, real=False, changes=(), name="run"):
        import torch
        from accelerate.state import AcceleratorState, GradientState, PartialState

        script = importlib.import_module(f"train_sspo_{kind}")
        self.path, self.scales, self.weights = Path(folder, f"{kind}-{name}"), [], {}
        words = [*inputs(kind, Path(folder), real), *flags.split(), "--report_to", "none"]
        args = script.parse_args([*words, "--output_dir", str(self.path)])
        load, check, write = script.load_models, script.check_finite, script.write_result

        def load_models(args, dtype):
            gc.collect()  # of a run before this one
            models = build_real(kind, script, args, dtype) if real else load(args, dtype)
            if on_gpu():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            return models

        def check_finite(step, metrics, args, accelerator):
            self.scales.append(accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
            check(step, metrics, args, accelerator)

        def write_result(models, args, step):
            self.weights = script.policy_weights(models, args)
            if not real:  # the pipeline around a model of random weights is nowhere to be read
                write(models, args, step)

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        watched = dict(load_models=load_models, check_finite=check_finite, write_result=write_result)
        with mock.patch.multiple(script, **watched, **dict(changes)):
            script.main(args)
        self.allocated = torch.cuda.max_memory_allocated() if on_gpu() else 0
        self.reserved = torch.cuda.max_memory_reserved() if on_gpu() else 0

    @property
    def metrics(self):
        return [json.loads(line) for line in Path(self.path, "metrics.jsonl").read_text().splitlines()]


def inputs(kind, folder, real):
    """The flags that name model and winners, which are made in `folder` when they are first asked for."""
    import tiny

    make, flags = SCRIPTS[kind]["tiny"]
    clips = "--num_frames" in flags
    winners, model = folder / ("clips" if clips else "winners"), folder / f"{kind}.json"
    if not winners.exists():
        tiny.folder_of_clips(winners, length=24) if clips else tiny.folder_of_winners(winners)
    words = ["--train_data_dir", str(winners)]
    if real:
        return [*words, "--pretrained_model_name_or_path", "-", *SCRIPTS[kind].get("named", "").split()]
    if not model.exists():
        (folder / kind).mkdir()
        made = getattr(tiny, make)(folder / kind / "model")
        model.write_text(json.dumps([made] if isinstance(made, str) else made))
    for flag, name in zip(
        ("--pretrained_model_name_or_path", "--motion_adapter_name_or_path"), json.loads(model.read_text())
    ):
        words += [flag, name]
    return [*words, *flags.split()]


def tell_first_update(name, metrics):
    """At the first update policy and reference are one model: the gaps must be exactly 0, and the loss ln 2."""
    gaps, off = (metrics["gap/winner"], metrics["gap/rival"]), metrics["loss"] - math.log(2)
    told = f"loss - ln 2 = {off:.1e}, gaps {gaps[0]:g} and {gaps[1]:g}, dpo_fraction {metrics['dpo_fraction']:g}"
    tell(name, told, gaps == (0, 0) and abs(off) < 1e-6)


def milliseconds(function, times=5):
    """The shortest of some calls, after two that warm up."""
    seconds = []
    for _ in range(times + 2):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds[2:])


def kernels(function):
    """The names of the kernels that a call launches, each as often as it is launched."""
    import torch

    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        function()
        synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


# ------------------------------------------------------------------------------------------------------------------
# The items
# ------------------------------------------------------------------------------------------------------------------


def versions(folder, small):
    """Card, driver, packages, and the order in which PyTorch tries its kernels of attention."""
    import torch

    if on_gpu():
        tell("card", torch.cuda.get_device_name(0))
        tell("compute capability", ".".join(map(str, torch.cuda.get_device_capability(0))))
        tell("memory", gib(torch.cuda.mem_get_info()[1]))
    nvidia = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    commit = ["git", "-C", str(ROOT), "log", "-1", "--format=%h of %as"]
    for name, command in {"driver, power limit": nvidia, "commit": commit}.items():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            tell(name, subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    tell("system", f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPU cores")
    tell("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    packages = "torch diffusers transformers accelerate datasets peft bitsandbytes xformers triton"
    for package in packages.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            tell(package, metadata.version(package))
    backends = torch.nn.attention.SDPBackend
    order = [backends(number).name for number in getattr(torch._C, "_get_sdp_priority_order", lambda: [])()]
    tell("order of attention's kernels", ", ".join(order) or "not told")


def gap(folder, small):
    """Whether policy and reference agree to the last bit at the first update, in every script, mode and precision."""
    for kind, script in SCRIPTS.items():
        for precision in script["precisions"][-1 if small else 0 :]:
            for flags in ("", "--gradient_checkpointing --split_pairs", "--train_mode full")[: 1 if small else 3]:
                words = f"--mixed_precision {precision} --max_train_steps 1 --train_batch_size 2 {flags}"
                run = Run(kind, folder, f"{words} --rollout_steps 2", name=f"{precision}{flags}".replace(" ", ""))
                tell_first_update(f"{kind} {precision} {flags}", run.metrics[0])


def attention(folder, small):
    """
    Whether attention rounds alike with gradients and without, and which kernel it takes: cuDNN's may take another
    plan. If so, torch.backends.cuda.enable_cudnn_sdp(False) is what the scripts need.
    """
    import torch

    sdpa, device = torch.nn.functional.scaled_dot_product_attention, "cuda" if on_gpu() else "cpu"
    cases = {"SD 1.5": [(8, 4096, 40), (8, 1024, 80), (8, 256, 160)], "SDXL": [(10, 4096, 64), (20, 1024, 64)]}
    cases |= {"AnimateDiff": [(8, 16, 40)], "FLUX.2": [(24, 1536, 128)]}
    for model, shapes in cases.items():
        for heads, tokens, size in shapes:
            for dtype in (torch.float16, torch.bfloat16):
                q, k, v = torch.randn(3, 2, heads, 16 if small else tokens, size, device=device, dtype=dtype)
                for cudnn in (True, False):
                    torch.backends.cuda.enable_cudnn_sdp(cudnn)
                    with torch.no_grad():
                        without = sdpa(q, k, v)
                        names = kernels(lambda q=q, k=k, v=v: sdpa(q, k, v))
                    graded = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
                    names += kernels(lambda graded=graded: sdpa(*graded))
                    equal = torch.equal(without, sdpa(*graded).detach())
                    told = f"{'equal' if equal else 'NOT equal'} with gradients: {', '.join(short(names))}"
                    place = f"{model}, {heads} x {tokens} x {size}, {str(dtype)[6:]}"
                    tell(f"{place}, cuDNN {'allowed' if cudnn else 'not allowed'}", told, equal)
    torch.backends.cuda.enable_cudnn_sdp(True)


def short(names):
    return [name[:60] for name in dict.fromkeys(names)]


def rows(folder, small):
    """How many rows, batch x heads, each kernel of attention takes; train_sspo_video.py refuses more than 65535."""
    import torch

    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH", None):
        for count in (65535, 65536, 131072):
            size = (count // 4096 if small else count, 1, 16, 40)
            q = torch.randn(size, device="cuda" if on_gpu() else "cpu", dtype=torch.float16, requires_grad=True)
            kernel = getattr(torch.nn.attention.SDPBackend, backend or "MATH")
            try:
                with torch.nn.attention.sdpa_kernel(kernel) if backend else contextlib.nullcontext():
                    torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
                synchronize()
                told = "ok"
            except RuntimeError as error:
                told = " ".join(str(error).split())[:200]
                if "CUDA error" in told:  # after which nothing runs any more in this process
                    tell(f"{backend or 'default'}, {count} rows", told)
                    return
            needed = backend is None and count == 65535
            tell(f"{backend or 'default'}, {count} rows", told, told == "ok" if needed else None)


def runs(folder, small):
    """Tiny runs of every script with all that a device can break: one stopped by SIGTERM against one that was not."""
    import torch

    for kind in list(SCRIPTS)[: 1 if small else None]:
        words = f"--mixed_precision {half(kind, small)} --max_train_steps 4 --train_batch_size 2"
        words += " --rollout_steps 2 --replay_steps 2 --reference latest --cache_latents --gradient_checkpointing"
        words += " --proportion_empty_prompts 0.5 --validation_prompts fox --validation_steps 4 --use_8bit_adam"
        whole = Run(kind, folder, words, name="whole")
        tell_first_update(f"{kind}: first update", whole.metrics[0])
        write = importlib.import_module(f"train_sspo_{kind}").write_metrics

        def stop(args, metrics, write=write):
            write(args, metrics)
            if metrics["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        status = None
        try:
            Run(kind, folder, words, name="part", changes=dict(write_metrics=stop))
        except SystemExit as stopped:
            status = stopped.code
        tell(f"{kind}: status after SIGTERM", status, status == 128 + signal.SIGTERM)
        part = Run(kind, folder, f"{words} --resume_from_checkpoint latest", name="part")
        off = max((part.weights[name] - weight).abs().max().item() for name, weight in whole.weights.items())
        moved = max(weight.abs().max().item() for name, weight in whole.weights.items() if "lora_B" in name)
        told = f"weights differ by {off:.1e} at most, of up to {moved:.1e}"
        tell(f"{kind}: resumed against not stopped", told, off <= 1e-3 * moved)
        skipped = sum(line["grad_norm"] is None for line in whole.metrics)
        tell(f"{kind}: updates skipped, scale", f"{skipped} of 4, {whole.scales[0]:g}", skipped == 0)
        torch.cuda.empty_cache() if on_gpu() else None


def real(folder, small, kind):
    """Updates at the real size: seconds, memory against what docs/memory.md computes, fp16's scale from its start."""
    for number, (updates, flags, computed) in enumerate(SCRIPTS[kind]["runs"]):
        words = f"--mixed_precision {half(kind, small)} --cache_latents --train_batch_size 1 --validation_prompts fox "
        words += f"--max_train_steps {1 if small else updates} {flags}"
        words += f" --rollout_steps 2 {SCRIPTS[kind]['tiny'][1]}" if small else ""
        tell_run(Run(kind, folder, words, real=not small, name=f"real{number}"), flags, computed)


def tell_run(run, flags, computed):
    first, last = run.metrics[0], run.metrics[-1]
    tell("flags", f"`{flags}`")
    tell_first_update("first update", first)
    tell("seconds of an update (the first one)", f"{last['time/update']:.2f} ({first['time/update']:.2f})")
    tell("seconds of its rollouts", f"{last['time/rollout']:.2f}")
    scales = " ".join(f"{scale:g}" for scale in run.scales)
    skipped = sum(line["grad_norm"] is None for line in run.metrics)
    tell("updates skipped, scale before each", f"{skipped} of {len(run.metrics)}; {scales}", skipped == 0)
    told = f"{gib(run.allocated)} allocated, {gib(run.reserved)} reserved"
    if computed is None or not run.allocated:
        tell("peak", told)
    else:
        tell("peak", f"{told}; computed {computed} GiB", abs(run.allocated / 2**30 / computed - 1) < 0.15)


def forward(folder, small):
    """A forward of Stable Diffusion 1.5's UNet as rollouts could call it: milliseconds, and kernels launched."""
    import torch

    script = importlib.import_module("train_sspo_sd")
    device, dtype = ("cuda", torch.float16) if on_gpu() else ("cpu", torch.bfloat16)
    words = [*inputs("sd", Path(folder), not small), "--mixed_precision", "no"]
    args = script.parse_args(words)
    side, width, batches = (8, 16, (2,)) if small else (64, 768, (2, 16))
    models = script.load_models(args, dtype) if small else build_real("sd", script, args, dtype)
    script.prepare_denoiser(models, args, device)
    autocast = functools.partial(torch.autocast, device, dtype)

    def compare(name, context, latents_dtype):
        for batch in batches:
            noisy = torch.randn(batch, 4, side, side, device=device, dtype=latents_dtype)
            condition = {"prompt_embeds": torch.randn(batch, 77, width, device=device, dtype=dtype)}
            timesteps = torch.full((batch,), 500, device=device)

            def call(noisy=noisy, timesteps=timesteps, condition=condition):
                script.predict(models.denoiser, noisy, timesteps, condition)

            with torch.no_grad(), context():
                tell(f"{name}, {batch} latents", f"{milliseconds(call):.1f} ms, {len(kernels(call))} kernels")

    plain = functools.partial(script.stock_precision, models, autocast)
    compare("autocast, adapters in fp32 (as rollouts were)", autocast, torch.float32)
    compare("plain half precision, with adapters (as rollouts are)", plain, dtype)
    for layer in models.adapted_layers:
        layer.enable_adapters(False)
    compare("plain half precision, adapters off (from the base)", plain, dtype)
    torch.backends.cudnn.benchmark = True
    compare("the same with cudnn.benchmark", plain, dtype)
    models.denoiser.to(memory_format=torch.channels_last)
    compare("and channels_last", plain, dtype)
    torch.backends.cudnn.benchmark = False
    compare("channels_last without cudnn.benchmark", plain, dtype)
    models.denoiser.to(memory_format=torch.contiguous_format)
    name = "plain, each block of attention compiled"
    for module in [module for module in models.denoiser.modules() if type(module).__name__ == "BasicTransformerBlock"]:
        module.compile(backend="eager" if small else "inductor")
    try:
        compare(name, plain, dtype)
    except Exception as error:  # it needs a compiler, and Triton
        tell(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def full(folder, small):
    """Stable Diffusion 1.5 trained in full: what AdamW's temporaries take, and 8-bit Adam."""
    script = importlib.import_module("train_sspo_sd")
    make_optimizer = script.make_optimizer

    def one_at_a_time(parameters, args):
        optimizer, schedule = make_optimizer(parameters, args)
        for group in optimizer.param_groups:
            group["foreach"] = False
        return optimizer, schedule

    changes = dict(make_optimizer=one_at_a_time)
    cases = [("", {}, 19.2), ("", changes, None), ("--use_8bit_adam", {}, 13.3)]
    for number, (flags, changes, computed) in enumerate(cases):
        words = f"--mixed_precision {half('sd', small)} --cache_latents --train_batch_size 1 {FULL} {flags} "
        words += "--max_train_steps 2 --validation_prompts fox --rollout_steps 2"
        words += f" {SCRIPTS['sd']['tiny'][1]}" if small else ""
        run = Run("sd", folder, words, real=not small, changes=changes, name=f"full{number}")
        tell_run(run, f"{FULL} {flags}{', and foreach=False' if changes else ''}", computed)


def sync(folder, small):
    """Where the host waits for the GPU in two updates, by PyTorch's own watch."""
    import torch

    kinds = ["sd"] if small else SCRIPTS
    for kind in kinds:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_gpu():
                torch.cuda.set_sync_debug_mode("warn")
            words = f"--mixed_precision {half(kind, small)} --max_train_steps 2"
            Run(kind, folder, f"{words} --train_batch_size 2 --rollout_steps 2")
            if on_gpu():
                torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
        for place in dict.fromkeys(places):
            tell(f"{kind}: {place}", f"{places.count(place)} times")
        tell(f"{kind}: waits in two updates, start and end included", len(places))


def xformers(folder, small):
    """What --enable_xformers_memory_efficient_attention says."""
    words = "--mixed_precision fp16 --max_train_steps 1 --train_batch_size 2 --rollout_steps 2"
    try:
        run = Run("sd", folder, f"{words} --enable_xformers_memory_efficient_attention")
        tell_first_update("xformers", run.metrics[0])
    except Exception as error:  # where it is missing or does not load, the message is what is asked for
        tell("xformers", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def nccl(folder, small):
    """Data parallel of one process: accumulated updates, a checkpoint, the end. On a CPU it is gloo's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    words = f"--mixed_precision {half('sd', small)} --max_train_steps 2 --train_batch_size 2"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run("sd", folder, f"{words} --rollout_steps 2 --gradient_accumulation_steps 2 --checkpointing_steps 2")
    tell_first_update("first update", run.metrics[0])
    tell("checkpoint", (run.path / "checkpoint-2").exists(), (run.path / "checkpoint-2").exists())
    for message in dict.fromkeys(" ".join(str(one.message).split())[:200] for one in caught):
        tell("warning", message)


MINUTES = 10
# In the order in which they run, each with its limit in seconds, of which a slow card may need more (--minutes).
ITEMS = {
    "versions": (versions, 20),
    "gap": (gap, 90),
    "attention": (attention, 40),
    "rows": (rows, 20),
    "runs": (runs, 80),
    "sd": (functools.partial(real, kind="sd"), 90),
    "forward": (forward, 80),
    **{kind: (functools.partial(real, kind=kind), 60) for kind in SCRIPTS if kind != "sd"},
    "full": (full, 80),
    "sync": (sync, 40),
    "xformers": (xformers, 20),
    "nccl": (nccl, 40),
}


# ------------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------------


def about(name):
    """What an item says of itself."""
    return " ".join(getattr(ITEMS[name][0], "func", ITEMS[name][0]).__doc__.split())


def command(name, figures, args):
    return [sys.executable, __file__, "--item", name, "--figures", str(figures), *(["--tiny"] if args.tiny else [])]


def measure(name, limit, args):
    """Runs an item in a process of its own: its seconds, figures, and what went wrong, or None."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder, "figures"), Path(folder, "log")
        figures.touch()
        with log.open("w") as output:
            options = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            process = subprocess.Popen(command(name, figures, args), **options)
            try:
                code = process.wait(limit)
                problem = None if code == 0 else f"it ended with status {code}"
            except subprocess.TimeoutExpired:
                problem = f"it was still running after its {limit:.0f} seconds"
            with contextlib.suppress(ProcessLookupError):  # what it may have started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = [json.loads(line) for line in figures.read_text().splitlines()]
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    failed = problem is not None or any(figure["passed"] is False for figure in found)
    seconds = time.monotonic() - started
    return dict(name=name, seconds=seconds, figures=found, problem=problem, tail=tail, failed=failed)


def markdown(done, left, tiny):
    """The report: a line for each item, then its figures."""
    note = ". Of tiny models: it shows that the items run, and measures nothing." if tiny else ""
    lines = [
        "# GPU report",
        "",
        time.strftime("%Y-%m-%d %H:%M") + note,
        "",
        "| item | seconds | |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {one['name']} | {one['seconds']:.0f} | {'FAILED' if one['failed'] else 'ok'} |" for one in done]
    lines += [f"| {name} | | not run |" for name in left]
    for one in done:
        lines += ["", f"## {one['name']}", "", about(one["name"])]
        lines += ["", "| | | |", "| --- | --- | --- |"]
        for figure in one["figures"]:
            value, mark = figure["value"].replace("|", "\\|"), {None: "", True: "ok", False: "FAILED"}
            lines.append(f"| {figure['name']} | {value} | {mark[figure['passed']]} |")
        if one["problem"]:
            lines += ["", f"**FAILED**: {one['problem']}. The end of its log:", "```", one["tail"], "```"]
    return "\n".join(lines) + "\n"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM", help="Some items.")
    parser.add_argument("--list", action="store_true", help="Name the items and their limits, and end.")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="For all together: what is left then is not run. More also raise the items' limits.",
    )
    parser.add_argument("--tiny", action="store_true", help="Tiny models, on whatever device there is.")
    parser.add_argument("--output", default="gpu-report.md", help="Where the report is written.")
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    parser.add_argument("--figures", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(args):
    if args.list:
        for name, (_, limit) in ITEMS.items():
            print(f"{name:10} {limit:3} s  {about(name)}")
        return
    if args.item:
        os.environ["GPU_FIGURES"] = args.figures
        with tempfile.TemporaryDirectory() as folder:
            return ITEMS[args.item][0](folder, args.tiny)
    if not args.tiny and not on_gpu():
        sys.exit("PyTorch finds no CUDA device here, and the report is about one: nothing was run")
    end, done = time.monotonic() + 60 * args.minutes, []
    names = [name for name in ITEMS if name in args.only]
    for number, name in enumerate(names):
        left = end - time.monotonic()
        if left < 5:
            break
        limit = ITEMS[name][1] * max(args.minutes / MINUTES, 1)
        done.append(measure(name, min(limit, left), args))
        print(f"{name}: {'FAILED' if done[-1]['failed'] else 'ok'}, {done[-1]['seconds']:.0f} s", flush=True)
        Path(args.output).write_text(markdown(done, names[number + 1 :], args.tiny))
    print(f"\n{Path(args.output).read_text()}\nwritten to {args.output}")
    sys.exit(1 if any(one["failed"] for one in done) or len(done) < len(names) else 0)


if __name__ == "__main__":
    main(parse_args())
