"""gpu/report.py, as far as it needs no GPU. Its items on a pretended one: test_fake_cuda.py."""

import importlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import report
from helpers import ENVIRONMENT, ROOT, long, quick_first


@pytest.fixture
def told(monkeypatch):
    """What items tell in this process: {name: (value, passed)}."""
    figures = {}
    monkeypatch.setattr(report, "tell", lambda name, value, passed=None: figures.update({name: (value, passed)}))
    return figures


@pytest.fixture
def sizes(monkeypatch):
    """estimate_memory.py, whose models of the real size have few and narrow layers."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "benchmark"), *sys.path])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # the items take it away
    module = importlib.import_module("estimate_memory")
    for name, narrow in NARROW.items():
        monkeypatch.setitem(module.UNETS, name, {**module.UNETS[name], **narrow})
    narrow = dict(VAE=dict(UNET, block_out_channels=(8,) * 4), CLIP_L=CLIP, KLEIN_4B=KLEIN, QWEN3_4B=QWEN)
    narrow |= dict(WAN_1_3B=WAN, WAN_VAE=dict(base_dim=4), UMT5_XXL=UMT5)
    for name, values in {**narrow, "CLIP_G": dict(CLIP, projection_dim=32)}.items():
        monkeypatch.setattr(module, name, {**getattr(module, name), **values})
    return module


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make({name: (seconds, lines of Python)}, *argv) reports on such items: the exit status and the report."""

    def make(items, *argv):
        monkeypatch.setattr(report, "ITEMS", {name: (report.versions, limit) for name, (limit, _) in items.items()})
        begin = f"import os, subprocess, sys, time\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        begin += "from gpu.report import tell"

        def command(name, figures, args):
            return [sys.executable, "-c", f"{begin}\nos.environ['GPU_FIGURES'] = {str(figures)!r}\n{items[name][1]}"]

        monkeypatch.setattr(report, "command", command)
        with pytest.raises(SystemExit) as ended:
            report.main(report.parse_args(["--tiny", "--output", str(tmp_path / "report.md"), *argv]))
        return ended.value.code, (tmp_path / "report.md").read_text()

    return make


def test_the_list_has_the_most_important_first_and_every_script(capsys):
    report.main(report.parse_args(["--list"]))
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(report.ITEMS) and names[:2] == ["versions", "gap"]
    scripts = {path.stem.removeprefix("train_sspo_") for path in ROOT.glob("train_sspo_*.py")}
    assert set(report.SCRIPTS) == scripts <= set(names)


def test_without_a_device_there_is_one_line_and_no_report(tmp_path):
    command = [sys.executable, ROOT / "tests" / "gpu" / "report.py", "--only", "versions"]
    told = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert told.returncode == 1 and told.stdout == ""
    assert re.fullmatch(r"PyTorch finds no CUDA device here.*\n", told.stderr)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_or_hangs_does_not_end_the_rest(make, tmp_path, capsys):
    started, alive = time.monotonic(), tmp_path / "alive"
    child = f"import time; time.sleep(6); open({str(alive)!r}, 'w')"
    status, text = make(
        {
            "hangs": (
                4,
                f"tell('before', '1 s'); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)",
            ),
            "crashes": (20, "tell('found', 'this | much', True); print('the reason'); os.abort()"),
            "disagrees": (20, "tell('gap', 0.1, False)"),
            "works": (20, "tell('figure', 3); tell('gap', 0, True)"),
        }
    )
    assert status == 1
    assert time.monotonic() - started < 60
    lines = text.splitlines()
    table = text.split("\n## ")[0]
    ends = dict(hangs="FAILED", crashes="FAILED", disagrees="FAILED", works="ok")
    assert re.findall(r"\| (\w+) \| \d+ \| (\w+) \|", table) == list(ends.items())
    assert "| before | 1 s |  |" in lines, "what was found before the limit is kept"
    assert "still running after its 4 seconds" in text
    assert r"| found | this \| much | ok |" in lines and "the reason" in lines
    assert "| gap | 0.1 | FAILED |" in lines and "| gap | 0 | ok |" in lines
    assert text in capsys.readouterr().out, "it is printed too"
    time.sleep(max(0, started + 11 - time.monotonic()))
    assert not alive.exists(), "what an item started ended with it"


def test_what_there_is_no_time_for_is_named_and_no_failure(make):
    items = {"first": (30, "tell('a', 1); time.sleep(60)"), "second": (1, "tell('b', 2)")}
    status, text = make(items, "--minutes", "0.1")
    assert status == 0
    assert "Not run to the end: first, second. " in text
    assert re.search(r"\| first \| \d+ \| not to its end \|\n\| second \| \| not run \|", text)
    assert "| a | 1 |  |" in text.splitlines() and "FAILED" not in text
    status, text = make(items, "--only", "second")
    assert status == 0 and "Not run" not in text, "one that was not asked for is not missed"
    items["first"] = (30, "tell('a', 1, False); time.sleep(60)")
    assert report.measure("first", 30, 4, None)["end"] == "FAILED", "what was wrong before the end is"


def test_there_is_time_for_all():
    assert sum(limit for _, limit in report.ITEMS.values()) <= 60 * report.MINUTES
    assert report.MINUTES == 30, "where it is told in words: the report's docstring, Makefile, README, docs/status.md"


def test_every_item_is_on_the_status_page():
    table = (ROOT / "docs" / "status.md").read_text().split("| item | the question that it answers |")[1]
    table = table.split("\n\n")[0]
    names = [name for line in table.splitlines()[2:] for name in line.split("|")[1].strip().split(", ")]
    assert names == list(report.ITEMS)


def test_what_an_item_leaves_goes_with_the_parents_folder(monkeypatch, tmp_path):
    """One that is killed cannot clean up: gigabytes of models and cached latents would stay in /tmp."""
    seen = []
    monkeypatch.setitem(report.ITEMS, "versions", (lambda folder, small: seen.append(folder), 20))
    report.main(report.parse_args(["--tiny", "--item", "versions", "--figures", str(tmp_path / "figures")]))
    assert seen == [tmp_path]


def test_ctrl_c_ends_the_item_and_all_that_it_started(tmp_path):
    """Also what has a session of its own, as the processes of a launcher, and what lies in the temporary folder."""
    child = "import time; time.sleep(600)"
    item = f"""if True:
        import os, signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
        open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)"""
    parent = f"""if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from gpu import report
        report.command = lambda name, figures, args: [sys.executable, "-c", {item!r}]
        report.main(report.parse_args(["--tiny", "--only", "versions"]))"""
    (tmp_path / "temporary").mkdir()
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path / "temporary")}
    ended = subprocess.run(
        [sys.executable, "-c", parent], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "KeyboardInterrupt" in ended.stderr
    for pid in (tmp_path / "pids").read_text().split():
        assert not alive(int(pid))
    assert list((tmp_path / "temporary").iterdir()) == []


def alive(pid):
    """Whether a process runs; what was killed may wait for whoever adopted it to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_more_minutes_are_more_for_each_item_too(make):
    slow = {"slow": (4, "time.sleep(8)")}  # 4 s or 12 s: also a busy machine is well on this side or the other
    assert make(slow)[0] == 1
    assert make(slow, "--minutes", "90")[0] == 0


def test_the_computed_peaks_are_those_of_the_memory_page():
    """Each in the row of its own flags, where the page has one."""
    sections = re.split(r"\n\*\*(.+?)\*\*, ", (ROOT / "docs" / "memory.md").read_text())
    peaks = {}
    for heading, table in zip(sections[1::2], sections[2::2]):
        rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
        peaks[heading.split(",")[0], heading.split(",")[1].strip()] = {row[0].strip("`"): row[5] for row in rows}
    sd, checkpointed = peaks["Stable Diffusion 1.5", "512²"], "--gradient_checkpointing"
    assert str(report.SCRIPTS["sd"]["runs"][0][2]) == sd["nothing else"]
    assert {flag: str(peak) for flag, (peak, _) in report.FULL_PEAKS.items()} == {
        "": sd[f"--train_mode full {checkpointed}"],
        "--use_8bit_adam": sd[f"--train_mode full {checkpointed} --use_8bit_adam"],
    }
    assert str(report.SCRIPTS["sdxl"]["runs"][0][2]) == peaks["Stable Diffusion XL", "1024²"][checkpointed]
    clips = peaks["AnimateDiff", "16 frames of 256²"]
    assert [str(computed) for _, _, computed, _ in report.SCRIPTS["video"]["runs"]] == [
        clips[checkpointed],
        clips[f"{checkpointed} --split_pairs"],
    ]
    assert str(report.SCRIPTS["flux2"]["runs"][0][2]) == peaks["FLUX.2 [klein] base 4B", "512²"][checkpointed]
    held = {(kind, card, "81" in flags): str(computed) for kind, flags, computed, card in report.CARDS}
    clips = peaks["AnimateDiff", "16 frames of 512²"]
    assert held["video", 16, False] == clips[checkpointed]
    assert held["video", 12, False] == clips[f"{checkpointed} --split_pairs"]
    assert held["flux2", 16, False] == peaks["FLUX.2 [klein] base 4B", "1024²"][checkpointed]
    assert held["wan", 16, False] == peaks["Wan 2.1 1.3B", "33 frames of 480 × 832"][checkpointed]
    assert held["wan", 24, True] == peaks["Wan 2.1 1.3B", "81 frames of 480 × 832"][checkpointed]


@long
def test_the_computed_peak_of_fewer_frames_than_the_memory_page_has(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "benchmark"), *sys.path])
    estimate_memory = importlib.import_module("estimate_memory")
    ((_, flags, computed, _),) = report.SCRIPTS["wan"]["runs"]
    words = "--mixed_precision bf16 --cache_latents --train_batch_size 1 --validation_prompts fox"
    found = estimate_memory.estimate("wan", [*words.split(), *flags.split()])
    assert round(found["peak"] / estimate_memory.GIB, 1) == computed


def test_items_run_to_their_end_in_processes_of_their_own(tmp_path):
    """Two of them, with the whole way through; nccl, two processes of data parallel, is gloo's on a CPU."""
    command = [sys.executable, ROOT / "tests" / "gpu" / "report.py", "--tiny", "--only", "nccl", "versions"]
    command += ["--minutes", "60"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    text = (tmp_path / "gpu-report.md").read_text()
    assert told.returncode == 0, text
    assert re.search(r"\| versions \| \d+ \| ok \|\n\| nccl \| \d+ \| ok \|", text), "in the order of the list"
    assert re.search(r"\| torch \| \d+\.\d+", text) and "| status at the end | 0 | ok |" in text
    both = re.findall(r"\| update (\d), both processes \| .*gaps (\S+) and (\S+), .* \| ok \|", text)
    assert both == [("1", "0", "0"), ("2", "0", "0"), ("3", "0", "0")]


def test_one_card_makes_the_calls_of_data_parallel_by_itself(told, monkeypatch, tmp_path):
    """Accelerate makes no process group for one process; that two were not tried is told."""
    with monkeypatch.context() as one_card:
        one_card.setattr(report, "on_gpu", lambda: True)
        one_card.setattr(torch.cuda, "device_count", lambda: 1)
        one_card.setattr(report, "group_of_one", lambda folder: report.tell("the calls", folder))
        report.nccl(tmp_path, small=True)
    assert told["two cards"][0].startswith("are not here") and told["the calls"][0] == tmp_path
    told.clear()
    report.group_of_one(tmp_path)
    assert list(told) == ["all_reduce", "barrier, then a gather of objects", "end of the group"]
    assert all(passed for _, passed in told.values())


def test_a_launch_that_fails_does_not_hide_the_other_rows(told, monkeypatch):
    """After "invalid configuration argument" the device computes on; after an illegal access it does not."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def fails(query, key, value):
        if len(query) >= 16:
            raise RuntimeError("CUDA error: invalid configuration argument")
        return attention(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)
    report.rows(None, small=True)
    assert len(told) == 5 * 4 * 2
    assert told["FLASH_ATTENTION, 65536 rows, forward"] == ("CUDA error: invalid configuration argument", None)
    assert told["default, 65535 rows, forward"][1] is False, "which train_sspo_video.py allows"
    assert told["default, 65535 rows, backward"][1] is None, "which it refuses"
    assert told["default, 32768 rows, backward"][1] is True
    told.clear()
    monkeypatch.setattr(report, "computes", lambda: False)
    report.rows(None, small=True)
    assert len(told) == 2 and told["the rest"][0].startswith("not run")


def test_wrong_gradients_and_full_memories_are_told(told, monkeypatch):
    """A kernel that counts in too few bits may be silent."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def wrong(query, key, value):
        if len(query) == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")
        if len(query) > 8 and query.requires_grad:
            query = torch.cat([query[:-1], query[-1:].detach()])
        return attention(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    report.rows(None, small=True)
    value, passed = told["MATH, 32769 rows, backward"]
    assert re.match(r"WRONG: it differs from two halves by [1-9]", value) and passed is None
    assert told["MATH, 32769 rows, forward"][1] is told["MATH, 32768 rows, backward"][1] is True
    assert told["default, 65536 rows, forward"][0].startswith("skipped, it does not fit the memory: CUDA out of mem")


def test_attention_that_rounds_otherwise_with_gradients_is_told(told, monkeypatch):
    """In every shape that the models have: a prompt's keys, heads of 160, and transposed tensors as theirs."""
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def rounds(query, key, value):
        seen.append((*query.shape[1:], key.shape[2], query.is_contiguous()))
        if query.shape[-1] == 160 and query.requires_grad and torch.is_grad_enabled():
            return attention(query, key, value) * 1.01
        return attention(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounds)
    report.attention(None, small=True)
    assert not any(contiguous for *_, contiguous in seen)
    assert told["SD 1.5, 2, 8, 256 x 77, 160, float16"][1] is False
    assert told["SD 1.5, 2, 8, 256 x 77, 160, float16, cuDNN not allowed"][1] is False
    assert told["Wan 2.1, 2, 12, 14040 x 512, 128, bfloat16"][1] is True
    assert {name for name, (_, passed) in told.items() if not passed} == {name for name in told if ", 160, " in name}


@pytest.mark.parametrize(
    "own, off, right",
    [((1e-4, 0), 2e-4, True), ((1e-5, 1e-6), 1e-3, False), ((0, 0), 0, True), ((0, 0), 1e-6, False)],
)
def test_a_resumed_run_is_held_to_what_chance_does(told, monkeypatch, tmp_path, own, off, right):
    """Runs of one kind differ on a GPU; one that was resumed may differ as they do, and no more."""
    ends = iter([0, None, off, *own])  # whole, stopped, resumed, again, once more
    state = {"state": {0: {"__bnb_optimizer_quant_state__": {"state1": torch.zeros(2, dtype=torch.uint8)}}}}
    (tmp_path / "checkpoint-2").mkdir()
    torch.save(state, tmp_path / "checkpoint-2" / "optimizer.bin")

    def run(*_, **__):
        if (end := next(ends)) is None:
            sys.exit(128 + signal.SIGTERM)
        metrics = {"loss": 0, "gap/winner": 0, "gap/rival": 0, "dpo_fraction": 1, "grad_norm": 1}
        weights = {"lora_B": torch.tensor([1e-2, 5e-3 + end], dtype=torch.float64)}
        return SimpleNamespace(metrics=[metrics], weights=weights, scales=[1], path=tmp_path)

    monkeypatch.setattr(report, "Run", run)
    report.runs(None, small=True)
    assert told["sd: resumed against not stopped"][1] is right
    assert told["sd: the optimizer's states"] == ("uint8", True)


def test_a_failure_does_not_end_an_item_that_has_more_to_ask(told, monkeypatch, tmp_path):
    """On a card of 16 GB AdamW does not fit, and 8-bit Adam does; a package that does not load is a failure."""

    def run(kind, folder, words, **_):
        if "--use_8bit_adam" not in words:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        raise OSError("bitsandbytes does not load")

    monkeypatch.setattr(report, "Run", run)
    report.full(tmp_path, small=True)
    ends = [passed for _, passed in told.values()]
    assert ends == [None, None, False] and "does not load" in [*told.values()][2][0]


def test_an_illegal_access_is_told_and_no_more_is_asked(told, monkeypatch):
    """The device computes nothing any more then: emptying the cache raises too."""

    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(report, "on_gpu", lambda: True)
    monkeypatch.setattr(report, "off_halves", fails)
    monkeypatch.setattr(report, "computes", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    report.rows(None, small=True)
    assert len(told) == 2 and told["the rest"][0].startswith("not run")


def test_a_card_without_bf16_is_asked_for_fp16_alone(told, monkeypatch, tmp_path):
    """The scripts refuse bf16 there, and one refusal must not end an item that has more to ask."""
    monkeypatch.setattr(report, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert report.precisions("sd", small=False) == ["fp16"]
    assert report.measurable(small=False) == ["sd", "sdxl", "video"]
    report.real(tmp_path, small=False, kind="wan")
    assert list(told) == ["not run"] and "Ampere" in told["not run"][0]


@pytest.fixture
def a_large_gpu(monkeypatch, sizes):
    """A pretended GPU of 80 GB, of which nothing is held back: the shares of it that runs are given."""
    shares = []

    def hold(share):
        assert isinstance(share, float), "PyTorch refuses 1"
        shares.append(share)

    monkeypatch.setattr(report, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", hold)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 4 * 10**9)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return shares


def test_a_run_gets_no_more_than_its_card_has(a_large_gpu, tmp_path):
    """Of 8 GB, but for what CUDA takes of them; and the one after it has the GPU for itself again."""
    words = "--max_train_steps 1 --train_batch_size 1 --rollout_steps 2"
    run = report.Run("sd", tmp_path, words, card=8)
    assert run.beside == 6 * 10**9, "of 10 GB that are taken PyTorch has 4"
    report.Run("sd", tmp_path, words, name="all")
    assert a_large_gpu == [pytest.approx((8e9 - 2**30) / 80e9), 1.0]


def test_what_should_fit_a_card_and_does_not_has_failed(a_large_gpu, told, monkeypatch, tmp_path):
    """A GPU that was held to nothing and is full is only too small, and is not asked for what is larger than it."""

    def run(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(report, "Run", run)
    report.cards(tmp_path, small=False)
    assert len(told) == len(report.CARDS)
    for value, passed in told.values():
        assert passed is False and re.match(r"on a card of \d+ GB: CUDA out of memory", value)
    told.clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (11 * 10**9, 12 * 10**9))
    report.cards(tmp_path, small=False)
    asked = dict(told.values())
    assert asked.pop("on a card of 8 GB: CUDA out of memory. Tried to allocate 1 GiB") is False
    assert set(asked.values()) == {None} and all(value.startswith("not run") for value in asked)
    told.clear()
    report.real(tmp_path, small=False, kind="sdxl")
    assert [passed for _, passed in told.values()] == [None]


def test_a_real_size_model_leaves_the_gpu_part_by_part(sizes, monkeypatch):
    """All parts at once would be 13.5 GiB of FLUX.2, of which a run needs 8.6."""
    events, build, to = [], sizes.build, torch.nn.Module.to

    def watched(module, device, *inputs, **named):
        events.append(f"{type(module).__name__} to {device}")
        return to(module, device, *inputs, **named)

    monkeypatch.setattr(
        sizes, "build", lambda kind, *args, **named: events.append(kind.__name__) or build(kind, *args, **named)
    )
    monkeypatch.setattr(torch.nn.Module, "to", watched)
    script = importlib.import_module("train_sspo_sd")
    args = script.parse_args(["--pretrained_model_name_or_path", "-", "--train_data_dir", "-", "--output_dir", "-"])
    report.build_real("sd", script, args, torch.float32)
    parts = ["CLIPTextModel", "AutoencoderKL", "UNet2DConditionModel"]
    assert events == [event for part in parts for event in (part, f"{part} to cpu")]


def test_decoding_a_picture_of_the_real_size_is_computed_and_measured(sizes, told):
    report.vae(None, small=False)
    assert re.fullmatch(r"\d\.\d\d GiB", told["computed"][0]) and told["computed"][0] != "0.00 GiB"
    assert list(told) == ["computed", "by cuDNN", "by PyTorch's own convolutions"]


# The configurations of estimate_memory.py with few and narrow layers.
UNET = dict(norm_num_groups=4, layers_per_block=1)
NARROW = {
    "sd": dict(UNET, block_out_channels=(8, 16, 16, 16), cross_attention_dim=32, attention_head_dim=2),
    "video": dict(UNET, block_out_channels=(8, 16, 16, 16), cross_attention_dim=32, num_attention_heads=2),
    "sdxl": dict(
        UNET,
        block_out_channels=(8, 16, 16),
        attention_head_dim=2,
        transformer_layers_per_block=1,
        cross_attention_dim=64,
        projection_class_embeddings_input_dim=6 * 256 + 32,
    ),
}
CLIP = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
KLEIN = dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=3 * 16)
QWEN = dict(
    vocab_size=9, hidden_size=16, intermediate_size=16, num_attention_heads=1, num_key_value_heads=1, head_dim=16
)

WAN = dict(num_layers=1, num_attention_heads=2, text_dim=16, ffn_dim=32)
UMT5 = dict(d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1)


@pytest.mark.parametrize("kind", ["wan", *quick_first("sd", [kind for kind in report.SCRIPTS if kind != "wan"])])
def test_runs_at_the_real_size_are_of_models_that_are_built_here(kind, sizes, told, monkeypatch, tmp_path):
    """All the way through, with few and narrow layers: a card's owner should not be the first to try."""
    _, flags, *computed = report.SCRIPTS[kind]["runs"][-1]
    side = "--height 32 --width 32" if kind == "wan" else "--resolution 64"  # all else is as on a card
    run = (1, f"{flags} {side}", *computed)
    monkeypatch.setitem(report.SCRIPTS, kind, {**report.SCRIPTS[kind], "precisions": ("bf16",), "runs": [run]})
    report.real(tmp_path, small=False, kind=kind)
    assert told["first update"][1] and told["updates skipped, scale before each"][1]
    assert float(told["seconds of an update (the first one)"][0].split()[0]) > 0
