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


class References:
    """
    The real clips in a folder with metadata.jsonl or metadata.csv; `paths` are those of each caption.

    Args:
        folder: with the clips.
        frames, stride, height, width: how the models' clips are drawn. With stride 0 the frames are spread over the
            whole clip.
    Raises:
        UserError: if the folder has no metadata, or they lack a column.
    """

    def __init__(self, folder, frames, stride, height, width):
        self.folder, self.frames, self.stride, self.size = Path(folder), frames, stride, (width, height)
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
        count, stride = self.frames, self.stride
        try:
            with av.open(str(path)) as container:
                frames = [frame.to_image() for frame in container.decode(video=0)]
        except Exception as error:  # PyAV's errors are OSError, ValueError, LookupError, ...
            raise UserError(f"the real clip {path} cannot be read ({one_line(error)}): repair or remove it") from error
        if not stride and len(frames) >= count:
            frames = [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
        frames = frames[:: stride or 1][:count]
        if len(frames) < count:
            raise UserError(
                f"the real clip {path} has too few frames for {count} at --frame_stride {stride}: lower it"
            )
        return to_tensor([ImageOps.fit(frame, self.size, Image.Resampling.LANCZOS) for frame in frames])

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
