"""
The measures of evaluate.py that hold drawn clips against real ones: ssim, psnr and lpips clip by clip, fvd for all.

A clip is a tensor (frames, 3, height, width) in 0..1.
"""

import itertools
from pathlib import Path

import av
import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from scorers import UserError, load_function, one_line


AGAINST_REFERENCE = ("ssim", "psnr", "lpips", "fvd")


def to_tensor(frames):
    """The clip of PIL pictures."""
    pixels = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


# Copied from train_sspo_video.upright
def upright(frame, track):
    """A decoded frame as a PIL picture, its pixels square, and turned as the camera noted it."""
    picture = frame.to_image(width=round(frame.width * (track.sample_aspect_ratio or 1)))
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


class References:
    """
    The real clips in a folder with metadata.jsonl or metadata.csv; `paths` are those of each caption.

    Args:
        folder: with the clips.
        frames, fps, height, width: how the models' clips are drawn.
        stride: every so many-th frame of a file is taken; 0 spreads them over the whole clip. With None those are
            taken that are nearest to `fps` a second, by the file's own rate.
    Raises:
        UserError: if the folder has no metadata, or they lack a column.
    """

    def __init__(self, folder, frames, fps, stride, height, width):
        self.folder, self.frames, self.fps, self.stride = Path(folder), frames, fps, stride
        self.size = (width, height)
        self.paths = {}
        table = next(self.folder.glob("metadata.jsonl"), self.folder / "metadata.csv")
        if not table.is_file():
            raise UserError(f"--reference_dir {folder} has no metadata.jsonl or metadata.csv (file_name, text)")
        form = "csv" if table.suffix == ".csv" else "json"
        for row in datasets.load_dataset(form, data_files=str(table), split="train", streaming=True):
            if not {"file_name", "text"} <= set(row):
                raise UserError(f"{table} has the columns {', '.join(row)}, but file_name and text are needed")
            self.paths.setdefault(row["text"].strip(), []).append(self.folder / row["file_name"])

    def clip(self, path):
        """A real clip as the models draw theirs. Raises UserError if it cannot be read, or is too short."""
        try:
            with av.open(str(path)) as container:
                track = container.streams.video[0]
                decoded = list(container.decode(track))
                times = [frame.pts for frame in decoded if frame.pts is not None]
                seconds = (times[-1] - times[0]) * track.time_base if len(times) == len(decoded) > 1 else 0
                rate = (len(times) - 1) / seconds if seconds else track.average_rate
                frames = [upright(decoded[i], track) for i in self.choose(len(decoded), rate)]
        except Exception as error:  # PyAV's errors are OSError, ValueError, LookupError, ...
            raise UserError(f"the real clip {path} cannot be used: {one_line(error)}") from error
        return to_tensor([ImageOps.fit(frame, self.size, Image.Resampling.LANCZOS) for frame in frames])

    def choose(self, count, rate):
        """Which frames of a file of `count`, `rate` a second, are taken. Raises ValueError if it has too few."""
        frames, stride, of, how = self.frames, self.stride, "", f"--frame_stride {self.stride}"
        if stride is None:
            if not rate:
                raise ValueError("it does not tell its frames a second: give --frame_stride")
            stride, of, how = rate / self.fps, f" of {float(rate):g} a second", f"--fps {self.fps}"
        places = [int(i * (stride or 1) + 0.5) for i in range(frames)]
        if count <= places[-1]:
            advice = "--frame_stride (0 spreads them over the whole clip)" if self.stride else "--num_frames"
            raise ValueError(f"it has {count} frames{of}, and {frames} at {how} need {places[-1] + 1}; lower {advice}")
        return places if stride else [round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames)]

    def first(self, prompt):
        """The first real clip of a caption. Raises UserError if there is none."""
        if prompt not in self.paths:
            raise UserError(f'--reference_dir {self.folder} has no clip of the prompt "{prompt}"')
        return self.clip(self.paths[prompt][0])

    def everything(self):
        """Every real clip, one after the other."""
        return (self.clip(path) for path in itertools.chain(*self.paths.values()))


def load_metric(name, device):
    """
    The function(drawn, real) that gives ssim, psnr or lpips of two clips, by torchmetrics.

    Raises:
        UserError: if a package is missing.
    """
    try:
        if name == "lpips":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            metric, options = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device), {}
        else:
            from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

            metric = {"ssim": structural_similarity_index_measure, "psnr": peak_signal_noise_ratio}[name]
            options = dict(data_range=1.0)
    except ImportError as error:
        needed = "torchmetrics and torchvision" if name == "lpips" else "torchmetrics"
        raise UserError(f"--scorer {name} needs {needed}: pip install {needed.replace(' and', '')}") from error
    except Exception as error:  # its weights are downloaded
        raise UserError(f"--scorer {name} cannot be loaded: {one_line(error)}") from error
    return lambda drawn, real: float(metric(drawn.to(device), real.to(device), **options))


class FeatureNetwork(torch.nn.Module):
    """What gives the features of FVD: clips (b, 3, frames, height, width) in 0..255 to (b, features), fp32."""

    def __init__(self, where, device):
        super().__init__()
        self.network, self.options = None, {}
        if ":" in where:
            self.network = load_function(where)
            return
        try:
            self.network = torch.jit.load(where, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--scorer fvd={where} is no TorchScript file: {one_line(error)}") from error
        # The I3D network that video papers pass around has to be asked for its features, and for its own resizing.
        known = {argument.name for argument in self.network.forward.schema.arguments}
        self.options = {name: True for name in ("rescale", "resize", "return_features") if name in known}

    @torch.no_grad()
    def forward(self, clips):
        return self.network(clips, **self.options).float()


class FrechetVideoDistance:
    """FVD (arXiv 1812.01717): torchmetrics' Frechet distance, of the features of clips in place of pictures."""

    def __init__(self, where, references, device, batch_size):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise UserError("--scorer fvd needs torchmetrics: pip install torchmetrics") from error
        self.device, self.batch_size = device, batch_size
        network = FeatureNetwork(where, device)
        network.num_features = network(self.batch([next(references.everything())])).shape[1]
        self.metric = FrechetInceptionDistance(network, reset_real_features=False).to(device)
        self.update(references.everything(), real=True)

    def batch(self, clips):
        return torch.stack(clips).transpose(1, 2).to(self.device) * 255

    def update(self, clips, real):
        clips = iter(clips)
        while batch := list(itertools.islice(clips, self.batch_size)):
            self.metric.update(self.batch(batch), real=real)

    def __call__(self, clips):
        """The distance of drawn clips to the real ones."""
        self.metric.reset()
        self.update(clips, real=False)
        try:
            return float(self.metric.compute())
        except RuntimeError as error:
            raise UserError(f"--scorer fvd cannot be computed: {one_line(error)}") from error
