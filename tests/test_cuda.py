"""What goes wrong on CUDA only, as far as it shows without a GPU. Whole runs on a pretended one: test_fake_cuda.py."""

import importlib.util
import math
from datetime import timedelta
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import Accelerator
from helpers import flags, forget_accelerator, with_every

import train_sspo_sd
import train_sspo_video


def test_runs_in_this_process_stay_on_the_cpu(monkeypatch):
    """Also on a machine with a GPU, where accelerate would take it: the tests' promises are bit for bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    forget_accelerator()
    assert Accelerator().device.type == "cpu"


def test_rows_of_two_devices_make_one_condition(each):
    """A dropped caption's prompt comes from the text encoder's device, cached ones from the disk."""
    rows = [
        {
            "prompt_embeds": torch.zeros(4, 8, device=device),
            "pooled_prompt_embeds": torch.zeros(8, device=device),  # this and the geometry are for SDXL
            "geometry": torch.zeros(6),
        }
        for device in ("cpu", "meta")
    ]
    condition = each.script.collate_condition(rows, torch.device("meta"))
    assert {value.device.type for value in condition.values()} == {"meta"}


@with_every
def test_adapters_are_switched_without_a_search(each, monkeypatch):
    """diffusers looks for the layers in all of the model, which takes 43 ms on SDXL: twice a rollout and an update."""

    def searches(*_):
        pytest.fail("the model is searched for adapters")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "disable_adapters", searches)
    monkeypatch.setattr(diffusers.UNetMotionModel, "disable_adapters", searches)
    monkeypatch.setattr(diffusers.Flux2Transformer2DModel, "disable_adapters", searches)
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "disable_adapters", searches)
    run = each(max_train_steps=1)
    assert run.column("gap/winner") == run.column("gap/rival") == [0], "the reference is the base"


@with_every
def test_the_cache_is_filled_by_one_loader(each, monkeypatch):
    """However many files it has: where processes are not forked, a loader takes seconds to start its own."""
    loaders = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            loaders.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    monkeypatch.setattr(each.script, "CACHE_FILE", 2)
    run = each(max_train_steps=1, cache_latents=True)
    assert len(list(run.path.glob("cache/*/*"))) > 2
    assert len(loaders) == 2, "one for the cache, one for training"


@pytest.fixture
def xformers(monkeypatch):
    """As on a GPU machine that has it installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "xformers" or find_spec(name, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_xformers_that_does_not_run_is_one_line(each, monkeypatch, xformers):
    """Its probe says over many lines why each of its kernels will not do."""

    def probe(*_):
        raise NotImplementedError("No operator for these inputs:\n  query: (1, 2, 1, 40)\n`cutlass` is not built")

    monkeypatch.setattr(diffusers.ModelMixin, "enable_xformers_memory_efficient_attention", probe)
    with pytest.raises(
        each.script.UserError, match=r"xformers does not run here \(No operator.*requirements"
    ) as error:
        each(enable_xformers_memory_efficient_attention=True)
    assert "\n" not in str(error.value)


ROLLOUT = dict(train_batch_size=1, gradient_accumulation_steps=16)
VALIDATION = dict(ROLLOUT, rollout_batch_size=8, validation_prompts=list("abcdefgh"))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(train_batch_size=8), "16 clips of 512 x 512 at once are 65536 rows"),
        (dict(train_batch_size=2, draws_per_pair=4), "16 clips"),
        (dict(train_batch_size=8, split_pairs=True), None),
        (dict(train_batch_size=7), None),
        (ROLLOUT, "16 clips"),
        (dict(ROLLOUT, rollout_batch_size=8), None),
        (dict(ROLLOUT, rollout_batch_size=8, rollout_guidance_scale=2), "16 clips"),
        (VALIDATION, "16 clips"),
        (dict(VALIDATION, validation_guidance_scale=1), None),
        (dict(train_batch_size=4, enable_xformers_memory_efficient_attention=True), "65536 rows.*or drop xformers"),
        (dict(train_batch_size=3, enable_xformers_memory_efficient_attention=True), None),
    ],
)
def test_more_rows_of_attention_than_cuda_takes_are_refused(
    motion, clips, tmp_path, monkeypatch, xformers, options, words
):
    """The motion modules attend over time at 64 x 64 places of each clip; the tiny adapter's have two heads."""
    base, adapter = motion
    options = dict(motion_adapter_name_or_path=adapter, num_frames=4, frame_stride=2, resolution=512, **options)
    args = train_sspo_video.parse_args(flags(base, clips, tmp_path, **options))

    def load(*_, **__):
        raise LookupError("a model is loaded")

    for model in (diffusers.UNet2DConditionModel, diffusers.MotionAdapter, diffusers.AutoencoderKL):
        monkeypatch.setattr(model, "from_pretrained", load)
    if words is None:
        with pytest.raises(LookupError):
            train_sspo_video.load_models(args, torch.float32)
    else:
        with pytest.raises(train_sspo_video.UserError, match=words):
            train_sspo_video.load_models(args, torch.float32)


@pytest.mark.parametrize("options, refused", [(dict(draws_per_pair=4), False), (dict(draws_per_pair=5), True)])
def test_the_backward_of_attention_takes_fewer_rows(motion, options, refused):
    """Eight heads, as AnimateDiff has: 8 clips are the 32768 rows that flash attention can count."""
    base, adapter = motion
    shared = dict(motion_adapter_name_or_path=adapter, num_frames=16, resolution=512, train_batch_size=1)
    args = train_sspo_video.parse_args(flags(base, "clips", "out", rollout_batch_size=8, **shared, **options))
    if refused:
        with pytest.raises(train_sspo_video.UserError, match="40960 rows.* takes 32768: lower --train_batch_size or"):
            train_sspo_video.check_attention(args, heads=8)
        args.split_pairs = True
    train_sspo_video.check_attention(args, heads=8)


@pytest.mark.parametrize(
    "options", [dict(loss_type="sft"), dict(loss_type="sft", train_batch_size=8), dict(rivals="given")]
)
def test_attention_is_not_counted_where_nothing_is_sampled(motion, options):
    """16 rivals of 512 x 512 would be too many, and fine-tuning has no second half of a pair."""
    base, adapter = motion
    shared = dict(motion_adapter_name_or_path=adapter, num_frames=16, resolution=512, train_batch_size=1)
    words = flags(base, "clips", "out", **{**shared, **options}, rollout_batch_size=16)
    train_sspo_video.check_attention(train_sspo_video.parse_args(words), heads=8)


@pytest.mark.parametrize("capability, refused", [((7, 5), True), ((8, 0), False)])
def test_bf16_wants_a_card_that_has_it(monkeypatch, capability, refused):
    """PyTorch says yes to any card: an older one would emulate it, and attention in it would hold its whole matrix."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    args = train_sspo_sd.parse_args(flags("model", "data", "out", mixed_precision="bf16"))
    if refused:
        with pytest.raises(train_sspo_sd.UserError, match="bf16 needs an Ampere card or a later one"):
            train_sspo_sd.check_environment(args)
    else:
        train_sspo_sd.check_environment(args)


@pytest.mark.parametrize(
    "loss, norm, scale, stops",
    [
        (0.7, 1.0, None, False),
        (0.7, math.inf, 1.0, False),
        (0.7, math.inf, 0.5, True),
        (0.7, math.inf, None, True),
        (math.nan, math.nan, 2.0**16, True),
    ],
)
def test_an_overflow_is_skipped_as_long_as_the_scale_can_fall(tmp_path, loss, norm, scale, stops):
    """Of the gradients, that is: a loss that is none stops the run whatever the scale, and so does all in bf16."""
    args = train_sspo_sd.parse_args(flags("unused", "unused", tmp_path))
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    accelerator = SimpleNamespace(scaler=scaler, mixed_precision="fp16" if scaler else "bf16")
    metrics = {"loss": loss, "grad_norm": norm, "gap/winner": 0.0, "gap/rival": 0.0}
    if stops:
        with pytest.raises(train_sspo_sd.UserError, match="update 3 is not finite"):
            train_sspo_sd.check_finite(3, metrics, args, accelerator)
    else:
        train_sspo_sd.check_finite(3, metrics, args, accelerator)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_asked_and_processes_wait_for_hours(tmp_path, allowed):
    """Whatever was set before; and while one process draws samples or writes, the others wait."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, not allowed
    try:
        forget_accelerator()
        args = train_sspo_sd.parse_args(flags("unused", "unused", tmp_path, allow_tf32=allowed))
        accelerator = train_sspo_sd.make_accelerator(args)
        assert products.allow_tf32 is allowed
    finally:
        products.allow_tf32 = before
    assert accelerator.init_handler.timeout == timedelta(hours=3)


@pytest.mark.parametrize("beta, start", [(2000, 2**7), (200, 2**10), (4, 2**16), (1, 2**16)])
def test_the_scaler_starts_where_a_plain_error_would_have_its_usual_start(tmp_path, beta, start):
    """At the start the loss is beta / 4 times as steep as the error it is made of, by autograd's word."""
    args = train_sspo_sd.parse_args(flags("unused", "unused", tmp_path, beta_dpo=beta))
    forget_accelerator()
    assert train_sspo_sd.make_accelerator(args).scaler_handler.init_scale == start
    error = torch.tensor([0.5], requires_grad=True)
    loss, _ = train_sspo_sd.sspo_loss(error, *[torch.tensor([0.5])] * 3, beta)
    loss.backward()
    assert start * max(error.grad.item(), 1) == pytest.approx(2**16, rel=0.5)
    args.loss_type = "sft"
    assert train_sspo_sd.make_accelerator(args).scaler_handler.init_scale == 2**16
