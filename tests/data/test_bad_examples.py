"""Winners that are damaged, odd or hostile: each is trained on correctly, or named; none is dropped in silence."""

import contextlib
import io
import itertools
import json
import logging
import re
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from helpers import SCRIPTS, assert_same_result, open_winners, resumed, served
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image


script = SCRIPTS["sd"]
PICTURE = tiny.picture("a red circle")


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(content, width, height):
    """A PNG that claims to be of another size."""
    header = struct.pack(">II", width, height) + content[24:29]
    return content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


PNG = encoded(PICTURE)
GOOD_PICTURES = {
    "plain": PNG,
    "grey": encoded(PICTURE.convert("L"), "JPEG"),
    "bits": encoded(PICTURE.convert("1")),
    "palette": encoded(PICTURE.convert("P"), transparency=0),
    "alpha": encoded(PICTURE.convert("RGBA")),
    "grey and alpha": encoded(PICTURE.convert("LA")),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "16 bits": encoded(Image.fromarray(np.full((64, 72), 0x8000, np.uint16))),
    "animated": encoded(PICTURE, "GIF", save_all=True, append_images=[tiny.picture("a blue square")]),
    "one pixel": encoded(Image.new("RGB", (1, 1))),
}
BAD_PICTURES = {
    "nothing": b"",
    "truncated": PNG[:90],
    "damaged": PNG[:60] + bytes(40) + PNG[100:],
    "text": b"not a picture",
    "bomb": png_header(PNG, 60_000, 60_000),
    "endless": encoded(Image.new("1", (1_000_000, 1))),
    "no file": None,
}
GOOD_CAPTIONS = [
    "a red circle",
    "",
    "word " * 2000,
    "🦊 ❤️‍🔥 🇺🇳",
    "狐が雪の中に",
    "ثعلب أحمر",
    'a "quoted",\ncaption',
    "<|endoftext|>",
]


def write_folder(folder, rows):
    """An imagefolder of (picture, caption) where a picture is the name of one in the two tables above."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, caption) in enumerate(rows):
        content = {**GOOD_PICTURES, **BAD_PICTURES}[picture]
        if content is not None:
            (folder / f"{i}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_table(folder, rows):
    """The same as a table, which is quicker to open."""
    content = {**GOOD_PICTURES, **BAD_PICTURES}
    pictures = [{"bytes": content[kind], "path": f"{i}.png"} for i, (kind, _) in enumerate(rows)]
    text = datasets.Value("string")
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": text}, "text": text})
    columns = {"image": pictures, "text": [caption for _, caption in rows]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_picture_and_caption_is_served_or_named(tmp_path, log, streaming):
    """All of the tables at once: the good look like the drawing, the bad are named with their file."""
    rows = [(kind, "a red circle") for kind in [*GOOD_PICTURES, *BAD_PICTURES]]
    rows += [("plain", caption) for caption in [*GOOD_CAPTIONS, None]]
    folder, options = write_folder(tmp_path / "data", rows), dict(resolution=16, on_bad_example="skip")
    winners = open_winners(script, tmp_path, folder, streaming=streaming, **options)
    good = [(kind, caption) for kind, caption in rows if kind in GOOD_PICTURES and caption is not None]
    examples = served(winners, len(good) + 1)
    assert [example["epoch"] for example in examples] == [0] * len(good) + [1]
    assert Counter(example["caption"] for example in examples[:-1]) == Counter(caption for _, caption in good)
    # A stream's place is no row of the file: there a caption or a file's name tells what was named.
    reasons = [line for line in log() if line.startswith("Skipped: ")]
    bad = [f"{i}.png in row" for i, (kind, _) in enumerate(rows) if kind in BAD_PICTURES]
    assert sorted(re.search(r"(\d+\.png in row|column text)", reason)[1] for reason in reasons) == sorted(
        [*bad, "column text"]
    )
    if not streaming:
        plain = script.crop_picture(PICTURE, winners.args, script.keyed_generator("x"))[0]
        pixels = {example["row"]: example["pixels"] for example in examples}
        for i in (0, 3, 4, 6, 8):
            assert (pixels[i] - plain).abs().max() < 0.3, rows[i]
        assert pixels[7].mean() == pytest.approx(0x80 / 127.5 - 1, abs=0.01), "16 bits"


@pytest.mark.parametrize("captions", [[["one", "two"]] * 2, [["one"], []], [["one"], [None]], [["one"], None]])
def test_lists_of_captions(tmp_path, log, captions):
    datasets.Dataset.from_dict({"image": [PNG] * 2, "text": captions}).save_to_disk(tmp_path / "data")
    winners = open_winners(script, tmp_path, tmp_path / "data", on_bad_example="skip")
    bad = captions[1] in ([], [None], None)
    rows = [example["row"] for example in served(winners, 4)]
    assert sorted(rows[:2]) == ([0, 0] if bad else [0, 1])
    assert len(log()) == bad
    assert all("the caption in row 1, column text, is " in line for line in log())


rows_of_a_folder = st.lists(
    st.tuples(
        st.sampled_from([*GOOD_PICTURES, *BAD_PICTURES]),
        st.one_of(
            st.sampled_from([*GOOD_CAPTIONS, None]), st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
        ),
    ),
    min_size=1,
    max_size=7,
)


@contextlib.contextmanager
def named():
    """Collects the warnings about examples that were skipped."""
    messages, handler, logger = [], logging.Handler(), logging.getLogger(script.__name__)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=rows_of_a_folder, streaming=st.booleans(), world=st.sampled_from([1, 2, 3]))
@example(rows=[("plain", "one row")], streaming=False, world=3)
@example(rows=[("nothing", "one row")], streaming=True, world=1)
def test_any_mixture_is_served_or_named(rows, streaming, world):
    """
    Whatever the rows are: with `skip` the good come in their order, each under its own key, on any number of
    processes, and the bad are named, each once, by one process. With `stop` the run stops where a row is bad, and only
    there. Nothing but UserError comes.
    """
    bad = [kind in BAD_PICTURES or caption is None for kind, caption in rows]
    with tempfile.TemporaryDirectory() as directory:
        folder = write_table(Path(directory, "data"), rows)
        options = dict(streaming=streaming, resolution=16, train_batch_size=1, on_bad_example="skip")
        winners = open_winners(script, Path(directory), folder, **options)
        if all(bad):
            for rank in range(world):
                with pytest.raises(script.UserError, match="no winner can be used in a whole epoch"):
                    served(winners, 1, rank=rank, world=world)
            return
        expected = []
        for epoch in range(2 * world + 1):
            for row, row_read in winners.rows(epoch, 0):
                row_read = winners.dataset[row] if row_read is None else row_read
                if not bad[int(row_read["image"]["path"].removesuffix(".png"))]:
                    expected.append((epoch, row, row_read["text"]))
        with named() as messages:
            ranks = [served(winners, bad.count(False) + 1, rank=rank, world=world) for rank in range(world)]
        together = [(e["epoch"], e["row"], e["caption"]) for turn in zip(*ranks) for e in turn]
        assert together == expected[: len(together)]
        assert len(messages) == len(set(messages)) == sum(bad), "an epoch has ended"
        winners.args.on_bad_example = "stop"
        if any(bad):
            with pytest.raises(script.BadExample):
                served(winners, len(rows))
        else:
            assert len(served(winners, len(rows))) == len(rows)


BAD = {1, 2, 4}  # rows of `damaged`


@pytest.fixture
def damaged(tmp_path):
    """A folder of eight winners, three of them bad."""
    folder = tmp_path / "damaged"
    tiny.folder_of_winners(folder)
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").unlink()
    lines = (folder / "metadata.jsonl").read_text().replace('"a blue circle"', "null").splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_skipping_changes_no_other_draw(tmp_path, damaged):
    """What is served has its place in the order, and its own key: crop, flip and caption are as without the bad."""
    options = dict(random_flip=True, center_crop=False, on_bad_example="skip")
    winners = open_winners(script, tmp_path, damaged, **options)
    order = [(epoch, row) for epoch in (0, 1) for row, _ in winners.rows(epoch, 0) if row not in BAD]
    for key, ours in zip(order, served(winners, 2 * (8 - len(BAD))), strict=True):
        assert (ours["epoch"], ours["row"]) == key
        assert torch.equal(ours["pixels"], winners.load(*key)["pixels"])
        assert ours["caption"] == winners.dataset["text"][ours["row"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_with_bad_rows_resumes_at_any_cursor(tmp_path, damaged, streaming):
    options = dict(on_bad_example="skip", streaming=streaming, train_batch_size=3)
    winners = open_winners(script, tmp_path, damaged, **options)
    batches = list(itertools.islice(script.WinnerStream(winners.load, winners, winners.args), 6))
    for i in range(5):
        again = script.WinnerStream(winners.load, winners, winners.args, cursor=batches[i][1])
        for (ours, cursor), (theirs, expected) in zip(again, batches[i + 1 :]):
            assert cursor == expected
            for one, other in zip(ours, theirs):
                assert (one["epoch"], one["row"], one["caption"]) == (other["epoch"], other["row"], other["caption"])
                assert torch.equal(one["pixels"], other["pixels"])


SKIP = dict(on_bad_example="skip", max_train_steps=5, train_batch_size=4, proportion_empty_prompts=0.3)


def test_a_run_skips_bad_rows_and_names_each_once(train, damaged, log):
    """However its batches are laid out, loaded and kept."""
    run, seen = train("run", data=damaged, **SKIP), len(log())
    warnings = [line for line in log() if "Skipped: " in line]
    assert sorted(re.search(r"row (\d)", line)[1] for line in warnings) == ["1", "2", "4"]
    for name, options in {
        "accumulated": dict(train_batch_size=1, gradient_accumulation_steps=4, rollout_batch_size=2),
        "workers": dict(dataloader_num_workers=2),
        "cached": dict(cache_latents=True),
        "cached by workers": dict(cache_latents=True, dataloader_num_workers=1),
    }.items():
        other = train(name, data=damaged, **{**SKIP, **options})
        assert other.column("mse/policy_winner") == pytest.approx(run.column("mse/policy_winner"), rel=1e-5), name
        assert sorted(line for line in log()[seen:] if "Skipped: " in line) == sorted(warnings), name
        seen = len(log())


@pytest.mark.parametrize("options", [dict(), dict(cache_latents=True), dict(streaming=True)])
def test_a_run_with_bad_rows_resumes_exactly(train, damaged, options):
    options = dict(SKIP, data=damaged, **options)
    whole = train("whole", checkpointing_steps=3, **options)
    assert_same_result(whole, resumed(train, whole, 3, **options))


def test_a_run_that_a_bad_row_stopped_is_resumed_without_it(train, damaged):
    """It ends as if it had skipped from the start."""
    options = {**SKIP, "train_batch_size": 1, "checkpointing_steps": 1}
    whole = train("whole", data=damaged, **options)
    with pytest.raises(script.BadExample):
        train("stopped", data=damaged, **{**options, "on_bad_example": "stop"})
    assert list((train.directory / "stopped").glob("checkpoint-*")), "it came to some updates"
    assert_same_result(whole, train("stopped", data=damaged, resume_from_checkpoint="latest", **options))


def test_a_set_that_is_all_bad_stops_the_run(train, tmp_path):
    folder = write_folder(tmp_path / "data", [("nothing", "a"), ("truncated", "b"), ("no file", "c")])
    for cached in (False, True):
        with pytest.raises(script.UserError, match="no winner can be used in a whole epoch") as error:
            train(data=folder, on_bad_example="skip", cache_latents=cached)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "file:///etc/secret.png", "a/../../secret.png"])
def test_file_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    """datasets sees to that; streamed or not, it must come as one line that has the name."""
    folder = write_folder(tmp_path / "data", [("plain", "a"), ("plain", "b")])
    (tmp_path / "secret.png").write_bytes(PNG)
    line = json.dumps({"file_name": name, "text": "secret"})
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + line + "\n")
    for streaming in (False, True):
        with pytest.raises(script.UserError, match=re.escape(name)) as error:
            winners = open_winners(script, tmp_path, folder, streaming=streaming, on_bad_example="skip")
            served(winners, 2)
        assert "\n" not in str(error.value)


def test_a_file_may_be_named_twice_but_must_be_named(tmp_path):
    folder = write_folder(tmp_path / "data", [("plain", "a"), ("plain", "b")])
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": "0.png", "text": text}) for text in ("one", "two"))
    )
    examples = served(open_winners(script, tmp_path, folder), 2)
    assert {example["caption"] for example in examples} == {"one", "two"}
    folder = write_folder(tmp_path / "nameless", [("plain", "a")])
    (folder / "metadata.jsonl").write_text('{"text": "no name"}\n')
    with pytest.raises(script.UserError, match="cannot be opened: .*file_name"):
        open_winners(script, tmp_path, folder)


def test_one_row_and_a_batch_that_is_larger(train, tmp_path):
    """The one row comes round again, every time with draws of its own."""
    folder = write_folder(tmp_path / "data", [("plain", "a red circle")])
    run = train(data=folder, train_batch_size=3, max_train_steps=2)
    assert len(set(run.column("mse/policy_winner"))) == 2
