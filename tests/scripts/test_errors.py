"""What a user does wrong: one line that says what and how to fix it, and nothing is overwritten."""

import importlib.util
import json
import os
import re
import resource
import signal

import datasets
import pytest
import tiny
import torch
from faults import ranks_in_children, run_script
from helpers import EVERY, WAN, flags, forget_result, with_every
from transformers import CLIPTextModel


# Flags


def words_of(kind, **options):
    own = {"motion_adapter_name_or_path": "adapter"} if kind == "video" else {}
    if kind == "wan":
        own = {**WAN, "height": options.pop("resolution", WAN["height"])}
        own["width"] = own["height"]
    return flags("model", "data", "out", **{**own, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(train_data_dir=None), "--train_data_dir or --dataset_name"),
        (dict(dataset_name="both"), "--train_data_dir or --dataset_name"),
        (dict(pretrained_model_name_or_path=None), "--pretrained_model_name_or_path"),
        (dict(train_batch_size=0), "--train_batch_size: must be at least 1, not 0"),
        (dict(learning_rate=-1), "--learning_rate: must be more than 0, not -1"),
        (dict(learning_rate="nan"), "--learning_rate: must be more than 0, not nan"),
        (dict(rollout_batch_size=3), "multiple of --train_batch_size"),
        (dict(rollout_strength=1.5), "--rollout_strength: must be more than 0 and at most 1, not 1.5"),
        (dict(rollout_strength=0.1), "--rollout_strength 0.1 leaves none of 3 sampler steps"),
        (dict(proportion_empty_prompts=2), "--proportion_empty_prompts: must be at least 0 and at most 1, not 2"),
        (dict(rival_weight=-1), "--rival_weight: must be at least 0, not -1"),
        (dict(resolution=60), "height and width must be multiples of {}, not (60, 60)"),
        (dict(streaming=True, cache_latents=True), "--cache_latents needs the whole data set"),
        (dict(streaming=True, max_train_steps=None, num_train_epochs=1), "give --max_train_steps"),
        (dict(use_8bit_adam=True, optimizer="adafactor"), "--use_8bit_adam"),
        (dict(train_mode="full", output_kohya_format=True), "--output_kohya_format"),
        (dict(ssr="ipo"), "--ssr: invalid choice: 'ipo'"),
        (dict(train_mode="dora"), "--train_mode: invalid choice: 'dora'"),
        (dict(report_to="paper"), "--report_to: invalid choice: 'paper'"),
        (dict(seed="x"), "--seed: invalid int value: 'x'"),
        (dict(seed=-1), "--seed: must be at least 0 and at most 4294967295, not -1"),
        (dict(adam_beta2=1.5), "--adam_beta2: must be at least 0 and at most 1, not 1.5"),
        (dict(adam_beta2=1), "--adam_beta1 and --adam_beta2 must be less than 1"),
        (dict(lr_scheduler="polynomial", learning_rate=1e-8), "--lr_scheduler polynomial ends at a rate of 1e-7"),
        (dict(lr_warmup_steps=5), "--lr_scheduler constant has no warm-up: give constant_with_warmup"),
        (dict(no_such_flag=1), "--no_such_flag 1"),
        (dict(train_batch=1), "--train_batch 1"),
    ],
)
@pytest.mark.parametrize("kind", EVERY)
def test_wrong_flag_is_one_line(kind, options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        EVERY[kind].parse_args(words_of(kind, **options))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1
    assert message.format(EVERY[kind].SIDE_MULTIPLE) in error


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_frames=0), "--num_frames: must be at least 1, not 0"),
        (dict(frame_stride=-1), "--frame_stride: must be at least 0, not -1"),
        (dict(height=60), "height and width must be multiples of 8, not (60, 64)"),
        (dict(width=-8), "--width: must be at least 1, not -8"),
        (dict(motion_adapter_name_or_path=None), "--motion_adapter_name_or_path"),
    ],
)
def test_wrong_flag_of_clips_is_one_line(options, message, capsys):
    test_wrong_flag_is_one_line("video", options, message, capsys)


@pytest.mark.parametrize("kind", EVERY)
def test_help_says_every_default(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # those of a terminal might break sspo-model in two
    script = EVERY[kind]
    required = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
    required += ["--motion_adapter_name_or_path", "a"] if kind == "video" else []
    defaults = vars(script.parse_args(required))
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    # A line of a group's text may begin with a flag's name too, but not with what it takes behind it.
    options = re.split(r"\n  --(?=\w+(?: [A-Z{]|  |\n))", capsys.readouterr().out)[1:]
    told = {re.match(r"\w+", option)[0]: " ".join(option.split()) for option in options}
    elsewhere = {"prediction_type", "output_kohya_format", "enable_xformers_memory_efficient_attention"}
    refused = {"flux2": elsewhere | {"rollout_scheduler"}, "wan": elsewhere - {"output_kohya_format"} | {"resolution"}}
    assert set(told) == set(defaults) - refused.get(kind, set()), "what it has not is refused, and not told"
    for flag, text in told.items():
        if defaults[flag] is not None and defaults[flag] is not False and f"--{flag}" not in required:
            assert f"(default: {defaults[flag]})" in text or "Default: " in text, flag


# What is known before the models load


def refused(train, message, **options):
    with pytest.raises(train.script.UserError, match=message) as error:
        train(**options)
    assert "\n" not in str(error.value)


@pytest.fixture
def early(each, monkeypatch):
    """`each`, which fails loudly if it comes as far as loading the models."""
    monkeypatch.setattr(each.script, "load_models", lambda *a: pytest.fail("the models were loaded"))
    return each


def test_a_single_file_is_no_base(early, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"as from Civitai")
    message = "model.safetensors is a file, and a folder in diffusers' layout is needed"
    refused(early, message, pretrained_model_name_or_path=tmp_path / "model.safetensors")


def test_missing_folder(early, tmp_path):
    refused(early, "nowhere does not exist", data=tmp_path / "nowhere")


def test_empty_data(early, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(early, "cannot be opened", data=tmp_path / "empty")
    (tmp_path / "empty.csv").write_text("image,text\n")
    nothing = datasets.Dataset.from_dict({"image": [], "text": []})
    nothing.save_to_disk(tmp_path / "saved")
    refused(early, "cannot be opened", data=tmp_path / "saved")
    nothing.to_parquet(tmp_path / "nothing.parquet")
    refused(early, "is empty", data=tmp_path / "nothing.parquet", streaming=True)
    refused(early, "nor one of .parquet", data=tmp_path / "empty.csv")


def test_missing_column_lists_those_there_are(early, tmp_path):
    what, folder = early.script.MODALITY, tmp_path / "data"
    (tiny.folder_of_clips if what == "video" else tiny.folder_of_winners)(folder, 2)
    refused(early, f"no column title: it has {what}, text; .*--caption_column", data=folder, caption_column="title")
    refused(
        early,
        f"no column film: it has {what}, text; .*--{what}_column",
        data=folder,
        **{f"{what}_column": "film"},
    )
    (folder / "metadata.jsonl").unlink()
    refused(early, f"no column text or caption or txt or prompt: it has {what}", data=folder)


def test_ties_only(early, tmp_path):
    row = {**dict.fromkeys(early.script.PAIR_COLUMNS, b""), "label_0": 0.5, "caption": "a tie"}
    datasets.Dataset.from_list([row] * 3).to_parquet(tmp_path / "ties.parquet")
    refused(early, "no winner", data=tmp_path / "ties.parquet")


def test_ties_only_in_a_stream(train, tmp_path):
    row = {"jpg_0": b"", "jpg_1": b"", "label_0": 0.5, "caption": "a tie"}
    datasets.Dataset.from_list([row] * 3).to_parquet(tmp_path / "ties.parquet")
    refused(train, "no winner", data=tmp_path / "ties.parquet", streaming=True)


def test_output_dir_that_cannot_be_written(early, tmp_path):
    (tmp_path / "file").write_text("")
    refused(early, "--output_dir .*file/run cannot be written: Not a directory", name="file/run")


def test_output_dir_that_is_not_shared(train, capfd):
    """Where each machine has a disk of its own, what one writes does not appear to the other: both say so."""

    def prepare(rank):
        train.script.load_models = lambda *a: os._exit(3)
        parse = train.script.parse_args

        def elsewhere(words):
            args = parse(words)
            args.output_dir += f"-{rank}"
            return args

        train.script.parse_args = elsewhere

    assert ranks_in_children(train, "run", prepare, grace=30) == [1, 1]
    message = "run-{} is not the same folder for all processes: name one on a disk that all machines share"
    said = capfd.readouterr().err
    for rank in (0, 1):
        assert message.format(rank) in said
        assert not list((train.directory / f"run-{rank}").iterdir())


def test_packages_and_devices_are_checked_first(early, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    xformers = dict(enable_xformers_memory_efficient_attention=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    refused(early, "needs a CUDA device: drop it", **xformers)
    refused(early, "fp16 needs a CUDA device: use no or bf16", mixed_precision="fp16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package, options in {
        "xformers": xformers,
        "bitsandbytes": dict(use_8bit_adam=True),
        "wandb": dict(report_to="wandb"),
        "tensorboard": dict(report_to="tensorboard"),
    }.items():
        refused(early, f"needs {package}, which is missing: pip install {package}", **options)


def test_sharded_training_is_refused(early, monkeypatch):
    distributed = property(lambda self: early.script.DistributedType.FSDP)
    monkeypatch.setattr(early.script.Accelerator, "distributed_type", distributed)
    refused(early, "configured for FSDP.*never run.*data parallel")


@pytest.mark.parametrize("mode", ["lora", "full"])
@with_every
def test_results_are_not_overwritten(each, mode):
    """Those of a run that left no checkpoint: by a new run, or by one that would go on and has nothing to."""
    run = each(train_mode=mode, max_train_steps=1)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for options in (dict(seed=1), dict(resume_from_checkpoint="latest", max_train_steps=2)):
        message = "holds the results of another run: it left no checkpoint: choose another folder"
        refused(each, message, train_mode=mode, **options)
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@with_every
def test_checkpoints_are_not_overwritten(each):
    run = each(max_train_steps=1, checkpointing_steps=1)
    forget_result(run)
    refused(each, "holds the results of another run.*--resume_from_checkpoint latest", max_train_steps=1)
    assert (run.path / "checkpoint-1" / "run.json").exists()


@pytest.mark.parametrize("options", [{}, dict(resume_from_checkpoint="latest")])
def test_a_run_that_left_nothing_to_resume_starts_again(train, options):
    """Stopped before its first checkpoint it is no reason to refuse; `latest` without a checkpoint is a new run."""
    run = train(max_train_steps=3)
    whole = run.column("loss")
    forget_result(run)
    assert train(max_train_steps=3, **options).column("loss") == whole


# What shows itself later


@pytest.mark.parametrize(
    "options", [{}, dict(cache_latents=True), dict(dataloader_num_workers=1), dict(streaming=True)]
)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_unreadable_picture_is_named(train, tmp_path, damage, options):
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder, 2)
    content = (folder / "1.png").read_bytes()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes({"truncated": content[:90], "empty": b"", "text": b"not a picture"}[damage])
    with pytest.raises(train.script.BadExample, match=r"the image .*[01]\.png in row [01] cannot be read: \w+"):
        train(data=folder, **options)


def test_caption_that_is_no_text_is_named(train, tmp_path):
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder, 2)
    rows = [{"file_name": "0.png", "text": "a red circle"}, {"file_name": "1.png", "text": None}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(train, "the caption in row 1, column text, is None, not text .an empty field", data=folder)


def test_non_finite_loss_stops_the_run(train):
    """Step, gaps and the last good checkpoint are named, and the checkpoint is from before."""
    refused(
        train,
        r"update \d+ is not finite \(loss .*grad_norm .*gap/winner .*gap/rival .*good checkpoint is .*checkpoint-",
        train_mode="full",
        learning_rate=1e12,
        checkpointing_steps=1,
        max_train_steps=20,
    )


# The bottom of the script


@with_every
def test_every_script_ends_with_one_line(each):
    code, said = run_script(each, caption_column="titel")
    assert code == 1
    assert [line for line in said if "Generating" not in line] == [  # datasets' bar, where no test was here before
        f"{each.script.__name__}.py: the data set has no column titel: it has {each.script.MODALITY}, text; name the "
        "one to use with --caption_column, or give a folder a metadata.jsonl with file_name and text"
    ]


@pytest.mark.parametrize("options", [{}, dict(dataloader_num_workers=2), dict(cache_latents=True)])
def test_a_bad_winner_ends_with_one_line_and_advice(train, tmp_path, options):
    """From a loader process, too, whose own message comes with the traceback there."""
    folder = tmp_path / "data"
    tiny.folder_of_winners(folder, 4)
    (folder / "2.png").write_bytes(b"not a picture")
    code, said = run_script(train, data=folder, **options)
    assert code == 1
    assert not [line for line in said if "Traceback" in line]
    start = f"train_sspo_sd.py: the image {folder}/2.png in row 2 cannot be read: cannot identify image file"
    assert said[-1].startswith(start)
    assert said[-1].endswith(": fix it, or leave it out with --on_bad_example skip")
    assert len([line for line in said if "2.png" in line]) == 1


@pytest.mark.parametrize("what", ["the metrics", "the base's push", "a checkpoint"])
def test_a_full_disk_ends_with_one_line(train, whole, what):
    """What the system says, and how to resume. The disk is a limit on the size of a file."""
    options = dict(max_train_steps=2, checkpointing_steps=2)
    size = (whole(train, **options).path / "replay" / "iteration-0.safetensors").stat().st_size
    limit = {"the metrics": 300, "the base's push": size - 1, "a checkpoint": size * 3 // 2}[what]
    options["loss_type"] = "sft" if what == "the metrics" else "sspo"  # the baseline pushes nothing
    code, said = run_script(
        train, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)), **options
    )
    assert code == 1
    assert not [line for line in said if "Traceback" in line]
    why = (
        r".*checkpoint-2\.partial cannot be written, is the disk full\? .*"
        if what == "a checkpoint"
        else ".*File too large.*"
    )
    assert re.fullmatch(rf"train_sspo_sd\.py: {why}; fix it and add --resume_from_checkpoint latest", said[-1]), said[
        -1
    ]


def test_full_memory_ends_with_one_line(train):
    """Which flags need less of it, and what the allocator said."""

    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    code, said = run_script(train, lambda: setattr(torch.nn.functional, "logsigmoid", exhausted))
    assert code == 1 and not [line for line in said if "Traceback" in line]
    assert re.fullmatch(
        r"train_sspo_sd\.py: out of memory: lower --rollout_batch_size, .*2\.00 GiB\. GPU 0.*", said[-1]
    )


@pytest.mark.parametrize(
    "words, told",
    [
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_full_memory_in_the_words_of_other_libraries(train, words, told):
    def exhausted(*args):
        raise RuntimeError(words)

    code, said = run_script(train, lambda: setattr(torch.nn.functional, "logsigmoid", exhausted))
    assert code == 1 and any("Traceback" in line for line in said) != told
    assert said[-1].startswith("train_sspo_sd.py: out of memory: lower" if told else f"RuntimeError: {words}")


def test_an_interrupt_before_there_is_anything_to_save_is_quiet(train):
    def prepare():
        load = CLIPTextModel.from_pretrained
        CLIPTextModel.from_pretrained = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or load(*a, **k)

    assert run_script(train, prepare) == (130, [])
