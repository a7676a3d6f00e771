"""What an update costs: calls of the models, and moments at which a GPU would have to be waited for."""

import contextlib
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags
from torch.nn.modules.module import register_module_forward_pre_hook

import train_sspo_sd as script


sys.path.insert(0, str(ROOT / "examples"))

import benchmark  # noqa: E402


@pytest.fixture
def calls():
    """By the model's class, the batch sizes of its calls. The VAE's halves are called by themselves."""
    seen = {name: [] for name in ("UNet2DConditionModel", "CLIPTextModel", "Encoder", "Decoder")}

    def note(module, inputs):
        if type(module).__name__ in seen:
            seen[type(module).__name__].append(len(inputs[0]))

    hook = register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gradient_accumulation_steps=3, rollout_batch_size=4, train_mode="full"),
        dict(gradient_accumulation_steps=2, rollout_batch_size=2, draws_per_pair=3),
        dict(rollout_scheduler="ddim", rollout_steps=5, rollout_strength=0.5, draws_per_pair=2),
        dict(rollout_guidance_scale=1.0, gradient_accumulation_steps=2),
        dict(split_pairs=True, gradient_accumulation_steps=2, draws_per_pair=2),
        dict(loss_type="sft", gradient_accumulation_steps=2, draws_per_pair=2),
    ],
)
def test_no_call_is_needless(train, calls, options):
    """The UNet is called as the formula says, the VAE once a picture, the text encoder once a micro-batch."""
    train(max_train_steps=2, **options)
    args = script.parse_args(flags("unused", "unused", "unused", **options))
    micro_batches = 2 * args.gradient_accumulation_steps * [args.train_batch_size]
    assert calls["UNet2DConditionModel"] == 2 * benchmark.expected_calls(args)
    assert calls["CLIPTextModel"] == [1, *micro_batches]
    assert calls["Encoder"] == sum(micro_batches) * [1], "one picture at a time"
    assert not calls["Decoder"]


def test_the_formula_is_that_of_the_docstring():
    """P = 3 x 2 pairs in rollouts of 4 and 2 with 5 steps; then per micro-batch 2 calls on 2 x 2 x 3 latents."""
    options = dict(gradient_accumulation_steps=3, rollout_batch_size=4, rollout_steps=5, draws_per_pair=3)
    args = script.parse_args(flags("unused", "unused", "unused", **options))
    assert benchmark.expected_calls(args) == 5 * [8] + 4 * [12] + 5 * [4] + 2 * [12]


def test_cached_winners_are_encoded_once(train, calls):
    train(max_train_steps=6, cache_latents=True)
    assert calls["Encoder"] == 8 * [1], "eight winners"
    assert calls["CLIPTextModel"] == [1, *4 * [2]]


@pytest.mark.parametrize(
    "scheduler, strength, mode",
    [("dpmsolver", 1.0, "lora"), ("dpmsolver", 0.5, "full"), ("ddim", 1.0, "full"), ("ddim", 0.5, "lora")],
)
def test_sampling_and_training_never_wait_for_the_accelerator(sd, scheduler, strength, mode):
    """Tensors on the meta device have no values: looking at one, for which a GPU must be waited for, raises."""
    options = dict(rollout_scheduler=scheduler, rollout_strength=strength, rollout_steps=4, train_mode=mode)
    args = script.parse_args(flags(sd, "unused", "unused", **options))
    models = script.load_models(args, torch.float32)
    script.prepare_denoisers(models, args, "cpu")
    models.denoiser.to("meta")
    trained = [parameter for parameter in models.denoiser.parameters() if parameter.requires_grad]
    models.reference = {parameter: torch.empty_like(parameter) for parameter in trained}
    with torch.device("meta"):
        condition = {"prompt_embeds": torch.randn(2, 24, 16)}
        batch = {"winner": torch.randn(2, 4, 8, 8), "condition": condition, "unconditional": condition}
    batch["keys"] = [(0, 0), (0, 1)]
    batch["rival"] = script.sample_rivals(models, batch, args, contextlib.nullcontext)
    loss, metrics = script.training_loss(models.denoiser, models, batch, args, contextlib.nullcontext)
    loss.backward()
    assert {tensor.device.type for tensor in (batch["rival"], loss, *metrics.values())} == {"meta"}


def test_the_base_as_reference_does_without_the_adapter(sd):
    """It would add nothing. A later checkpoint's is computed, and the policy's comes back, with gradients."""
    args = script.parse_args(flags(sd, "unused", "unused"))
    models = script.load_models(args, torch.float32)
    script.prepare_denoisers(models, args, "cpu")
    used = []
    for name, module in models.denoiser.named_modules():
        if name.endswith(f"lora_A.{script.POLICY}"):
            module.register_forward_hook(lambda *_: used.append(True))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), {"prompt_embeds": torch.randn(2, 24, 16)})
    base = {name: weight.clone() for name, weight in script.policy_weights(models, args).items()}
    later = {name: weight + 0.1 for name, weight in base.items()}
    for weights in (base, later):
        script.load_reference(models, weights, args)
        used.clear()
        with script.as_reference(models, args) as reference:
            prediction = script.predict(reference, *inputs)
        assert len(used) == (0 if weights is base else 4 * 2 * 4)
        policy = script.predict(models.denoiser, *inputs)
        assert torch.equal(policy, prediction) == (weights is base)
        assert policy.requires_grad and not prediction.requires_grad
        assert all(torch.equal(weight, base[name]) for name, weight in script.policy_weights(models, args).items())


def test_adapters_take_activations_as_they_are(sd):
    """Under autocast the attention's output is in half precision: peft would cast it to fp32, and autocast back."""
    args = script.parse_args(flags(sd, "unused", "unused"))
    models = script.load_models(args, torch.bfloat16)
    script.prepare_denoisers(models, args, "cpu")
    taken = []
    for name, module in models.denoiser.named_modules():
        if name.endswith(f"to_out.0.lora_A.{script.POLICY}"):
            module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].dtype))
    condition = {"prompt_embeds": torch.randn(1, 24, 16, dtype=torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        script.predict(models.denoiser, torch.randn(1, 4, 8, 8), torch.tensor([500]), condition)
    assert taken == 8 * [torch.bfloat16]


def test_the_next_rollout_is_loaded_ahead():
    """Two loader processes have all eight micro-batches of a rollout ready while the one before is trained on."""
    words = "--train_batch_size 1 --rollout_batch_size 8 --gradient_accumulation_steps 8 --dataloader_num_workers 2"
    args = script.parse_args([*flags("unused", "unused", "unused"), *words.split()])
    loaded = torch.zeros(64).share_memory_()

    def load(row, _, place):
        loaded[row] = 1
        return {"row": row}

    rows = SimpleNamespace(streaming=False, rows=lambda epoch, offset: ((row, row) for row in range(offset, 64)))
    loader = script.Loader(rows, load, args, SimpleNamespace(process_index=0, num_processes=1), (0, 0))
    assert [next(loader) for _ in range(8)] == [([{"row": row}], (0, row + 1)) for row in range(8)]
    for _ in range(1000):
        if loaded[:16].all():
            break
        time.sleep(0.01)
    assert loaded[:16].all() and not loaded[24:].any()


def test_benchmark_runs(capsys):
    """Its lines come out as a table, from a model too small for their numbers to mean anything."""
    benchmark.main(["--quick", "--lines", "turnover"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("turnover")]
    assert [line.split()[1] for line in lines] == ["lora,", "full,"]
    assert all(0 < float(line.split()[7]) < 100 for line in lines)
