"""Runs of train_sspo_flux2.py: first update, results in the stock pipeline, resume, layouts, memory and refusals."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import Flux2KleinPipeline
from faults import run_of_two
from helpers import LAYOUT, assert_same_but_for_rounding, assert_same_result, flags, resumed
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import Qwen3Model

import train_sspo_flux2 as script


ALL_AT_ONCE = dict(
    cache_latents=True,
    gradient_checkpointing=True,
    split_pairs=True,
    draws_per_pair=2,
    rollout_strength=0.5,
    rollout_steps=4,
    rollout_guidance_scale=4,
    proportion_empty_prompts=0.3,
)


@pytest.fixture
def train(trains):
    return trains["flux2"]


@pytest.fixture
def draw():
    """draw(model, lora=None) gives the latents that the stock pipeline draws, in fp32."""

    def draw(model, lora=None):
        pipeline = Flux2KleinPipeline.from_pretrained(model, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        return drawn(pipeline), pipeline

    return draw


def drawn(pipeline):
    noise = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    size = dict(height=64, width=64, max_sequence_length=tiny.PROMPT_TOKENS)
    size |= dict(num_inference_steps=3, guidance_scale=4.0)
    return pipeline(prompt="a red circle", latents=noise, output_type="latent", **size).images


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(train_mode="full"),
        dict(mixed_precision="bf16"),
        dict(mixed_precision="bf16", train_mode="full"),
        dict(timestep_shift=3, beta_dpo=125, lora_alpha=3),
        ALL_AT_ONCE,
        dict(ALL_AT_ONCE, train_mode="full"),
        dict(ALL_AT_ONCE, mixed_precision="bf16"),
    ],
)
def test_first_update_is_ln_2_with_gaps_of_exactly_0(train, options):
    """So is the first of the second iteration, whose reference is the policy of a moment ago, and none in between."""
    run = train(**options, reference="latest", max_train_steps=3, learning_rate=1e-4)
    for line in (run.metrics[0], run.metrics[2]):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert line["gap/winner"] == line["gap/rival"] == 0
        assert line["dpo_fraction"] == 1
        assert line["grad_norm"] > 0
    assert run.metrics[1]["gap/winner"] != 0 and run.metrics[1]["gap/rival"] != 0


def test_lora_in_the_stock_pipeline_is_the_policy(train, flux2, draw, monkeypatch):
    """
    With an alpha that is not the rank. diffusers' own conversion of names loses the double-stream layers when they are
    loaded, with a mere warning: so every layer is looked for.
    """
    policies, save = [], script.save_result
    monkeypatch.setattr(script, "save_result", lambda models, *rest: policies.append(models) or save(models, *rest))
    run = train(rank=4, lora_alpha=12)
    layers = load_file(run.path / "pytorch_lora_weights.safetensors")
    attention = {f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    attention |= {f"single_transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_qkv_mlp_proj", "to_out")}
    assert {name.split(".lora_")[0].removeprefix("transformer.") for name in layers} == attention
    assert all(weight.any() for weight in layers.values()), "each was trained"
    before, _ = draw(flux2)
    after, pipeline = draw(flux2, run.path)
    loaded = {name.replace(".default_0", ""): weight for name, weight in pipeline.transformer.named_parameters()}
    for name, weight in layers.items():
        assert torch.equal(loaded[name.removeprefix("transformer.")], weight), name
    assert (after - before).abs().max() > 1e-3
    pipeline.unload_lora_weights()
    pipeline.register_modules(transformer=policies[0].denoiser)
    assert torch.equal(drawn(pipeline), after), "the policy itself draws the same"


def test_converted_names_would_lose_layers(train, flux2, draw):
    """The reason why save_denoiser converts nothing. If this fails, diffusers reads them, and it may."""
    from diffusers.utils import convert_state_dict_to_diffusers

    run = train(max_train_steps=1)
    path = run.path / "pytorch_lora_weights.safetensors"
    layers = {name.removeprefix("transformer."): weight for name, weight in load_file(path).items()}
    Flux2KleinPipeline.save_lora_weights(run.path, transformer_lora_layers=convert_state_dict_to_diffusers(layers))
    _, pipeline = draw(flux2, run.path)
    trained = [name for name, weight in pipeline.transformer.named_parameters() if "lora_B" in name and weight.any()]
    assert trained and not any(name.startswith("transformer_blocks") for name in trained)


def test_layers_of_ones_own_choice(train):
    run = train(lora_layers="to_out, ff.linear_in", max_train_steps=1)
    layers = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert {name.removeprefix("transformer.").split(".lora_")[0] for name in layers} == {
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in (0, 1)),
        "transformer_blocks.0.ff.linear_in",
    }


def test_layers_may_be_named_by_their_whole_path(train):
    chosen = ["x_embedder", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"]
    run = train(lora_layers=",".join(chosen), max_train_steps=1)
    layers = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert {name.removeprefix("transformer.").split(".lora_")[0] for name in layers} == {*chosen}


def test_full_result_is_a_whole_pipeline(train, flux2, draw):
    """With all layers of the text encoder, those too that training has no use for."""
    run = train(train_mode="full", learning_rate=1e-4)
    before, base = draw(flux2)
    after, pipeline = draw(run.path)
    assert (after - before).abs().max() > 1e-3
    for name, weight in base.text_encoder.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[name], weight)
    assert torch.equal(pipeline.vae.bn.running_var, base.vae.bn.running_var)
    pushed = load_file(run.path / "replay" / "iteration-2.safetensors")
    assert all(torch.equal(weight, pushed[name]) for name, weight in pipeline.transformer.named_parameters())
    assert f'from_pretrained("{run.path.name}"' in (run.path / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        dict(rank=4, lora_alpha=12, timestep_shift=3),
        dict(train_mode="full", learning_rate=1e-4),
        dict(ALL_AT_ONCE, random_flip=True, center_crop=False),
        dict(streaming=True, rollout_guidance_scale=4),
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
    assert_same_but_for_rounding(one, train("two", train_batch_size=2, gradient_accumulation_steps=2, **options))
    options.update(rollout_batch_size=1)
    assert_same_but_for_rounding(one, train("four", train_batch_size=1, gradient_accumulation_steps=4, **options))


def test_two_processes_make_the_same_run(train):
    options = dict(LAYOUT, cache_latents=True, split_pairs=True)
    one = train("one", train_batch_size=4, **options)
    assert_same_but_for_rounding(one, run_of_two(train, "two", train_batch_size=2, **options))


def test_equal_captions_are_cached_once_and_the_size_is_told_first(train, tmp_path, caplog, monkeypatch):
    """6 winners have 2 captions. The run is the one that caches nothing, but for how a batch rounds."""
    folder = Path(tiny.folder_of_winners(tmp_path / "few", count=6))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    captions = ["a red circle", "a blue square"]
    lines = [json.dumps({**row, "text": captions[i % 2]}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    caplog.set_level("INFO")
    told, encode = [], script.encode_latents
    monkeypatch.setattr(script, "encode_latents", lambda *a: told.append(caplog.text) or encode(*a))
    run = train("cached", data=folder, cache_latents=True, max_sequence_length=512)
    assert "Caching 6 winners and 2 captions" in told[0], "before the first winner is encoded"
    assert "0.0469 MiB a caption" in told[0]  # 512 tokens x 24 numbers in fp32
    (prompts,) = (run.path / "cache").rglob("prompts-*.safetensors")
    assert {name: tuple(value.shape) for name, value in load_file(prompts).items()} == {
        "0/prompt_embeds": (512, 24),
        "1/prompt_embeds": (512, 24),
    }
    plain = train("plain", data=folder, max_sequence_length=512)
    for name in ("mse/policy_winner", "mse/policy_rival"):
        assert run.column(name) == pytest.approx(plain.column(name), rel=1e-5)


def test_a_cache_of_prompts_of_another_length_is_not_used(train):
    """Their embeddings are others, and the model has no mask that would hide it."""
    run = train("run", cache_latents=True, max_train_steps=1)
    short = run.column("mse/policy_winner")
    (run.path / "pytorch_lora_weights.safetensors").unlink()
    again = train("run", cache_latents=True, max_train_steps=1, max_sequence_length=120).column("mse/policy_winner")
    fresh = train("fresh", max_train_steps=1, max_sequence_length=120).column("mse/policy_winner")
    assert again == pytest.approx(fresh, rel=1e-5) and again != pytest.approx(short, rel=1e-4)


def test_text_encoder_has_left_when_the_transformer_comes(train, monkeypatch):
    """What is moved where: the accelerator is told by a torch.device, the CPU by its name."""
    moves, move, fill = [], torch.nn.Module.to, script.LatentCache.fill

    def watched(module, *args, **kwargs):
        if isinstance(module, (Qwen3Model, script.Flux2Transformer2DModel)) and args:
            moves.append((type(module).__name__, "accelerator" if isinstance(args[0], torch.device) else args[0]))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    monkeypatch.setattr(script.LatentCache, "fill", lambda *a: moves.append("cached") or fill(*a))
    train(cache_latents=True, max_train_steps=1, validation_prompts=["a red circle"])
    first = moves.index(("Qwen3Model", "accelerator"))
    left = moves.index(("Qwen3Model", "meta"))
    came = moves.index(("Flux2Transformer2DModel", "accelerator"))
    assert first < moves.index("cached") < left < came
    assert ("Qwen3Model", "accelerator") not in moves[left:], "and it does not come back"


def test_samples_are_drawn_by_the_guided_base_and_policy(train):
    run = train(validation_prompts=["a red circle", "a blue square"], validation_steps=2, learning_rate=1e-2)
    (above, below), (_, last) = (
        tiny.rows_of(run.path / "samples" / f"step-{step}.png", rows=2, columns=2) for step in (2, 4)
    )
    assert tiny.difference(above[0], below[0]) > 0 and tiny.difference(below[0], last[0]) > 0


def test_model_card_carries_the_licence_of_the_base(train, flux2, tmp_path):
    base = shutil.copytree(flux2, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Base\n")
    run = train(model=base, max_train_steps=1)
    card = ModelCard.load(run.path / "README.md")
    assert card.data.license == "apache-2.0"
    assert {"text-to-image", "flux2", "sspo", "lora"} <= set(card.data.tags)
    assert "pipeline(prompt=" in card.text, "the first argument by place is a picture"
    assert f"height=64, width=64, max_sequence_length={tiny.PROMPT_TOKENS})" in card.text, "as it was trained"
    assert "pipeline.enable_model_cpu_offload()" in card.text, "its weights fill a card of 16 GB"
    card = ModelCard.load(train("512", max_sequence_length=512, max_train_steps=1).path / "README.md")
    assert "max_sequence_length" not in card.text.split("```")[1], "the pipeline's own"


def test_licences_of_their_own_are_carried_with_name_and_link(tmp_path):
    """The hub wants both where a licence is none of its list."""
    told = dict(license="other", license_name="theirs", license_link="LICENSE.md")
    lines = [f"{name}: {value}" for name, value in told.items()]
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "---\n"]))
    args = SimpleNamespace(pretrained_model_name_or_path=str(tmp_path))
    assert script.licence(args) == told
    (tmp_path / "README.md").unlink()
    assert script.licence(args) == {}


# Refusals


def test_wrong_models_are_refused_in_a_line(train, flux2, sd, tmp_path):
    def changed(name, file, **values):
        model = shutil.copytree(flux2, tmp_path / name)
        config = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**config, **values}))
        return model

    index, transformer = "model_index.json", "transformer/config.json"
    for model, message in (
        (sd, "is not FLUX.2 .klein.: its transformer is nothing"),
        (changed("few-steps", index, is_distilled=True), "is distilled to few steps.* give the base model"),
        (changed("nf4", transformer, quantization_config={"quant_method": "bitsandbytes"}), "is quantised"),
        (changed("dev", transformer, guidance_embeds=True), r"is distilled to a guidance, as FLUX.2 \[dev\] is"),
        (
            changed("mistral", index, text_encoder=["transformers", "Mistral3ForConditionalGeneration"]),
            "its text_encoder is Mistral3ForConditionalGeneration, not Qwen3ForCausalLM",
        ),
        (changed("more", transformer, in_channels=12), "takes more than latents and a caption"),
        (tmp_path / "nowhere", "cannot be loaded"),
    ):
        with pytest.raises(script.UserError, match=message) as error:
            train(model=model)
        assert "\n" not in str(error.value)


def test_half_precision_that_was_never_tried_is_refused(flux2):
    with pytest.raises(script.UserError, match="--mixed_precision fp16 .* use bf16"):
        script.load_models(script.parse_args(flags(flux2, "unused", "unused")), torch.float16)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(output_kohya_format=True), "--output_kohya_format is not for FLUX.2"),
        (dict(prediction_type="epsilon"), "--prediction_type is not for FLUX.2"),
        (dict(rollout_scheduler="ddim"), "--rollout_scheduler is not for FLUX.2"),
        (dict(enable_xformers_memory_efficient_attention=True), "memory_efficient_attention is not for FLUX.2"),
        (dict(resolution=72), "must be multiples of 16"),
        (dict(timestep_shift=0), "must be more than 0"),
    ],
)
def test_wrong_flags_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit):
        script.parse_args(flags("unused", "unused", "unused", **options))
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
