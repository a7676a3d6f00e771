"""
What the scripts do on a GPU: a list of measurements, the most important first. `make test-gpu` runs them all.

Each item runs in a process of its own and has a limit of seconds, so that one that fails or hangs does not end the
rest. The report, gpu-report.md, is written anew after each: what was interrupted has all that was found by then.
Nothing is downloaded: models of the real sizes are built with random weights. A figure that says how it should be is
marked ok or FAILED; the exit status is 1 if one failed. What had no time is named, and is no failure.

    python tests/gpu/report.py                      # half an hour at most
    python tests/gpu/report.py --list
    python tests/gpu/report.py --only gap sdxl --minutes 30
    python tests/gpu/report.py --tiny               # shows that it runs, on tiny models; also on a CPU
"""

import argparse
import contextlib
import functools
import gc
import importlib
import itertools
import json
import math
import os
import platform
import re
import signal
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
#   runs        at the real size: updates, flags, and what docs/memory.md computes for them: the peak in GiB, and the
#               GB of the smallest card, of which the run is given no more
SHORT = "--gradient_accumulation_steps 2 --gradient_checkpointing --rollout_steps 4"
CLIP = f"{SHORT} --rollout_batch_size 1 --frame_stride 0 --num_frames 16 --resolution 256"
SCRIPTS = {
    "sd": dict(
        tiny=("stable_diffusion", "--resolution 64 --center_crop"),
        precisions=("fp16", "bf16"),
        runs=[(6, "--gradient_accumulation_steps 4 --rollout_batch_size 4", 3.7, 8)],
    ),
    "sdxl": dict(
        tiny=("stable_diffusion_xl", "--resolution 64 --center_crop"),
        precisions=("fp16", "bf16"),
        runs=[(2, f"{SHORT} --rollout_batch_size 2 --resolution 1024", 10.0, 16)],
    ),
    "video": dict(
        tiny=("animate_diff", "--resolution 32 --num_frames 4 --frame_stride 2"),
        precisions=("fp16", "bf16"),
        named="--motion_adapter_name_or_path -",
        runs=[(2, CLIP, 4.8, 8), (2, f"{CLIP} --split_pairs", 3.8, 8)],
    ),
    "flux2": dict(
        tiny=("flux2", "--resolution 64 --center_crop"),
        precisions=("bf16",),
        runs=[(2, f"{SHORT} --rollout_batch_size 2", 8.9, 12)],
    ),
    "wan": dict(
        tiny=("wan", "--height 32 --width 32 --num_frames 5"),
        precisions=("bf16",),
        named="--fps 16",
        runs=[(2, f"{SHORT} --rollout_batch_size 1 --frame_stride 0 --num_frames 17 --max_train_samples 2", 11.7, 16)],
    ),
}
# Settings that docs/memory.md recommends for a card, beyond those above: script, flags, peak in GiB, GB of the card.
MORE = "--gradient_checkpointing --rollout_steps 4"
FOUR = "--gradient_accumulation_steps 4 --rollout_batch_size 4"
CLIP_512 = f"{MORE} --rollout_batch_size 1 --frame_stride 0 --num_frames 16 --resolution 512"
WAN = f"{MORE} --rollout_batch_size 1 --frame_stride 0 --max_train_samples 1"
HALF_VAE = "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"  # tiny ones have none
CARDS = [
    ("sd", "--gradient_checkpointing --draws_per_pair 4 --gradient_accumulation_steps 8", 3.6, 8),
    ("sdxl", f"{MORE} {FOUR} --draws_per_pair 4 --resolution 1024", 10.3, 16),
    ("sdxl", f"{MORE} {FOUR} --draws_per_pair 4 --split_pairs --resolution 1024 {HALF_VAE}", 7.7, 12),
    ("video", CLIP_512, 11.9, 16),
    ("video", f"{CLIP_512} --split_pairs", 7.4, 12),
    ("flux2", f"{MORE} {FOUR} --resolution 1024", 12.4, 16),
    ("wan", f"{WAN} --num_frames 33", 11.8, 16),
    ("wan", f"{WAN} --num_frames 81", 16.1, 24),
    ("sdxl", f"{MORE} --train_mode full --use_8bit_adam --resolution 1024", 34.1, 48),
]
FULL = "--train_mode full --gradient_checkpointing --gradient_accumulation_steps 2 --rollout_batch_size 2"
FULL_PEAKS = {"": (19.2, 24), "--use_8bit_adam": (13.3, 24)}  # as in `runs`


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


def precisions(kind, small):
    """In which half precisions a script can be measured: bf16 in tiny runs, since a CPU has it; not before Ampere."""
    import torch

    known = SCRIPTS[kind]["precisions"]
    old = not small and on_gpu() and torch.cuda.get_device_capability() < (8, 0)
    return known[-1:] if small else [precision for precision in known if not (old and precision == "bf16")]


def half(kind, small):
    return precisions(kind, small)[0]


def measurable(small):
    return [kind for kind in SCRIPTS if precisions(kind, small)]


def gib(value):
    return f"{value / 2**30:.2f} GiB"


def share_of(card):
    """The share of this GPU's memory that a card of so many GB has for tensors; None if this one is no larger."""
    import torch

    if not card or not on_gpu():
        return None
    share = (card * 1e9 - 2**30 * real_size().CONTEXT) / torch.cuda.mem_get_info()[1]
    return share if share < 0.9 else None


def real_size():
    """estimate_memory.py, which builds models of the real size."""
    import estimate_memory

    os.environ.pop("ACCELERATE_USE_CPU", None)  # which is for its own runs
    return estimate_memory


def build_real(kind, script, args, dtype):
    """
    A load_models of the real size with random weights. They are made on the GPU, where that takes no time, and each
    part leaves it before the next one is made: all of them would be more than a run needs.
    """
    import torch

    models, device = real_size(), "cuda" if on_gpu() else "cpu"
    build = models.build

    def build_and_leave(*inputs, **named):
        with torch.device(device):
            return build(*inputs, **named).to("cpu")

    with mock.patch.object(models, "build", build_and_leave):
        return models.build_models(kind, script, args, dtype)


class Run:
    """
    A run of a script's main in this process, on its tiny model or on one of the real size.

    Attributes:
        path, metrics: its output_dir, and the lines of its metrics.jsonl.
        scales: fp16's, before each update.
        allocated, reserved: the most bytes that PyTorch had, from when the models were loaded. Of a `card` of so many
            GB, where it is given, it gets no more than such a card has.
        beside: the bytes that were taken on the GPU at the end beside PyTorch's: CUDA's own, and its libraries'.
        weights: the policy's at the end.
    """

    def __init__(self, kind, folder, flags, real=False, changes=(), name="run", card=None):
        import torch
        from accelerate.state import AcceleratorState, GradientState, PartialState

        script = importlib.import_module(f"train_sspo_{kind}")
        self.path, self.scales, self.weights = Path(folder, f"{kind}-{name}"), [], {}
        words = [*inputs(kind, Path(folder), real), *flags.split(), "--report_to", "none"]
        args = script.parse_args([*words, "--output_dir", str(self.path), "--cache_dir", str(Path(folder, "cache"))])
        load, check, write = script.load_models, script.check_finite, script.write_result

        def load_models(args, dtype):
            gc.collect()  # of a run before this one
            models = build_real(kind, script, args, dtype) if real else load(args, dtype)
            if on_gpu():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_per_process_memory_fraction(share_of(card) or 1.0)
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
        free, total = torch.cuda.mem_get_info() if on_gpu() else (0, 0)
        self.beside = total - free - torch.cuda.memory_reserved() if on_gpu() else 0

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
        tiny.folder_of_clips(winners, length=96) if clips else tiny.folder_of_winners(winners)
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


def one_line(error):
    return " ".join(str(error).split())[:200]


def no_room(error):
    """Whether an error says, in PyTorch's words or cuDNN's, that the memory is full."""
    return re.search("out of memory|unable to find an engine|_ALLOC_FAILED", str(error))


@contextlib.contextmanager
def a_failure_told_as(name, card=None):
    """
    What goes wrong within is one row of the report, and the item goes on. That the memory is full is no failure, but
    if the run had what a `card` of so many GB has, which should do.
    """
    import torch

    try:
        yield
    except Exception as error:  # SystemExit, by which a run says that it was stopped, is none
        room = no_room(error) and not share_of(card)
        told = f"skipped, it does not fit the memory: {str(error)[:60]}" if room else one_line(error)
        tell(name, told if room or not card else f"on a card of {card} GB: {told}", None if room else False)
    gc.collect()
    if on_gpu():
        with contextlib.suppress(RuntimeError):  # after an illegal access this too raises
            torch.cuda.empty_cache()


def computes():
    """Whether the device still does: after some errors nothing runs any more in this process."""
    import torch

    try:
        return torch.ones(2, device="cuda" if on_gpu() else "cpu").sum().item() == 2
    except RuntimeError:
        return False


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
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
            tell(name, told[0])  # of several cards, that of the first
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
    for kind in measurable(small):
        for precision in precisions(kind, small):
            for flags in ("", "--gradient_checkpointing --split_pairs", "--train_mode full")[: 1 if small else 3]:
                words = f"--mixed_precision {precision} --max_train_steps 1 --train_batch_size 2 {flags}"
                with a_failure_told_as(f"{kind} {precision} {flags}"):
                    run = Run(kind, folder, f"{words} --rollout_steps 2", name=f"{precision}{flags}".replace(" ", ""))
                    tell_first_update(f"{kind} {precision} {flags}", run.metrics[0])


def attention(folder, small):
    """
    Whether attention rounds alike with gradients and without, whichever kernel comes first on this card: if not, the
    gaps are not 0 at the first update. cuDNN's may take another plan: torch.backends.cuda.enable_cudnn_sdp(False) is
    then what the scripts need, and is tried too. Shapes are rows, heads, queries x keys, size of a head.
    """
    import torch

    # The tokens of a prompt, where they are attended to alone, and (rows, heads, queries, size of a head).
    cases = {
        "SD 1.5": (77, [(2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160)]),
        "SDXL": (77, [(2, 10, 4096, 64), (2, 20, 1024, 64)]),
        "AnimateDiff": (None, [(2048, 8, 16, 40), (32, 8, 16, 160)]),
        "FLUX.2": (None, [(2, 24, 1536, 128)]),
        "Wan 2.1": (512, [(2, 12, 14040, 128)]),
    }
    dtypes = [torch.float16, *([torch.bfloat16] if small or "bf16" in precisions("sd", small) else [])]
    for model, (prompt, shapes) in cases.items():
        for count, heads, queries, size in shapes:
            for keys in [queries, prompt] if prompt else [queries]:
                place, most = f"{model}, {count}, {heads}, {queries} x {keys}, {size}", 16 if small else math.inf
                made = [[min(most, number) for number in (count, length)] for length in (queries, keys, keys)]
                for dtype in dtypes:
                    with a_failure_told_as(f"{place}, {str(dtype)[6:]}"):
                        tell_rounding(f"{place}, {str(dtype)[6:]}", [(*one, heads, size) for one in made], dtype)


def tell_rounding(place, shapes, dtype):
    """Attention with gradients against the same without, of (rows, tokens, heads, size) as the models transpose it."""
    import torch

    sdpa, device = torch.nn.functional.scaled_dot_product_attention, "cuda" if on_gpu() else "cpu"
    inputs = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes]
    graded = [tensor.clone().requires_grad_() for tensor in inputs]  # strides are kept
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        with torch.no_grad():
            without, names = sdpa(*inputs), kernels(lambda: sdpa(*inputs))
        equal = torch.equal(without, sdpa(*graded).detach())
        names = list(dict.fromkeys(name[:60] for name in names + kernels(lambda: sdpa(*graded))))
        told = f"{'equal' if equal else 'NOT equal'} with gradients: {', '.join(names)}"
        tell(place if cudnn else f"{place}, cuDNN not allowed", told, equal)
        if equal:
            break
    torch.backends.cuda.enable_cudnn_sdp(True)


def rows(folder, small):
    """
    How many rows each kernel of attention takes, and whether it is right there: rows x 8 heads x 16 frames x 40, as in
    motion modules, against the same in two halves. train_sspo_video.py allows 65535 rows forward and 32768 backward,
    beyond which flash attention's offsets may pass 32 bits. It comes last here, since it may end the item.
    """
    import torch

    counts, directions = (32768, 32769, 65535, 65536), (("forward", 65535), ("backward", 32768))
    for backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH", None, "FLASH_ATTENTION"):
        for (direction, most), count in itertools.product(directions, counts):
            kernel = getattr(torch.nn.attention.SDPBackend, backend or "MATH")
            try:
                with torch.nn.attention.sdpa_kernel(kernel) if backend else contextlib.nullcontext():
                    off = off_halves(-(-count // 4096) if small else count, direction == "backward")
                told, passed = f"differs from two halves by {off:.1e} of the largest", off < 1e-2
                told = told if passed else f"WRONG: it {told}"
            except RuntimeError as error:
                told, passed = one_line(error), None if no_room(error) else False
                told = told if passed is False else f"skipped, it does not fit the memory: {told[:60]}"
                if on_gpu():
                    with contextlib.suppress(RuntimeError):  # after an illegal access this too raises
                        torch.cuda.empty_cache()
            needed = backend is None and count <= most
            tell(f"{backend or 'default'}, {count} rows, {direction}", told, passed if passed or needed else None)
            if not computes():
                tell("the rest", "not run: after this error the device computes nothing any more in this process")
                return


def off_halves(count, backward):
    """How far attention, and its gradients, are off the same in two halves, over the largest value."""
    import torch

    device = "cuda" if on_gpu() else "cpu"
    *inputs, upstream = torch.randn(4, count, 16, 8, 40, device=device, dtype=torch.float16).transpose(2, 3)

    def compute(part):
        some = [tensor[part].detach().requires_grad_(backward) for tensor in inputs]
        out = torch.nn.functional.scaled_dot_product_attention(*some)
        return [out.detach(), *(torch.autograd.grad(out, some, upstream[part]) if backward else ())]

    whole, found = compute(slice(None)), []
    for part in (slice(count // 2), slice(count // 2, None)):
        for one, other in zip(whole, compute(part)):
            found.append(((one[part] - other).abs().max() / other.abs().max()).item())
    return max(found, key=lambda value: (math.isnan(value), value))


def runs(folder, small):
    """
    Tiny runs of every script with all that a device can break: one stopped by SIGTERM and resumed against one that was
    not, which is made three times, since a GPU's sums may hang on chance, and an optimizer makes more of their signs.
    """
    for kind in measurable(small)[: 1 if small else None]:
        with a_failure_told_as(f"{kind}: to the end"):
            stop_and_resume(kind, folder, small)


def stop_and_resume(kind, folder, small):
    import torch

    words = f"--mixed_precision {half(kind, small)} --max_train_steps 4 --train_batch_size 2"
    words += " --rollout_steps 2 --replay_steps 2 --reference latest --cache_latents --gradient_checkpointing"
    words += " --proportion_empty_prompts 0.5 --validation_prompts fox --validation_steps 4"
    words += " --use_8bit_adam --rank 512"  # of fewer than 4096 elements bitsandbytes keeps states in 32 bits
    whole = Run(kind, folder, words, name="whole")
    tell_first_update(f"{kind}: first update", whole.metrics[0])
    write = importlib.import_module(f"train_sspo_{kind}").write_metrics

    def stop(args, metrics):
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
    again = [Run(kind, folder, words, name=name) for name in ("again", "once more")]
    own, off = max(apart(whole, run) for run in again), apart(whole, part)
    moved = max(weight.abs().max().item() for name, weight in whole.weights.items() if "lora_B" in name)
    told = f"weights of up to {moved:.1e} differ by {off:.1e} at most; of those that were not stopped by {own:.1e}"
    tell(f"{kind}: resumed against not stopped", told, off <= 3 * own)
    state = torch.load(part.path / "checkpoint-2" / "optimizer.bin", map_location="cpu", weights_only=True)["state"]
    kept = {str(one["__bnb_optimizer_quant_state__"]["state1"].dtype)[6:] for one in state.values()}
    tell(f"{kind}: the optimizer's states", ", ".join(sorted(kept)), "uint8" in kept)
    skipped = sum(line["grad_norm"] is None for line in whole.metrics)
    tell(f"{kind}: updates skipped, scale", f"{skipped} of 4, {whole.scales[0]:g}", skipped == 0)


def apart(one, other):
    """The largest difference of two runs' weights."""
    return max((other.weights[name] - weight).abs().max().item() for name, weight in one.weights.items())


def real(folder, small, kind):
    """Updates at the real size: seconds, memory against what estimate_memory.py computes, fp16's scale."""
    if not precisions(kind, small):
        tell("not run", "it wants bf16, and bf16 an Ampere card or a later one")
    for number, (updates, flags, *computed) in enumerate(SCRIPTS[kind]["runs"] if precisions(kind, small) else ()):
        words = f"--mixed_precision {half(kind, small)} --cache_latents --train_batch_size 1 --validation_prompts fox "
        words += f"--max_train_steps {1 if small else updates} {flags}"
        words += f" --rollout_steps 2 {SCRIPTS[kind]['tiny'][1]}" if small else ""
        with a_failure_told_as(f"`{flags}`", computed[1]):
            run = Run(kind, folder, words, real=not small, name=f"real{number}", card=computed[1])
            tell_run(run, flags, *computed)


def tell_run(run, flags, computed=None, card=None):
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
        if share_of(card):
            told = f"it fits; {gib(run.beside)} of the GPU are taken beside PyTorch's, by all that runs on it"
            tell(f"on a card of {card} GB", told, True)


def cards(folder, small):
    """The settings that docs/memory.md recommends, held to the memory of the card that it recommends them for."""
    for number, (kind, flags, computed, card) in enumerate(CARDS):
        if not precisions(kind, small) or (not small and share_of(card) is None):
            tell(f"`{flags}`", f"not run: this card has no more than {card} GB, or no bf16")
            continue
        words = f"--mixed_precision {half(kind, small)} --cache_latents --train_batch_size 1 --validation_prompts fox "
        words += f"--max_train_steps 1 {flags} "
        if small:
            words = f"{words.replace(HALF_VAE, '')} --rollout_steps 2 {SCRIPTS[kind]['tiny'][1]}"
        with a_failure_told_as(f"`{flags}`", card):
            run = Run(kind, folder, words, real=not small, name=f"card{number}", card=card)
            tell_run(run, f"train_sspo_{kind}.py {flags}", computed, card)


def vae(folder, small):
    """
    The peak of decoding one picture of 1024² in fp32, as Stable Diffusion XL's VAE does: as computed, by cuDNN, whose
    workspaces are in no estimate, and by PyTorch's own convolutions.
    """
    import torch
    from diffusers import AutoencoderKL
    from torch._subclasses.fake_tensor import FakeTensorMode

    models, side = real_size(), 8 if small else 128
    config = dict(models.VAE, block_out_channels=(32,) * 4) if small else models.VAE
    with FakeTensorMode(), models.Memory() as memory:
        models.build(AutoencoderKL, torch.float32, **config).decode(torch.randn(1, 4, side, side))
    tell("computed", gib(max(memory.peaks.values())))
    device = "cuda" if on_gpu() else "cpu"
    with torch.device(device):
        decoder = models.build(AutoencoderKL, torch.float32, **config)
    for name, allowed in {"by cuDNN": True, "by PyTorch's own convolutions": False}.items():
        if on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        told = ""
        try:
            with torch.backends.cudnn.flags(enabled=allowed):
                decoder.decode(torch.randn(1, 4, side, side, device=device))
                synchronize()
        except RuntimeError as error:
            told = f"; {one_line(error)}"
        if on_gpu():
            told = f"{gib(torch.cuda.max_memory_allocated())}, {gib(torch.cuda.max_memory_reserved())} reserved{told}"
        tell(name, told or "as on a CPU")


def bare_unet(folder, small):
    """
    Stable Diffusion 1.5's UNet with adapters, as its script has it.

    Returns:
        its Models, and compare(name, stock=True), which tells the milliseconds and kernels of a forward: in plain half
        precision as in rollouts, or under autocast.
    """
    import torch

    script = importlib.import_module("train_sspo_sd")
    device, dtype = ("cuda", torch.float16) if on_gpu() else ("cpu", torch.bfloat16)
    words = [*inputs("sd", Path(folder), not small), "--mixed_precision", "no"]
    args = script.parse_args(words)
    side, width, batches = (8, 16, (2,)) if small else (64, 768, (2, 16))
    models = script.load_models(args, dtype) if small else build_real("sd", script, args, dtype)
    script.prepare_denoiser(models, args, device)
    autocast = functools.partial(torch.autocast, device, dtype)

    def compare(name, stock=True):
        for batch in batches:
            noisy = torch.randn(batch, 4, side, side, device=device, dtype=dtype if stock else torch.float32)
            condition = {"prompt_embeds": torch.randn(batch, 77, width, device=device, dtype=dtype)}
            timesteps = torch.full((batch,), 500, device=device)

            def call(noisy=noisy, timesteps=timesteps, condition=condition):
                script.predict(models.denoiser, noisy, timesteps, condition)

            with torch.no_grad(), script.stock_precision(models, autocast) if stock else autocast():
                tell(f"{name}, {batch} latents", f"{milliseconds(call):.1f} ms, {len(kernels(call))} kernels")

    return models, compare


def forward(folder, small):
    """A forward of Stable Diffusion 1.5's UNet as rollouts could call it: milliseconds, and kernels launched."""
    import torch

    models, compare = bare_unet(folder, small)
    compare("autocast, adapters in fp32 (as rollouts were)", stock=False)
    compare("plain half precision, with adapters (as rollouts are)")
    for layer in models.adapted_layers:
        layer.enable_adapters(False)
    compare("plain half precision, adapters off (from the base)")
    torch.backends.cudnn.benchmark = True
    compare("the same with cudnn.benchmark")
    models.denoiser.to(memory_format=torch.channels_last)
    compare("and channels_last")
    torch.backends.cudnn.benchmark = False
    compare("channels_last without cudnn.benchmark")


def compiled(folder, small):
    """The same forward with each block of attention compiled, beside it as it is. Compiling takes most of the time."""
    models, compare = bare_unet(folder, small)
    for layer in models.adapted_layers:
        layer.enable_adapters(False)
    compare("plain half precision, adapters off")
    for module in [module for module in models.denoiser.modules() if type(module).__name__ == "BasicTransformerBlock"]:
        module.compile(backend="eager" if small else "inductor")
    try:
        compare("each block of attention compiled")
    except Exception as error:  # it needs a compiler, and Triton
        tell("each block of attention compiled", f"{type(error).__name__}: {one_line(error)}")


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
    cases = [("", {}, *FULL_PEAKS[""]), ("", changes, None, None)]
    cases += [("--use_8bit_adam", {}, *FULL_PEAKS["--use_8bit_adam"])]
    for number, (flags, changes, computed, card) in enumerate(cases):
        words = f"--mixed_precision {half('sd', small)} --cache_latents --train_batch_size 1 {FULL} {flags} "
        words += "--max_train_steps 2 --validation_prompts fox --rollout_steps 2"
        words += f" {SCRIPTS['sd']['tiny'][1]}" if small else ""
        named = f"{FULL} {flags}{', and foreach=False' if changes else ''}"
        with a_failure_told_as(f"`{named}`", card):
            options = dict(real=not small, changes=changes, name=f"full{number}", card=card)
            tell_run(Run("sd", folder, words, **options), named, computed, card)


def sync(folder, small):
    """Where the host waits for the GPU in two updates, by PyTorch's own watch."""
    import torch

    for kind in measurable(small)[: 1 if small else None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_gpu():
                torch.cuda.set_sync_debug_mode("warn")
            words = f"--mixed_precision {half(kind, small)} --max_train_steps 2"
            with a_failure_told_as(f"{kind}: to the end"):
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
        tell("xformers", f"{type(error).__name__}: {one_line(error)}")


def nccl(folder, small):
    """
    Whether two processes on two cards start, end, and have the same weights after each update: its reference is what
    the first of them had, so that its gaps are exactly 0 if the other one has that too. A lone card says what NCCL's
    calls do with one process; a CPU has two of gloo's.
    """
    import torch

    if on_gpu() and torch.cuda.device_count() < 2:
        tell("two cards", "are not here: nothing of data parallel was run but the calls")
        return group_of_one(folder)
    words = f"--mixed_precision {half('sd', small)} --max_train_steps 3 --replay_steps 1 --reference latest"
    words += " --train_batch_size 1 --gradient_accumulation_steps 2 --rollout_steps 2 --checkpointing_steps 2"
    words += f" --learning_rate 1e-3 --report_to none --output_dir {folder}/two"
    launcher = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0"
    command = [sys.executable, *launcher.split(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "train_sspo_sd.py"), *inputs("sd", Path(folder), False), *words.split()]
    environment, warned = {**os.environ, **({} if on_gpu() else {"ACCELERATE_USE_CPU": "1"})}, {}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    with subprocess.Popen(command, **pipe) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if re.search(r"[Ww]arn|\[W", line):
                warned[one_line(line)] = None
    tell("status at the end", process.returncode, process.returncode == 0)
    if process.returncode:
        return
    for metrics in map(json.loads, Path(folder, "two", "metrics.jsonl").read_text().splitlines()):
        tell_first_update(f"update {metrics['step']}, both processes", metrics)
    for line in [*warned][:10]:
        tell("warning", line)


def group_of_one(folder):
    """The calls that data parallel makes, by one process."""
    import torch
    from torch import distributed

    backend, device = ("nccl", "cuda") if on_gpu() else ("gloo", "cpu")
    distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    numbers, objects = torch.arange(4.0, device=device), [None]
    distributed.all_reduce(numbers)
    tell("all_reduce", numbers.tolist(), numbers.tolist() == [0, 1, 2, 3])
    distributed.barrier()
    distributed.all_gather_object(objects, {"step": 3})
    tell("barrier, then a gather of objects", objects, objects == [{"step": 3}])
    distributed.destroy_process_group()
    tell("end of the group", "reached", not distributed.is_initialized())


MINUTES = 30
# In the order in which they run, each with its limit in seconds, of which a slow card may need more (--minutes).
ITEMS = {
    "versions": (versions, 20),
    "gap": (gap, 120),
    "attention": (attention, 60),
    "rows": (rows, 30),
    "runs": (runs, 150),
    "sd": (functools.partial(real, kind="sd"), 90),
    **{kind: (functools.partial(real, kind=kind), 60) for kind in SCRIPTS if kind not in ("sd", "wan")},
    "wan": (functools.partial(real, kind="wan"), 120),
    "cards": (cards, 400),
    "vae": (vae, 30),
    "forward": (forward, 50),
    "full": (full, 80),
    "nccl": (nccl, 90),
    "sync": (sync, 40),
    "xformers": (xformers, 20),
    "compiled": (compiled, 120),
}


# ------------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------------


def about(name):
    """What an item says of itself."""
    return " ".join(getattr(ITEMS[name][0], "func", ITEMS[name][0]).__doc__.split())


def command(name, figures, args):
    return [sys.executable, __file__, "--item", name, "--figures", str(figures), *(["--tiny"] if args.tiny else [])]


def measure(name, limit, left, args):
    """
    Runs an item in a process of its own, for `limit` seconds, or those that are left for all: its seconds, figures,
    what went wrong, or None, and how it ended.
    """
    started, cut = time.monotonic(), False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # what the item makes is in it too
        figures, log = Path(folder, "figures"), Path(folder, "log")
        figures.touch()
        with log.open("w") as output:
            options = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            process = subprocess.Popen(command(name, figures, args), **options)
            try:
                code = process.wait(min(limit, left))
                problem = None if code == 0 else f"it ended with status {code}"
            except subprocess.TimeoutExpired:
                cut = left < limit
                problem = "the time for all was up" if cut else f"it was still running after its {limit:.0f} seconds"
            finally:  # also after Ctrl-C
                kill(process)
        found = [json.loads(line) for line in figures.read_text().splitlines()]
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    failed = (problem is not None and not cut) or any(figure["passed"] is False for figure in found)
    end, seconds = "FAILED" if failed else "not to its end" if cut else "ok", time.monotonic() - started
    return dict(name=name, seconds=seconds, figures=found, problem=problem, tail=tail, end=end)


def kill(process):
    """Ends an item and all that it started; a launcher gives each of its processes a group of its own."""
    import psutil  # which accelerate needs

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def markdown(done, left, tiny):
    """The report: a line for each item, then its figures."""
    note = ". Of tiny models: it shows that the items run, and measures nothing." if tiny else ""
    lines = ["# GPU report", "", time.strftime("%Y-%m-%d %H:%M") + note, ""]
    if missed := [one["name"] for one in done if one["end"] == "not to its end"] + left:
        lines += [f"Not run to the end: {', '.join(missed)}. `--minutes` gives more time, `--only` picks some.", ""]
    lines += ["| item | seconds | |", "| --- | --- | --- |"]
    lines += [f"| {one['name']} | {one['seconds']:.0f} | {one['end']} |" for one in done]
    lines += [f"| {name} | | not run |" for name in left]
    for one in done:
        lines += ["", f"## {one['name']}", "", about(one["name"])]
        lines += ["", "| | | |", "| --- | --- | --- |"]
        for figure in one["figures"]:
            value, mark = figure["value"].replace("|", "\\|"), {None: "", True: "ok", False: "FAILED"}
            lines.append(f"| {figure['name']} | {value} | {mark[figure['passed']]} |")
        if one["problem"]:
            lines += ["", f"**{one['end']}**: {one['problem']}. The end of its log:", "```", one["tail"], "```"]
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
        return ITEMS[args.item][0](Path(args.figures).resolve().parent, args.tiny)
    if not args.tiny and not on_gpu():
        sys.exit("PyTorch finds no CUDA device here, and the report is about one: nothing was run")
    end, done = time.monotonic() + 60 * args.minutes, []
    names = [name for name in ITEMS if name in args.only]
    for number, name in enumerate(names):
        left = end - time.monotonic()
        if left < 5:
            break
        limit = ITEMS[name][1] * max(args.minutes / MINUTES, 1)
        done.append(measure(name, limit, left, args))
        print(f"{name}: {done[-1]['end']}, {done[-1]['seconds']:.0f} s", flush=True)
        Path(args.output).write_text(markdown(done, names[number + 1 :], args.tiny))
    print(f"\n{Path(args.output).read_text()}\nwritten to {args.output}")
    sys.exit(1 if any(one["end"] == "FAILED" for one in done) else 0)


if __name__ == "__main__":
    main(parse_args())
