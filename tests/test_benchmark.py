"""The benchmark sees what the script does, update by update; its lines come out as a table."""

import sys

import pytest
from diffusers import MotionAdapter
from helpers import ROOT, forget_accelerator, quick_first


sys.path.insert(0, str(ROOT / "examples" / "benchmark"))

import benchmark


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return benchmark.Bench(tmp_path_factory.mktemp("benchmark"), quick=True)


def test_a_run_is_seen_update_by_update(bench, monkeypatch):
    """By a clock that only the second update's sampling moves on."""
    time, sampled, sample_rivals = [0.0], [], benchmark.script.sample_rivals

    def slow_once(*given):
        sampled.append(True)
        time[0] += 5.0 if len(sampled) == 2 else 0.0
        return sample_rivals(*given)

    monkeypatch.setattr(benchmark, "now", lambda: time[0])
    monkeypatch.setattr(benchmark.script, "sample_rivals", slow_once)
    run = benchmark.Run(bench, "seen", 3, note=lambda: len(sampled))
    assert run.notes == [0, 1, 2, 3]
    assert run.seconds == [0.0, 5.0, 0.0]
    assert not list(bench.directory.glob("seen-*")), "nothing is left"


def test_lines_come_out_as_a_table(capsys):
    """From a model too small for their numbers to mean anything."""
    benchmark.main(["--quick", "--lines", "turnover", "calls"])
    lines = capsys.readouterr().out.splitlines()
    turnover = [line for line in lines if line.startswith("turnover")]
    assert [line.split()[1] for line in turnover] == ["lora,", "full,"]
    assert all(0 < float(line.split()[7]) < 100 for line in turnover)
    calls = [line for line in lines if line.startswith("calls")]
    assert len(calls) == 5 and all(line.endswith("as expected") for line in calls)


def test_the_formula_of_an_updates_calls():
    """P = 3 x 2 pairs in rollouts of 4 and 2 with 5 steps; then per micro-batch 2 calls on 2 x 2 x 3 latents."""
    words = (
        "--pretrained_model_name_or_path a --train_data_dir b --train_batch_size 2 --gradient_accumulation_steps 3 "
    )
    words += "--rollout_batch_size 4 --rollout_steps 5 --draws_per_pair 3"
    args = benchmark.script.parse_args(words.split())
    assert benchmark.expected_calls(args) == 5 * [4] + 4 * [12] + 5 * [2] + 2 * [12]
    args.rollout_guidance_scale = 7.5
    assert benchmark.expected_calls(args) == 5 * [8] + 4 * [12] + 5 * [4] + 2 * [12], "guidance doubles the latents"
    args.split_pairs, args.gradient_accumulation_steps = True, 1
    assert benchmark.expected_calls(args) == 5 * [4] + 5 * [6]


@pytest.mark.parametrize("kind", quick_first("sdxl", ["video"]))
def test_real_size_runs_train_and_tell_their_peak(kind, monkeypatch, capsys):
    """On a UNet of their layout with narrow layers."""
    import real_size_sdxl
    import real_size_video

    width, heads = (32, 64, 64), (1, 2, 2)
    narrow = {"block_out_channels": width, "attention_head_dim": heads, "transformer_layers_per_block": 1}
    if kind == "video":
        narrow = {"block_out_channels": (32, *width), "num_attention_heads": 2}
        adapter = MotionAdapter(block_out_channels=(32, *width))
        monkeypatch.setattr(real_size_video, "MotionAdapter", lambda: adapter)
    monkeypatch.setitem(real_size_sdxl.UNETS, kind, {**real_size_sdxl.UNETS[kind], **narrow, "norm_num_groups": 8})
    forget_accelerator()
    monkeypatch.setattr(sys, "argv", ["real_size", "--rank", "4"])
    {"sdxl": real_size_sdxl, "video": real_size_video}[kind].main()
    told = capsys.readouterr().out
    assert "billion weights" in told and "peak after saving" in told
    assert "step 1, loss 0.6931" in told and "step 2, loss" in told


def test_checkpointing_saves_what_it_is_for(monkeypatch, capsys):
    import real_size_video

    narrow = {"block_out_channels": (32, 32, 64, 64), "num_attention_heads": 2, "norm_num_groups": 8}
    monkeypatch.setitem(real_size_video.UNETS, "video", {**real_size_video.UNETS["video"], **narrow})
    monkeypatch.setattr(sys, "argv", ["real_size", "--saved_activations"])
    real_size_video.main()
    kept = [int(line.split()[-3]) for line in capsys.readouterr().out.splitlines() if "MiB saved" in line]
    assert len(kept) == 3 and kept[0] > kept[1] > 2 * kept[2]
