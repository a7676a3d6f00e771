"""
The scorers of evaluate.py: how their weights are loaded, and what they say of a picture.

A scorer is called with a list of PIL pictures and a list of their prompts, and returns {name: a number for each}. The
published ones are read from their authors' files and run on transformers alone.
"""

import importlib
import importlib.util
import math
import re
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig


try:  # resizing by PIL, as the scorers' authors did but for HPSv2's, whether torchvision is there or not
    from transformers import CLIPImageProcessorPil
except ImportError:  # before there were two of them
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


class UserError(Exception):
    """Something the user can fix. Its message is one line: what is wrong, and what to do about it."""


def one_line(error):
    """What an exception says, short enough to be quoted in a UserError."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_scorer(name, where, device, cache_dir=None):
    """
    The scorer `name`, one of SCORERS with the weights `where` (None: those of the hub), or else the function that
    `where` names.

    Raises:
        UserError: saying what to do, if it cannot be loaded.
    """
    if name not in SCORERS:
        return FunctionScorer(name, load_function(where))
    try:
        return SCORERS[name](name, where, device, cache_dir)
    except Exception as error:  # of transformers, the hub and torch
        raise UserError(
            f"the weights of --scorer {name} cannot be loaded from {where or 'the hub'} ({one_line(error)}): give "
            f"their folder with --scorer {name}=FOLDER"
        ) from error


def load_function(where):
    """The function that module:function or path.py:function names. Raises UserError if it is not there."""
    module, _, name = where.rpartition(":")
    file = Path(module if module.endswith(".py") else f"{module}.py")
    sys.path.insert(0, str(file.resolve().parent))  # for what it imports from beside itself
    try:
        if module.endswith(".py") or file.is_file():  # by its path: a module of the same name may be loaded already
            spec = importlib.util.spec_from_file_location(f"scorer_of_{file.stem}", file)
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded  # where dataclasses look for their class's module
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        return getattr(loaded, name)
    except Exception as error:  # whatever a user's module raises
        raise UserError(f"{where} cannot be imported: {type(error).__name__}: {one_line(error)}") from error


def load_complete(kind, source, **options):
    """A model of transformers from its weights. Raises ValueError if some are missing, which would else be random."""
    model, loaded = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} first")
    return model


class FunctionScorer:
    """A scorer of the user's own."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __call__(self, pictures, prompts):
        values = self.function(pictures, prompts)
        if isinstance(values, dict):
            return {f"{self.name}/{key}": list(map(float, value)) for key, value in values.items()}
        return {self.name: list(map(float, values))}


class ClipScorer:
    """
    The cosine of prompt and picture under a CLIP model, times `scale` (None: the model's own temperature).

    letterbox: the picture is fitted in with black bars (see `fitted`), where CLIP itself crops the middle.
    floor: the least score.
    """

    def __init__(self, name, model, source, device, scale=None, letterbox=False, floor=-math.inf, cache_dir=None):
        self.name, self.model, self.device = name, model.eval().to(device), device
        self.tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
        self.processor = CLIPImageProcessorPil.from_pretrained(source, cache_dir=cache_dir)
        self.scale, self.letterbox, self.floor = scale, letterbox, floor

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        if self.letterbox:
            side, mean, std = self.processor.crop_size["height"], self.processor.image_mean, self.processor.image_std
            pixels = torch.stack([fitted(picture, side) for picture in pictures])
            pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        else:
            pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = self.model(**tokens.to(self.device), pixel_values=pixels.to(self.device))
        scale = self.model.logit_scale.exp() if self.scale is None else self.scale
        scores = scale * (output.image_embeds * output.text_embeds).sum(1)
        return {self.name: scores.clamp(min=self.floor).tolist()}


def fitted(picture, side):
    """
    A PIL picture as (3, side, side) in 0..1, fitted in with black bars.

    As HPSv2's own code does it: pixels become a tensor first, and that is resized, which today's torchvision does with
    antialiasing. The torchvision of its time did not, so that published numbers may differ.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
    size = [round(extent * side / max(picture.size)) for extent in pixels.shape[1:]]
    if size != list(pixels.shape[1:]):
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    top, left = ((side - extent) // 2 for extent in size)
    return F.pad(pixels, (left, side - size[1] - left, top, side - size[0] - top))


HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model that PickScore and HPSv2 were trained from


def beside(weights, mark, default):
    """The folder of local weights, where it also holds the file `mark`; else `default`."""
    folder = Path(weights or "") if Path(weights or "").is_dir() else Path(weights or "").parent
    return str(folder) if weights and (folder / mark).is_file() else default


def load_clip(name, weights, device, cache_dir):
    """PickScore and the CLIP score, whose weights are transformers' own."""
    default, processor, options = {
        "pickscore": ("yuvalkirstain/PickScore_v1", CLIP_H, {}),
        "clip": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", dict(scale=100, floor=0)),
    }[name]
    model = load_complete(CLIPModel, weights or default, cache_dir=cache_dir)
    source = beside(weights, "preprocessor_config.json", processor)
    return ClipScorer(name, model, source, device, cache_dir=cache_dir, **options)


def load_hps(name, weights, device, cache_dir):
    """
    HPSv2 or v2.1 from their authors' files, which open_clip wrote, in transformers' CLIPModel.

    `weights`: that file, or a folder with it. Where the folder also holds the model's configuration, its tokenizer and
    its preprocessing, they are taken from there.
    """
    file = HPS_FILES[name]
    if weights is None:
        path = huggingface_hub.hf_hub_download("xswu/HPSv2", file, cache_dir=cache_dir)
    else:
        path = Path(weights, file) if Path(weights).is_dir() else Path(weights)
    source = beside(weights, "config.json", CLIP_H)
    model = CLIPModel(CLIPConfig.from_pretrained(source, cache_dir=cache_dir))
    model.load_state_dict(from_open_clip(load_tensors(path)))
    return ClipScorer(name, model, source, device, scale=100, letterbox=True, cache_dir=cache_dir)


def load_tensors(path):
    """The tensors of a .safetensors file, or of a .pt file that holds nothing else."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved.get("state_dict", saved)


def rename(weights, rules):
    """A state dict whose names went through `rules`, pairs of a regular expression and what takes its place."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


OPEN_CLIP_RULES = [
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(1|2)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
]


def from_open_clip(weights):
    """The state dict of transformers' CLIPModel from that of open_clip's CLIP."""
    converted = {}
    for name, weight in rename(weights, OPEN_CLIP_RULES).items():
        if name.endswith("_projection.weight"):
            weight = weight.T.contiguous()
        if ".in_proj_" in name:
            for letter, part in zip("qkv", weight.chunk(3)):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        elif name != "attn_mask":
            converted[name] = weight
    return converted


def scoring_head(width):
    """The layers that the aesthetic predictor and ImageReward end with. Dropout is inactive when scoring."""
    widths = [width, 1024, 128, 64, 16, 1]
    layers = []
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        layers += [torch.nn.Linear(before, after)] + ([torch.nn.Dropout(0.2)] if i < 3 else [])
    return torch.nn.Sequential(*layers)


class AestheticPredictor(CLIPVisionModelWithProjection):
    """CLIP's picture encoder with a head that tells how much people like a picture. In transformers' layout."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = scoring_head(config.projection_dim)
        self.post_init()


class AestheticScorer:
    """LAION's aesthetic predictor v2 (github.com/christophschuhmann/improved-aesthetic-predictor)."""

    def __init__(self, name, weights, device, cache_dir):
        source = weights or "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
        config = CLIPVisionConfig.from_pretrained(source, cache_dir=cache_dir)
        self.model = load_complete(AestheticPredictor, source, config=config, cache_dir=cache_dir).eval().to(device)
        self.name, self.processor = name, CLIPImageProcessorPil.from_pretrained(source, cache_dir=cache_dir)

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        embeds = self.model(pixel_values=pixels.to(self.model.device)).image_embeds
        return {self.name: self.model.layers(F.normalize(embeds)).squeeze(1).tolist()}


BLIP_VISION_RULES = [
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(1|2)\.", r".layer_norm\1."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
]


class ImageRewardScorer:
    """
    ImageReward v1.0 from its authors' file, in transformers' BLIP: the text encoder looks at the picture through its
    cross-attention, and a head on its first token gives the reward, less its mean and over its deviation.
    """

    MEAN, STD, TOKENS, HEAD_WIDTH = 0.16717362830052426, 1.0333394966054072, 35, 64

    def __init__(self, name, weights, device, cache_dir):
        if weights is None:
            path = huggingface_hub.hf_hub_download("zai-org/ImageReward", "ImageReward.pt", cache_dir=cache_dir)
        else:
            path = Path(weights, "ImageReward.pt") if Path(weights).is_dir() else Path(weights)
        tokenizer = beside(weights, "tokenizer_config.json", "google-bert/bert-base-uncased")
        self.name, self.device = name, device
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, cache_dir=cache_dir)
        tensors = load_tensors(path)
        self.vision = self.vision_model(part_of(tensors, "blip.visual_encoder.")).eval().to(device)
        self.text = self.text_model(part_of(tensors, "blip.text_encoder."), self.vision.config).eval().to(device)
        self.head = scoring_head(self.text.config.hidden_size).eval().to(device)
        self.head.load_state_dict(part_of(tensors, "mlp.layers."))
        side = self.vision.config.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def vision_model(self, weights):
        weights = rename(weights, BLIP_VISION_RULES)
        patches, width = weights["embeddings.position_embedding"].shape[1:]
        patch = weights["embeddings.patch_embedding.weight"].shape[-1]
        config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=count_layers(weights, "encoder.layers"),
            num_attention_heads=width // self.HEAD_WIDTH,
            patch_size=patch,
            image_size=patch * math.isqrt(patches - 1),
            layer_norm_eps=1e-6,
        )
        model = BlipVisionModel(config)
        model.load_state_dict(weights)
        return model

    def text_model(self, weights, vision):
        words, width = weights["embeddings.word_embeddings.weight"].shape
        config = BlipTextConfig(
            vocab_size=words,
            hidden_size=width,
            encoder_hidden_size=vision.hidden_size,
            intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=count_layers(weights, "encoder.layer"),
            num_attention_heads=width // self.HEAD_WIDTH,
            max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
            bos_token_id=None,
            sep_token_id=None,
        )
        model = BlipTextModel(config, add_pooling_layer=False)
        weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: the model makes them itself
        model.load_state_dict(weights)
        return model

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        seen = self.vision(pixel_values=pixels.to(self.device)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        reward = self.head(read[:, 0]).squeeze(1)
        return {self.name: ((reward - self.MEAN) / self.STD).tolist()}


def part_of(weights, prefix):
    """Those of `weights` whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def count_layers(weights, prefix):
    """How many layers called prefix.N there are."""
    return 1 + max(int(name.split(".")[prefix.count(".") + 1]) for name in weights if name.startswith(f"{prefix}."))


SCORERS = {
    "pickscore": load_clip,
    "hpsv2": load_hps,
    "hpsv2.1": load_hps,
    "imagereward": ImageRewardScorer,
    "aesthetic": AestheticScorer,
    "clip": load_clip,
}
