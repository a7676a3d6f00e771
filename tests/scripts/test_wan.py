"""Runs of train_sspo_wan.py: first update, results in the stock pipeline, resume, layouts, clips and refusals."""

import contextlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import tiny
import torch
from diffusers import WanPipeline
from faults import run_of_two
from helpers import LAYOUT, assert_same_but_for_rounding, assert_same_result, flags, keep_models, resumed
from PIL import Image
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

import train_sspo_wan as script


ALL_AT_ONCE = dict(
    cache_latents=True,
    gradient_checkpointing=True,
    split_pairs=True,
    draws_per_pair=2,
    rollout_strength=0.5,
    rollout_steps=4,
    rollout_guidance_scale=4,
    negative_prompt="blurred, still",
    proportion_empty_prompts=0.3,
)
LARGE = dict(height=64, width=32)


@pytest.fixture
def train(trains):
    return trains["wan"]


def stock(model, lora=None):
    pipeline = WanPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def drawn(pipeline):
    """The latents of a clip that the stock pipeline draws."""
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    size = dict(height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=4.0)
    return pipeline(prompt="a red circle", latents=noise, output_type="latent", **size).frames


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(train_mode="full"),
        dict(mixed_precision="bf16"),
        dict(mixed_precision="bf16", train_mode="full"),
        dict(timestep_shift=3, beta_dpo=125, lora_alpha=3, rollout_scheduler="euler"),
        ALL_AT_ONCE,
        dict(ALL_AT_ONCE, train_mode="full"),
        dict(ALL_AT_ONCE, mixed_precision="bf16", large=True),
    ],
)
def test_first_update_is_ln_2_with_gaps_of_exactly_0(train, request, options):
    """So is the first of the second iteration, whose reference is the policy of a moment ago, and none in between."""
    if options.get("large"):
        options = dict({k: v for k, v in options.items() if k != "large"}, **LARGE)
        options["model"] = request.getfixturevalue("wan_large")
    run = train(**options, reference="latest", max_train_steps=3, learning_rate=1e-4)
    for line in (run.metrics[0], run.metrics[2]):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert line["gap/winner"] == line["gap/rival"] == 0
        assert line["dpo_fraction"] == 1
        assert line["grad_norm"] > 0
    assert run.metrics[1]["gap/winner"] != 0 and run.metrics[1]["gap/rival"] != 0


def test_lora_in_the_stock_pipeline_is_the_policy(train, wan, monkeypatch):
    """With an alpha that is not the rank. Every layer is looked for, and was trained."""
    policies = keep_models(monkeypatch, script)
    run = train(rank=4, lora_alpha=12)
    layers = load_file(run.path / "pytorch_lora_weights.safetensors")
    places = [f"blocks.{i}.attn{j}.{n}" for i in (0, 1) for j in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")]
    assert {name.split(".lora_")[0].removeprefix("transformer.") for name in layers} == set(places)
    assert all(weight.any() for weight in layers.values())
    before = drawn(stock(wan))
    pipeline = stock(wan, run.path)
    after = drawn(pipeline)
    loaded = {name.replace(".default_0", ""): weight for name, weight in pipeline.transformer.named_parameters()}
    for name, weight in layers.items():
        assert torch.equal(loaded[name.removeprefix("transformer.")], weight), name
    assert (after - before).abs().max() > 1e-3
    pipeline.unload_lora_weights()
    pipeline.register_modules(transformer=policies[0].denoiser)
    assert torch.equal(drawn(pipeline), after), "the policy itself draws the same"


def test_the_file_for_comfyui_makes_the_same_model(train, wan):
    """diffusers reads musubi-tuner's file too, if all layers of the blocks are in it, by names of its own."""
    layers = "to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2"
    run = train(output_kohya_format=True, rank=4, lora_alpha=3, lora_layers=layers, learning_rate=1e-2)
    ours, other = stock(wan, run.path), stock(wan)
    other.load_lora_weights(run.path, weight_name="pytorch_lora_weights_kohya.safetensors")
    after = drawn(ours)
    assert (after - drawn(stock(wan))).abs().max() > 1e-3, "the run has moved the model"
    torch.testing.assert_close(drawn(other), after, rtol=0, atol=1e-4)


def test_layers_outside_of_the_blocks_have_wans_own_names(train):
    """As Wan's repository has them in its model.py. diffusers reads none of these."""
    own = {"text_embedder.linear_1": "text_embedding_0", "text_embedder.linear_2": "text_embedding_2"}
    own |= {"time_embedder.linear_1": "time_embedding_0", "time_embedder.linear_2": "time_embedding_2"}
    own |= {"time_proj": "time_projection_1", "proj_out": "head_head"}
    run = train(output_kohya_format=True, rank=2, lora_layers=",".join(own), max_train_steps=1)
    weights = load_file(run.path / "pytorch_lora_weights_kohya.safetensors")
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(weights) == {f"lora_unet_{name}.{part}" for name in own.values() for part in parts}


def test_full_result_is_a_whole_pipeline(train, wan):
    run = train(train_mode="full", learning_rate=1e-4)
    pipeline, base = stock(run.path), stock(wan)
    assert (drawn(pipeline) - drawn(base)).abs().max() > 1e-3
    for name in ("text_encoder", "vae"):
        ours, theirs = (getattr(of, name).state_dict() for of in (pipeline, base))
        assert all(torch.equal(ours[key], weight) for key, weight in theirs.items())
    pushed = load_file(run.path / "replay" / "iteration-2.safetensors")
    assert all(torch.equal(weight, pushed[name]) for name, weight in pipeline.transformer.named_parameters())
    assert f'from_pretrained("{run.path.name}"' in (run.path / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        dict(rank=4, lora_alpha=12, flow_shift=7),
        dict(train_mode="full", learning_rate=1e-4),
        dict(ALL_AT_ONCE, random_flip=True, center_crop=False),
        dict(streaming=True, rollout_guidance_scale=4, frame_stride=1),
    ],
    ids=["lora", "full", "cached", "streamed"],
)
def test_resumed_run_is_the_uninterrupted_one(train, options):
    options = dict(options, max_train_steps=6)
    whole = train("whole", **options, checkpointing_steps=3)
    assert_same_result(whole, resumed(train, whole, 3, **options))


@pytest.mark.parametrize("cached", [False, True])
def test_layout_of_the_batch_does_not_matter(train, cached):
    options = dict(LAYOUT, cache_latents=cached)
    one = train("one", train_batch_size=4, **options)
    options.update(rollout_batch_size=1)
    assert_same_but_for_rounding(one, train("four", train_batch_size=1, gradient_accumulation_steps=4, **options))


def test_two_processes_make_the_same_run(train):
    options = dict(LAYOUT, cache_latents=True, split_pairs=True)
    one = train("one", train_batch_size=4, **options)
    assert_same_but_for_rounding(one, run_of_two(train, "two", train_batch_size=2, **options))


# Prompts


def test_a_caption_takes_the_room_of_its_own_tokens(train, clips, tmp_path, caplog):
    """What is told before is that of the longest. The run is the one without a cache, but for how a batch rounds."""
    folder = Path(shutil.copytree(clips, tmp_path / "clips"))
    captions = ["a red circle " * 30, *tiny.CAPTIONS[1:6]]
    lines = [json.dumps({"file_name": f"{i}.mp4", "text": caption}) for i, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    caplog.set_level("INFO")
    options = dict(data=folder, max_train_steps=3)  # one epoch: in the next the frames begin elsewhere
    run = train("cached", cache_latents=True, **options)
    (prompts,) = (run.path / "cache").rglob("prompts-*.safetensors")
    lengths = sorted(len(value) for value in load_file(prompts).values())
    assert lengths == sorted(len(caption.strip()) + 2 for caption in captions), "a token a letter and two marks"
    assert f"{lengths[-1] * 16 * 4 / 2**20:.3g} MiB a caption" in caplog.text and lengths[-1] > 350
    plain = train("plain", **options)
    for name in ("mse/policy_winner", "mse/policy_rival"):
        assert run.column(name) == pytest.approx(plain.column(name), rel=1e-5)


def test_the_negative_prompt_is_not_what_a_dropped_caption_becomes(train, monkeypatch):
    """Guidance leads away from it; winner and rival of a pair without a caption are told nothing at all."""
    batches, prompts, collate, encode = [], {}, script.collate, script.encode_prompt

    def watched(models, captions):
        rows = encode(models, captions)
        prompts.update(zip(captions, rows))
        return rows

    monkeypatch.setattr(script, "encode_prompt", watched)
    monkeypatch.setattr(script, "collate", lambda *a: batches.append(collate(*a)) or batches[-1])
    train(negative_prompt="blurred, still", proportion_empty_prompts=0.5, max_train_steps=3)
    empty, negative = (script.collate_condition([prompts[text]], "cpu") for text in ("", "blurred, still"))
    told = [drop for batch in batches for drop in batch["dropped"]]
    assert True in told and False in told
    for batch in batches:
        assert all(torch.equal(row, negative["prompt_embeds"][0]) for row in batch["unconditional"]["prompt_embeds"])
        for drop, row in zip(batch["dropped"], batch["condition"]["prompt_embeds"]):
            assert torch.equal(row, empty["prompt_embeds"][0]) == drop
            assert not torch.equal(row, negative["prompt_embeds"][0])


def test_text_encoder_has_left_when_the_transformer_comes(train, monkeypatch):
    """
    What is moved where: the accelerator is told by a torch.device, the CPU by its name. It leaves before the VAE
    begins, too: clips of 33 frames at 480 x 832 take 5.5 GiB beside its 10.6.
    """
    moves, move, encode = [], torch.nn.Module.to, script.encode_image

    def watched(module, *args, **kwargs):
        if isinstance(module, (UMT5EncoderModel, script.WanTransformer3DModel)) and args:
            moves.append((type(module).__name__, "accelerator" if isinstance(args[0], torch.device) else args[0]))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    monkeypatch.setattr(script, "encode_image", lambda *a: moves.append("encoded") or encode(*a))
    train(cache_latents=True, max_train_steps=1, validation_prompts=["a red circle"])
    first = moves.index(("UMT5EncoderModel", "accelerator"))
    left = moves.index(("UMT5EncoderModel", "meta"))
    came = moves.index(("WanTransformer3DModel", "accelerator"))
    assert first < left < moves.index("encoded") < came
    assert ("UMT5EncoderModel", "accelerator") not in moves[left:], "and it does not come back"


# Samples


@pytest.mark.parametrize("kind, fps", [("wan", 16), ("wan_large", 24)])
def test_samples_have_the_models_rate_and_size(load, request, tmp_path, kind, fps):
    """The clip shows row above row; the PNG eight frames of each, a line a clip, the lines of a prompt together."""
    size = dict(num_frames=17, height=64, width=96)
    args, _ = load(script, model=request.getfixturevalue(kind), **size)
    args.output_dir = tmp_path

    def colour(row, prompt, i):
        return (200 * row, 100 * prompt, 12 * i)

    rows = [
        [[Image.new("RGB", (96, 64), colour(row, prompt, i)) for i in range(17)] for prompt in range(3)]
        for row in range(2)
    ]
    script.write_samples(rows, args, 2, [])
    with av.open(str(tmp_path / "samples" / "step-2.mp4")) as container:
        assert container.streams.video[0].average_rate == fps
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(2 * 64, 3 * 96, 3)] * 17
    still = tiny.rows_of(tmp_path / "samples" / "step-2.png", 6, 6)
    assert still[0][0].size == (96, 64)
    for row, prompt, i in itertools.product(range(2), range(3), range(0, 17, 3)):
        middle = frames[i][row * 64 + 32, prompt * 96 + 48]
        assert np.abs(middle - colour(row, prompt, i)).max() < 12, "but for H.264's colours"
        assert still[2 * prompt + row][i // 3].getpixel((5, 5)) == colour(row, prompt, i)


def test_large_clips_stand_still_in_small(load, tmp_path):
    args, _ = load(script, height=480, width=832)
    args.output_dir = tmp_path
    script.write_samples([[[Image.new("RGB", (832, 480))] * 5]], args, 1, [])
    assert Image.open(tmp_path / "samples" / "step-1.png").size == (5 * 320, 185)


def test_samples_are_the_bases_above_the_policys(train, monkeypatch):
    given, write = [], script.write_samples
    monkeypatch.setattr(script, "write_samples", lambda rows, *rest: given.append(rows) or write(rows, *rest))
    options = dict(validation_prompts=["a red circle", "a blue square"], validation_steps=2, learning_rate=1e-2)
    train(**options, report_to="tensorboard", rollout_steps=2)
    (above, below), (base, last) = given
    for prompt in range(2):
        assert len(above[prompt]) == 5 and above[prompt][0].size == (32, 32)
        assert all(tiny.difference(*pair) == 0 for pair in zip(above[prompt], base[prompt]))
        assert any(tiny.difference(*pair) > 0 for pair in zip(above[prompt], below[prompt]))
        assert any(tiny.difference(*pair) > 0 for pair in zip(below[prompt], last[prompt]))


def test_the_card_loads_the_result_and_writes_a_clip(train, wan, tmp_path, monkeypatch):
    """Its lines as they stand there, with a stand-in for the writer, which needs another package."""
    run = train(flow_shift=7, lora_alpha=3)
    (code,) = re.findall(r"^```python\n(.*?)^```", (run.path / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    written, names = [], {}
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda *a, **k: written.append((a, k)))
    monkeypatch.setattr(WanPipeline, "progress_bar", lambda self, total: contextlib.nullcontext(Bar()))
    offloaded = []
    monkeypatch.setattr(WanPipeline, "enable_model_cpu_offload", lambda self: offloaded.append(self))
    code = code.replace(f'"{run.path.name}"', f'"{run.path}"').replace("bfloat16", "float32")
    exec(code.replace("num_frames=5", "num_frames=5, num_inference_steps=2"), names)
    ((frames, path), more) = written[0]
    assert (len(frames), frames[0].shape, path, more) == (5, (32, 32, 3), "clip.mp4", {"fps": 16})
    scheduler = names["pipeline"].scheduler
    assert (scheduler.config.flow_shift, scheduler.config.use_flow_sigmas) == (7, True)
    assert names["pipeline"].get_active_adapters() == ["default_0"] and offloaded == [names["pipeline"]]


def test_samples_of_many_prompts_are_made_to_fit_the_codec(tmp_path):
    """21 clips of 832 pixels stand side by side in 17472, which no H.264 has."""
    args = SimpleNamespace(output_dir=tmp_path, num_frames=1, height=16, width=832, fps=8)
    clips = [[Image.new("RGB", (832, 16), color)] for color in ["red"] * 10 + ["blue"] * 11]
    script.write_samples([clips, clips], args, 3, [])
    with av.open(str(tmp_path / "samples" / "step-3.mp4")) as container:
        frame = next(container.decode(video=0)).to_image()
    assert frame.size == (16384, 30)
    assert frame.getpixel((100, 15))[0] > 200 > 60 > frame.getpixel((16000, 15))[0]


class Bar:
    def update(self):
        pass


# Refusals


def test_wrong_models_are_refused_in_a_line(train, wan, wan_large, sd, tmp_path):
    def changed(name, file, **values):
        model = shutil.copytree(wan, tmp_path / name)
        config = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**config, **values}))
        return model

    index, transformer = "model_index.json", "transformer/config.json"
    second = ["diffusers", "WanTransformer3DModel"]
    for model, message in (
        (sd, "is not Wan: its transformer is nothing, not WanTransformer3DModel"),
        (changed("a14b", index, transformer_2=second, boundary_ratio=0.875), "has two transformers, as Wan 2.2 A14B"),
        (changed("second", index, transformer_2=second), "has two transformers"),
        (changed("boundary", index, boundary_ratio=0.9), "has two transformers"),
        (changed("nf4", transformer, quantization_config={"quant_method": "bitsandbytes"}), "is quantised"),
        (changed("i2v", transformer, image_dim=1280), "takes a picture .* as image-to-video: give a text-to-video"),
        (changed("i2v-2", transformer, in_channels=36), "takes a picture .* as image-to-video"),
        (
            changed("vace", index, transformer=["diffusers", "WanVACETransformer3DModel"]),
            "is WanVACETransformer3DModel",
        ),
        (changed("fast", index, _class_name="WanDMDPipeline"), "is distilled to few steps.* give the base model"),
        (changed("ddpm", index, scheduler=["diffusers", "DDPMScheduler"]), "has the noise levels of DDPMScheduler"),
        (tmp_path / "nowhere", "cannot be loaded"),
    ):
        with pytest.raises(script.UserError, match=message) as error:
            train(model=model)
        assert "\n" not in str(error.value)
    with pytest.raises(script.UserError, match=r"multiples of 32, not \(32, 48\)"):
        train(model=wan_large, width=48)


def test_half_precision_that_was_never_tried_is_refused(load):
    with pytest.raises(script.UserError, match="--mixed_precision fp16 .* use bf16"):
        load(script, torch.float16)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_frames=16), "argument --num_frames: must be 4k + 1, such as 13 or 17, not 16"),
        (dict(num_frames=0), "must be 4k + 1, such as 1 or 5, not 0"),
        (dict(num_frames="many"), "invalid int value: 'many'"),
        (dict(height=40), "must be multiples of 16, not (40, 832)"),
        (dict(resolution=256), "--resolution is not for Wan, clips have a --height and a --width: drop it"),
        (dict(fps=0), "must be at least 1"),
        (dict(flow_shift=0), "must be more than 0"),
        (dict(prediction_type="epsilon"), "--prediction_type is not for Wan"),
        (dict(rollout_scheduler="ddim"), "invalid choice: 'ddim'"),
        (dict(enable_xformers_memory_efficient_attention=True), "memory_efficient_attention is not for Wan"),
    ],
)
def test_wrong_flags_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit):
        script.parse_args(flags("unused", "unused", "unused", **{"resolution": None, **options}))
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
