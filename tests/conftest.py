"""The fixtures that all tests may use: tiny pipelines on disk, folders of winners, and a function that trains."""

import contextlib
import gc
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two shared cores spin on models this small
os.environ["HF_HUB_OFFLINE"] = "1"
# Nothing is left in the user's cache, and nothing read there, such as accelerate's configuration.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sspo-tests-")
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):  # which would come before it
    os.environ.pop(name, None)
# Bit-exactness is promised on the CPU: a machine's GPU is hidden, from accelerate and from what does not ask it.
os.environ.update(ACCELERATE_USE_CPU="1", CUDA_VISIBLE_DEVICES="")
# A shell's background job ignores SIGINT, and so would every run that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import datasets
import psutil
import pytest
import tiny
import torch
import tqdm
from helpers import EVERY, SCRIPTS, WAN, Run, flags, run_main


# Each run ends with a collection, which looks at every object of the libraries: half a second.
gc.freeze()


torch.set_num_threads(1)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it waits five seconds whenever a parquet stream is closed
tqdm.tqdm.monitor_interval = 0  # else a thread watches the bars, and may hold its lock where a test forks


def pytest_unconfigure():
    """
    Each process that runs tests, of xdist too, takes its cache away, and what a test that hung has left running: it
    would hold this process's pipes, for whose end xdist and make wait.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion pipeline that predicts the noise."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd_v(tmp_path_factory):
    """A tiny Stable Diffusion pipeline that predicts the velocity."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd-v"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A tiny Stable Diffusion XL pipeline."""
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sdxl_words(tmp_path_factory):
    """A tiny Stable Diffusion XL pipeline that takes the embedding of "", not zeros, where there is no caption."""
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl-words"), force_zeros=False)


@pytest.fixture(scope="session")
def motion(tmp_path_factory):
    """A tiny Stable Diffusion pipeline and a motion adapter for it."""
    return tiny.animate_diff(tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="session")
def flux2(tmp_path_factory):
    """A tiny pipeline in the layout of FLUX.2 [klein] base."""
    return tiny.flux2(tmp_path_factory.mktemp("flux2"))


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A tiny pipeline in the layout of Wan 2.1."""
    return tiny.wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def wan_large(tmp_path_factory):
    """A tiny pipeline in the layout of Wan 2.2 TI2V 5B."""
    return tiny.wan(tmp_path_factory.mktemp("wan-large"), large=True)


@pytest.fixture(scope="session")
def winners(tmp_path_factory):
    """An imagefolder of eight winners."""
    return tiny.folder_of_winners(tmp_path_factory.mktemp("data") / "winners")


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A videofolder of six clips."""
    return tiny.folder_of_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Pick-a-Pic's layout: the better picture shows what the caption says, the other one another colour."""

    def encoded(picture):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    captions = tiny.CAPTIONS[:8]
    rows = []
    for i, caption in enumerate(captions):
        other = f"a {tiny.COLORS[(i // 2 + 3) % len(tiny.COLORS)]} {caption.split()[2]}"
        better = [encoded(tiny.picture(text)) for text in (caption, other)]
        first = i % 3 != 1
        rows.append((*(better if first else better[::-1]), 0.5 if i == 7 else float(first), caption))
    names = ("jpg_0", "jpg_1", "label_0", "caption")
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    datasets.Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)}).to_parquet(path)
    return str(path)


@pytest.fixture
def trains(request, tmp_path):
    """
    trains["sd"](name, flag=value, ...) runs train_sspo_sd.py's main in this process and returns the Run; so do
    trains["sdxl"] and trains["video"] with theirs. trains["sd"].words(name, flag=value, ...) is its command line, and
    trains["sd"].base() the folder of its tiny pipeline.
    """

    def trainer(kind):
        def base():
            return request.getfixturevalue("motion")[0] if kind == "video" else request.getfixturevalue(kind)

        def words(name="run", model=None, data=None, **options):
            if kind == "video":
                _, adapter = request.getfixturevalue("motion")
                clip = dict(motion_adapter_name_or_path=adapter, num_frames=4, frame_stride=2, resolution=32)
                options = {**clip, **options}
            if kind == "wan":
                options = {**WAN, **options}
            if kind == "flux2":  # the padding to 512 would take most of the time
                options = {"max_sequence_length": tiny.PROMPT_TOKENS, **options}
            model = model or base()
            data = data or request.getfixturevalue("clips" if kind in ("video", "wan") else "winners")
            return flags(model, data, tmp_path / name, **options)

        def train(name="run", script=EVERY[kind], **options):
            run_main(script, words(name, **options))
            return Run(tmp_path / name)

        train.directory, train.script, train.words, train.base = tmp_path, EVERY[kind], words, base
        return train

    return {kind: trainer(kind) for kind in EVERY}


@pytest.fixture
def train(trains):
    """trains["sd"]."""
    return trains["sd"]


@pytest.fixture(params=SCRIPTS)
def each(request, trains):
    """trains[...] of every script in turn; `each.script` is the module."""
    return trains[request.param]


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The module of every script in turn."""
    return SCRIPTS[request.param]


@pytest.fixture
def load(request):
    """load(script, flag=value, ...) gives the args of a run and the models of the tiny pipeline that it is for."""

    def loader(script, dtype=torch.float32, model=None, **options):
        kind = next(name for name, module in EVERY.items() if module is script)
        if kind == "video":
            base, adapter = request.getfixturevalue("motion")
            clip = dict(motion_adapter_name_or_path=adapter, num_frames=4, frame_stride=2, resolution=32)
            model, options = model or base, {**clip, **options}
        if kind == "wan":
            options = {**WAN, **options}
        model = model or request.getfixturevalue(kind)
        args = script.parse_args(flags(model, "unused", "unused", **options))
        return args, script.load_models(args, dtype)

    return loader


@pytest.fixture
def log(tmp_path):
    """log() gives the lines that the scripts have logged so far, those of their loader processes included."""
    path = tmp_path / "log.txt"
    handler = logging.FileHandler(path)
    loggers = [logging.getLogger(script.__name__) for script in SCRIPTS.values()]
    for logger in loggers:
        logger.addHandler(handler)
    yield lambda: path.read_text().splitlines()
    for logger in loggers:
        logger.removeHandler(handler)
    handler.close()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(train, flag=value, ...) is the run that nothing happened to, made once a script and set of flags."""
    runs = {}

    def make(train, **options):
        key = train.script.__name__ + repr(sorted(options.items(), key=str))
        if key not in runs:
            path = train("whole", **options).path
            runs[key] = Run(shutil.move(path, tmp_path_factory.mktemp("whole") / "run"))
        return runs[key]

    return make
