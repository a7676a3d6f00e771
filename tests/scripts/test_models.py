"""What the scripts assume when they are told nothing, and which models they refuse."""

import json
import shutil

import pytest
import torch
from helpers import EVERY, SCRIPTS, flags, quick_first, with_every, with_shared_code
from huggingface_hub import ModelCard


@pytest.fixture
def bases(request):
    """{kind: folder of its base}, and the motion adapter under `adapter`."""
    base, adapter = request.getfixturevalue("motion")
    pictures = {kind: request.getfixturevalue(kind) for kind in ("sd", "sdxl")}
    return {**pictures, "video": base, "adapter": adapter}


def load(kind, model, adapter=None, **options):
    if kind == "video":
        options = dict(motion_adapter_name_or_path=adapter, num_frames=4, **options)
    args = SCRIPTS[kind].parse_args(flags(model, "unused", "unused", **options))
    return SCRIPTS[kind].load_models(args, torch.float32)


def without_weights(model, directory, file=None, **changes):
    """A copy of a model's configurations, with changes to one file."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    if file is not None:
        path = directory / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def refused(kind, message, *args, **options):
    with pytest.raises(SCRIPTS[kind].UserError, match=message) as refusal:
        load(kind, *args, **options)
    assert "\n" not in str(refusal.value)


# Defaults


@pytest.mark.parametrize(
    "kind, resolution, guidance", [("sd", (512, 512), 7.5), ("sdxl", (1024, 1024), 5), ("video", (256, 256), 8)]
)
def test_defaults(kind, resolution, guidance):
    """The loss and the replay are the paper's; rivals are unguided; size and samples are those of the pipeline."""
    words = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
    args = SCRIPTS[kind].parse_args(words + (["--motion_adapter_name_or_path", "a"] if kind == "video" else []))
    assert (SCRIPTS[kind].picture_size(args), args.validation_guidance_scale) == (resolution, guidance)
    assert (args.train_mode, args.loss_type, args.ssr, args.reference) == ("lora", "sspo", "sign", "random")
    assert (args.beta_dpo, args.replay_steps, args.replay_size, args.max_train_steps) == (2000, 30, 8, 210)
    assert (args.rollout_steps, args.rollout_guidance_scale, args.rollout_scheduler) == (20, 1, "dpmsolver")
    assert (args.rollout_strength, args.draws_per_pair, args.rival_weight, args.sft_weight) == (1, 1, 1, 0)
    assert (args.rank, args.lora_alpha, args.learning_rate, args.optimizer, args.seed) == (8, 8, 1e-5, "adamw", 0)
    batch = (args.train_batch_size, args.gradient_accumulation_steps, args.max_grad_norm, args.lr_warmup_steps)
    assert batch == (4, 1, 1.0, 0)
    assert (args.checkpointing_steps, args.validation_steps, args.lr_scheduler) == (100, 50, "constant")
    adam = (args.adam_beta1, args.adam_beta2, args.adam_weight_decay, args.adam_epsilon)
    assert adam == (0.9, 0.999, 1e-2, 1e-8)
    if kind == "video":
        assert (args.num_frames, args.frame_stride) == (16, 4)


@pytest.mark.parametrize(
    "kind, own",
    [
        ("flux2", dict(resolution=512, validation_guidance_scale=4, max_sequence_length=512)),
        ("wan", dict(height=480, width=832, num_frames=33, fps=None, flow_shift=None, validation_guidance_scale=5)),
    ],
)
def test_defaults_of_flow_models(kind, own):
    """Beta is another one, since their errors are larger; size and samples are those of the pipeline."""
    args = EVERY[kind].parse_args(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"])
    expected = dict(beta_dpo=500, timestep_shift=1, train_mode="lora", ssr="sign", reference="random", rank=8)
    expected |= dict(replay_steps=30, replay_size=8, rollout_steps=20, rollout_guidance_scale=1, learning_rate=1e-5)
    expected |= dict(negative_prompt=None) if kind == "wan" else {}
    assert {name: getattr(args, name) for name in {**expected, **own}} == {**expected, **own}


@pytest.mark.parametrize("batch, accumulation, rollouts", [(4, 1, 4), (1, 256, 16), (3, 8, 15), (32, 2, 32)])
def test_default_rollout_is_an_update_of_16_rivals_at_most(batch, accumulation, rollouts):
    words = flags("m", "d", "o", train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert SCRIPTS["sd"].parse_args(words).rollout_batch_size == rollouts


# A base of the hub


@pytest.fixture
def hub(tmp_path):
    """hub(model, revision): a cache of the hub's with this model as me/base, as fp16 and in this revision alone."""

    def cached(model, revision):
        place, commit = tmp_path / "cache" / "models--me--base", "0123abcd" * 5
        shutil.copytree(model, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / revision).write_text(commit)
        for path in [*place.rglob("*.safetensors")]:
            path.rename(path.with_suffix(".fp16.safetensors"))
        return tmp_path / "cache"

    return cached


@pytest.mark.parametrize("mode", quick_first("lora", ["full"]))
@with_every
def test_a_model_of_the_hub_is_read_in_its_revision_and_its_variant(each, hub, mode):
    """All of its parts, at the start and for the result."""
    named = dict(model="me/base", revision="other", variant="fp16", cache_dir=hub(each.base(), "other"))
    run = each(train_mode=mode, max_train_steps=1, rollout_steps=1, **named)
    card = ModelCard.load(run.path / "README.md")
    assert card.data.base_model == "me/base"
    of_base = [line for line in card.text.splitlines() if '"me/base"' in line and ("=" in line or "motion" in line)]
    assert all('"me/base", revision="other", variant="fp16"' in line for line in of_base) and bool(of_base) == (
        '"me/base"' in card.text
    )


# Bases that would be trained wrongly. The folders have no weights: what is refused is known without them.

SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "file, changes, message",
    [
        (UNET, dict(in_channels=9), "takes more than latents and a caption .inpainting"),
        (
            UNET,
            dict(class_embed_type="projection"),
            "takes more than latents and a caption .inpainting, depth, unclip",
        ),
        (UNET, dict(time_cond_proj_dim=256), "is distilled to few steps .LCM"),
        (SCHEDULER, dict(_class_name="LCMScheduler"), "is distilled to few steps .LCM"),
        (SCHEDULER, dict(_class_name="TCDScheduler"), "is distilled to few steps .LCM"),
        (SCHEDULER, dict(prediction_type="sample"), "predicts sample, and only epsilon and v_prediction"),
    ],
)
def test_other_bases_are_refused_before_their_weights_load(bases, tmp_path, kind, file, changes, message):
    model = without_weights(bases[kind], tmp_path / "other", file, **changes)
    refused(kind, f"--pretrained_model_name_or_path .*other {message}", model, bases["adapter"])


@pytest.mark.parametrize("kind", SCRIPTS)
def test_schedules_without_betas_are_refused(bases, tmp_path, kind):
    model = without_weights(bases[kind], tmp_path / "other")
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
    (model / SCHEDULER).write_text(json.dumps(config))
    refused(kind, "has the noise levels of EDMEulerScheduler, not a schedule of betas", model, bases["adapter"])


@pytest.mark.parametrize("kind, other", [("sd", "sdxl"), ("sdxl", "sd"), ("video", "sdxl")])
def test_a_base_of_another_family_is_refused(bases, tmp_path, kind, other):
    """With the name of the script that trains it, where there is one."""
    said = dict(
        sd=r"not Stable Diffusion 1\.x or 2\.x: train_sspo_sdxl\.py is for",
        sdxl=r"not Stable Diffusion XL: train_sspo_sd\.py is for",
        video=r"not an image model of Stable Diffusion 1\.x: give the one that the motion adapter is for",
    )
    refused(kind, said[kind], without_weights(bases[other], tmp_path / "other"), bases["adapter"])


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_spacing_of_a_samplers_steps_is_no_reason_to_refuse(bases, tmp_path, kind, spacing):
    """Models that were trained to a schedule that ends in pure noise have trailing steps, and are not distilled."""
    changes = dict(timestep_spacing=spacing, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    model = without_weights(bases[kind], tmp_path / "other", SCHEDULER, **changes)
    refused(kind, "other cannot be loaded: .*(no file|safetensors)", model, bases["adapter"])  # it gets to the weights


def sampler_of(kind, bases, directory, options=(), **changes):
    """The rivals' sampler of a run on a base whose scheduler has these `changes`; None takes a line out."""
    shutil.copytree(bases[kind], directory)
    path = directory / SCHEDULER
    lines = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in lines.items() if value is not None}))
    words = dict(motion_adapter_name_or_path=bases["adapter"], num_frames=4) if kind == "video" else {}
    args = SCRIPTS[kind].parse_args(flags(directory, "unused", "unused", **words, **dict(options)))
    return SCRIPTS[kind].rollout_scheduler(SCRIPTS[kind].load_models(args, torch.float32), args)


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("sampler", ["dpmsolver", "ddim"])
def test_rivals_are_sampled_by_the_prediction_that_is_trained(bases, tmp_path, kind, sampler):
    """Also where the base's own file says nothing of it, as that of Stable Diffusion 1.5."""
    options = dict(prediction_type="v_prediction", rollout_scheduler=sampler)
    made = sampler_of(kind, bases, tmp_path / "silent", options, _class_name="PNDMScheduler", prediction_type=None)
    assert made.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("algorithm", ["deis", "dpmsolver", "sde-dpmsolver++"])
def test_rivals_are_sampled_by_dpmsolver_whatever_solver_the_base_came_with(bases, tmp_path, kind, algorithm):
    """deis would be refused by it, and sde- draws noise of its own, which no key tells."""
    name = "DEISMultistepScheduler" if algorithm == "deis" else "DPMSolverMultistepScheduler"
    made = sampler_of(kind, bases, tmp_path / "solver", _class_name=name, algorithm_type=algorithm)
    assert made.config.algorithm_type == "dpmsolver++"


@pytest.mark.parametrize("part", ["safety_checker", "feature_extractor"])
def test_what_the_result_lacks_is_known_before_it_is_trained(sd, tmp_path, part):
    """A whole pipeline has parts that no training needs. LoRA does without them."""
    shutil.copytree(sd, tmp_path / "pruned")
    index = tmp_path / "pruned" / "model_index.json"
    classes = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    classes["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index.write_text(json.dumps({**json.loads(index.read_text()), part: classes[part]}))
    refused("sd", "pruned cannot be loaded", tmp_path / "pruned", train_mode="full")
    assert load("sd", tmp_path / "pruned").denoiser is not None


@pytest.mark.parametrize(
    "each, part", [*((kind, "tokenizer") for kind in EVERY), ("sdxl", "tokenizer_2")], indirect=["each"]
)
def test_a_tokenizer_without_its_files_is_refused(each, tmp_path, part):
    """transformers makes an empty one then, and each caption would be a row of unknown words."""
    shutil.copytree(each.base(), tmp_path / "base")
    (tmp_path / "base" / part / "tokenizer.json").unlink()
    with pytest.raises(each.script.UserError, match="base cannot be loaded: its tokenizer knows .* are missing"):
        each(model=tmp_path / "base", max_train_steps=1)


@with_shared_code
def test_half_a_file_of_weights_is_named(each, tmp_path):
    """Of a copy that was interrupted."""
    shutil.copytree(each.base(), tmp_path / "base")
    weights = tmp_path / "base" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(each.script.UserError, match="--pretrained_model_name_or_path .*base cannot be loaded"):
        each(model=tmp_path / "base", max_train_steps=1)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_base_that_is_not_there_is_named(bases, kind):
    refused(kind, "--pretrained_model_name_or_path nothing-here cannot be loaded", "nothing-here", bases["adapter"])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_size_that_the_base_was_not_made_for_is_told(bases, log, kind):
    """Its rivals would be worse than it is. The tiny models are made for 64 x 64."""
    load(kind, bases[kind], resolution=64)
    assert log() == []
    load(kind, bases[kind], resolution=128)
    assert "is made for pictures of 64 pixels a side, but --resolution is 128" in log()[0]


@pytest.mark.parametrize(
    "changes", [dict(requires_aesthetics_score=True), dict(text_encoder=[None, None], tokenizer=[None, None])]
)
def test_refiners_of_sdxl_are_refused(sdxl, tmp_path, changes):
    model = without_weights(sdxl, tmp_path / "model", "model_index.json", **changes)
    refused("sdxl", "is a refiner, which has another conditioning", model)


def test_a_vae_that_is_not_there_is_named(sdxl, tmp_path):
    missing = tmp_path / "no-such-vae"
    refused(
        "sdxl", "--pretrained_vae_model_name_or_path .*no-such-vae", sdxl, pretrained_vae_model_name_or_path=missing
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(block_out_channels=[8, 32]),
            r"is not made for .*\[8, 32\] channels, those of the image model \[8, 16\]",
        ),
        (dict(conv_in_channels=9), "takes more than latents and a caption"),
        (dict(_class_name="UNet2DConditionModel"), "is no motion adapter"),
        (dict(motion_max_seq_length=3), "takes 3 frames at most: lower --num_frames 4"),
        ({}, "cannot be loaded"),
    ],
)
def test_other_motion_adapters_are_refused(bases, tmp_path, changes, message):
    """The last for its weights, which are missing."""
    adapter = without_weights(bases["adapter"], tmp_path / "other", "config.json", **changes)
    refused("video", f"--motion_adapter_name_or_path .*other {message}", bases["video"], adapter)


def test_a_motion_adapter_may_leave_out_its_channels(bases, tmp_path):
    """As some of the hub: then they are those of Stable Diffusion 1.5, which the tiny model's are not."""
    adapter = without_weights(bases["adapter"], tmp_path / "bare")
    config = json.loads((adapter / "config.json").read_text())
    del config["block_out_channels"]
    (adapter / "config.json").write_text(json.dumps(config))
    refused("video", r"bare is not made for .*\[320, 640, 1280, 1280\] channels", bases["video"], adapter)


def test_a_motion_adapter_whose_weights_do_not_fit_is_named(bases, tmp_path):
    adapter = tmp_path / "deep"
    shutil.copytree(bases["adapter"], adapter)
    config = adapter / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "motion_layers_per_block": 2}))
    refused("video", "--motion_adapter_name_or_path .*deep cannot be loaded", bases["video"], adapter)


def test_a_motion_adapter_that_is_not_there_is_named(bases, tmp_path):
    missing = tmp_path / "nowhere"
    refused("video", "--motion_adapter_name_or_path .*nowhere cannot be loaded", bases["video"], missing)


@pytest.mark.parametrize(
    "flag, options",
    [
        ("train", dict(train_batch_size=8)),
        ("train", dict(train_batch_size=8, draws_per_pair=2, split_pairs=True)),
        ("rollout", dict(train_batch_size=1, rollout_batch_size=8, rollout_guidance_scale=7.5)),
        ("rollout", dict(train_batch_size=1, rollout_batch_size=16)),
    ],
)
def test_more_attention_than_cuda_takes_is_refused(bases, flag, options):
    """Its kernels take 65,535 rows: the places of a clip's latents, of all clips that go through the model at once."""
    load("video", bases["video"], bases["adapter"], resolution=504, **options)
    message = f"16 clips of 512 x 512 at once are 65536 rows of attention .* lower --{flag}_batch_size"
    refused("video", message, bases["video"], bases["adapter"], resolution=512, **options)
