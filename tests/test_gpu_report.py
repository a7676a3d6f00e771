"""gpu/report.py, as far as it needs no GPU. Its items on a pretended one: test_fake_cuda.py."""

import importlib
import re
import subprocess
import sys
import time

import pytest
from gpu import report
from helpers import ENVIRONMENT, ROOT, quick_first


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
                2,
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
    assert "still running after its 2 seconds" in text
    assert r"| found | this \| much | ok |" in lines and "the reason" in lines
    assert "| gap | 0.1 | FAILED |" in lines and "| gap | 0 | ok |" in lines
    assert text in capsys.readouterr().out, "it is printed too"
    time.sleep(max(0, started + 9 - time.monotonic()))
    assert not alive.exists(), "what an item started ended with it"


def test_what_there_is_no_time_for_is_named(make):
    items = {"first": (1, "time.sleep(60)"), "second": (1, "tell('b', 2)")}
    status, text = make(items, "--minutes", "0.1")
    assert status == 1
    assert re.search(r"\| first \| \d+ \| FAILED \|\n\| second \| \| not run \|", text)
    assert make(items, "--only", "second")[0] == 0, "one that was not asked for is not missed"


def test_more_minutes_are_more_for_each_item_too(make):
    assert make({"slow": (2, "time.sleep(4)")})[0] == 1
    assert make({"slow": (2, "time.sleep(4)")}, "--minutes", "30")[0] == 0


def test_the_computed_peaks_are_those_of_the_memory_page():
    sections = re.split(r"\n\*\*(.+?)\*\*, ", (ROOT / "docs" / "memory.md").read_text())
    peaks = {}
    for heading, table in zip(sections[1::2], sections[2::2]):
        peaks[heading] = {line.split(" | ")[5] for line in table.splitlines() if line.startswith("| ")}
    headings = {
        "sd": "Stable Diffusion 1.5, 512²",
        "sdxl": "Stable Diffusion XL, 1024²",
        "video": "AnimateDiff, 16 frames of 256²",
        "flux2": "FLUX.2 [klein] base 4B, 512²",
        "wan": "Wan 2.1 1.3B, 33 frames of 480 × 832",
    }
    for kind, script in report.SCRIPTS.items():
        assert {str(computed) for _, _, computed in script["runs"]} <= peaks[headings[kind]]


def test_items_run_to_their_end_in_processes_of_their_own(tmp_path):
    """Two of them, with the whole way through; nccl, which stands for data parallel, is gloo on a CPU."""
    command = [sys.executable, ROOT / "tests" / "gpu" / "report.py", "--tiny", "--only", "nccl", "versions"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    text = (tmp_path / "gpu-report.md").read_text()
    assert told.returncode == 0, text
    assert re.search(r"\| versions \| \d+ \| ok \|\n\| nccl \| \d+ \| ok \|", text), "in the order of the list"
    assert re.search(r"\| torch \| \d+\.\d+", text) and "| checkpoint | True | ok |" in text


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


@pytest.mark.parametrize("kind", quick_first("sd", report.SCRIPTS))
def test_runs_at_the_real_size_are_of_models_that_are_built_here(kind, monkeypatch, tmp_path):
    """All the way through, with few and narrow layers: a card's owner should not be the first to try."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "benchmark"), *sys.path])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # the item takes it away
    estimate_memory = importlib.import_module("estimate_memory")
    for name, narrow in NARROW.items():
        monkeypatch.setitem(estimate_memory.UNETS, name, {**estimate_memory.UNETS[name], **narrow})
    narrow = dict(VAE=dict(UNET, block_out_channels=(8,) * 4), CLIP_L=CLIP, KLEIN_4B=KLEIN, QWEN3_4B=QWEN)
    narrow |= dict(WAN_1_3B=WAN, WAN_VAE=dict(base_dim=4), UMT5_XXL=UMT5)
    for name, values in {**narrow, "CLIP_G": dict(CLIP, projection_dim=32)}.items():
        monkeypatch.setattr(estimate_memory, name, {**getattr(estimate_memory, name), **values})
    _, flags, computed = report.SCRIPTS[kind]["runs"][-1]
    side = "--height 32 --width 32 --num_frames 5" if kind == "wan" else "--resolution 64"
    run = (1, f"{flags} {side}", computed)
    monkeypatch.setitem(report.SCRIPTS, kind, {**report.SCRIPTS[kind], "precisions": ("bf16",), "runs": [run]})
    told = {}
    monkeypatch.setattr(report, "tell", lambda name, value, passed=None: told.update({name: (value, passed)}))
    report.real(tmp_path, small=False, kind=kind)
    assert told["first update"][1] and told["updates skipped, scale before each"][1]
    assert float(told["seconds of an update (the first one)"][0].split()[0]) > 0
