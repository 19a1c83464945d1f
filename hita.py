"""Hita, the holistic tokenizer for autoregressive image generation (ICCV 2025, arXiv 2507.02358), in one file.

Most image tokenizers cut a picture into patches and give each patch a code. Hita adds M *global* (holistic) tokens that
describe the picture as a whole, puts them first, and lets k of them take the place of patches in decoding:

    image (B, 3, H, W)
      Encoder                 conv VQGAN, stride f                        -> (B, D, h, w), N = h*w patch embeddings
      DINOv2                  frozen ViT, sees the image at 224 px        -> (B, 257, 1024)
      QueryExtractor          [M queries; DINOv2; N patches] bidirectional,
                              then [M queries; N patches] causal          -> (B, M, D), (B, N, D)
      VectorQuantizer, twice  global and patch codebook, V codes each     -> ids (B, M), (B, N)
      Fusion                  [M global; N patch] causal, then the window
                              of N states that starts k positions early   -> (B, D, h, w)
      Decoder                 conv VQGAN                                  -> (B, 3, H, W)

    class -> Llama -> M global ids -> N patch ids -> Fusion, Decoder -> a new picture

The file reads top to bottom in that order, then losses, measures, the Llama, checkpoints, runs, and what the scripts share.

Letters in shape comments: B batch, H W pixels, h w patch grid, N = h*w patch tokens, M global tokens, D latent width,
C code width (12 global, 8 patch), V codebook size, T sequence length, k global tokens that replace patches.
Images are float tensors (B, 3, H, W) in [-1, 1]; token ids are int64.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid
from tqdm import tqdm


class HitaError(ValueError):
    """A mistake that a user can make and mend. The scripts print it as one line and exit with status 2."""


def check(condition: bool, message: str) -> None:
    """Raise HitaError(message) unless the condition holds."""
    if not condition:
        raise HitaError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: the dataclasses are the one source of every setting; the scripts make their flags from the fields.
# ---------------------------------------------------------------------------------------------------------------------

def option(default, help: str, low: float = 1, high: float = 65536):
    """A dataclass field with a default, the text that `--help` shows for it and, for numbers, the range it must lie in."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Settings:
    """Base of all configurations. Raises HitaError where a field has another type than its default (settings also come from
    files) or is out of its range."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind, low, high = getattr(self, f.name), type(f.default), f.metadata["low"], f.metadata["high"]
            numbers = value if kind is tuple and isinstance(value, tuple) else (value,)
            plain = {tuple: int, float: (int, float)}.get(kind, kind)
            check(len(numbers) > 0 and all(isinstance(x, plain) and isinstance(x, bool) == (kind is bool) for x in numbers),
                  f"{f.name} is {value!r}, it must be of the kind of {f.default!r}")
            check(kind in (bool, str) or all(low <= x <= high for x in numbers),
                  f"{f.name} is {value}, it must lie between {low} and {high}")


@dataclass
class TokenizerConfig(Settings):
    """Architecture of the tokenizer. The defaults are the released Hita-V: 104.2 M parameters without DINOv2."""
    image_size: int = option(336, "side of the square training images in pixels", 11, 8192)
    channels: int = option(128, "channels of the conv nets at full resolution")
    channel_mult: tuple = option((1, 1, 2, 2, 4), "channel multiplier of each level; each further level halves the resolution")
    res_blocks: int = option(2, "residual blocks per encoder level (the decoder has one more)", high=64)
    latent_dim: int = option(512, "width D of patch embeddings, queries and transformers")
    layers: int = option(3, "transformer layers in each of the three stages", high=1024)
    heads: int = option(8, "attention heads of the transformers")
    dropout: float = option(0.1, "dropout in the transformers' attention", 0, 0.99)
    num_global: int = option(128, "number M of global tokens; 0 is the paper's baseline, a plain VQGAN", 0)
    codebook_size: int = option(16384, "codes V in each of the two codebooks", high=2 ** 24)
    global_code_dim: int = option(12, "width of a global code")
    patch_code_dim: int = option(8, "width of a patch code")
    beta: float = option(0.25, "weight of the commitment term", 0)
    revive_codes: bool = option(False, "move codes that are hardly used onto encoder outputs (for small data)")
    k: int = option(4, "global tokens that stand where the first k patch tokens would; 0 lets the globals be ignored", 0)
    dino: str = option("vit_large_patch14_reg4_dinov2.lvd142m", "timm name of the frozen DINOv2, or 'none'")
    dino_dim: int = option(1024, "feature width of the DINOv2")
    vfm_recon: bool = option(False, "Hita-U: reconstruct the DINOv2 features from the global tokens while training")

    def __post_init__(self):
        if isinstance(self.channel_mult, list):
            self.channel_mult = tuple(self.channel_mult)
        super().__post_init__()
        check(self.image_size % self.stride == 0,
              f"image_size {self.image_size} is not a multiple of the stride {self.stride}; "
              f"the nearest sizes that are: {max(1, self.grid) * self.stride}, {(self.grid + 1) * self.stride}")
        check(self.channels % 4 == 0, f"channels is {self.channels}, it must be a multiple of 4 (group norm)")
        check(self.latent_dim % self.heads == 0, f"latent_dim {self.latent_dim} is not divisible by {self.heads} heads")
        check(self.k <= self.num_global, f"k is {self.k}, it must not exceed num_global = {self.num_global}")
        check(not self.vfm_recon or self.uses_dino and self.num_global > 0, "vfm_recon needs DINOv2 and global tokens")

    @property
    def stride(self) -> int:
        """Pixels per patch side, f."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> int:
        """Patches per side at the training size."""
        return self.image_size // self.stride

    @property
    def uses_dino(self) -> bool:
        """Whether encoding needs the frozen DINOv2 (it never does without global tokens)."""
        return self.dino != "none" and self.num_global > 0


@dataclass
class LlamaConfig(Settings):
    """Architecture of the generator. The defaults are size B at 336 px: 136.2 M parameters."""
    layers: int = option(12, "transformer blocks", high=1024)
    heads: int = option(12, "attention heads")
    dim: int = option(768, "width of the residual stream")
    dropout: float = option(0.1, "dropout after attention and feed-forward", 0, 0.99)
    token_dropout: float = option(0.1, "dropout on the embedded sequence", 0, 0.99)
    class_dropout: float = option(0.1, "probability that a class label is dropped, for classifier-free guidance", 0, 0.99)
    num_classes: int = option(1000, "number of classes", high=2 ** 20)
    num_global: int = option(128, "number M of global tokens", 0)
    grid: int = option(21, "patch tokens per side; N = grid * grid", high=512)
    codebook_size: int = option(16384, "codes V in each codebook", high=2 ** 24)
    released_sampling: bool = option(False, "look up the last global token in the patch table while sampling, as the released "
                                            "code does by mistake and the published FIDs presumably were measured")

    def __post_init__(self):
        super().__post_init__()
        check(self.dim % self.heads == 0 and self.dim // self.heads % 4 == 0,
              f"dim {self.dim} over {self.heads} heads gives {self.dim / self.heads:g} channels a head, "
              "it must be a multiple of 4 (2-D RoPE)")

    @property
    def num_patches(self) -> int:
        """Patch tokens N of a picture."""
        return self.grid ** 2


TOKENIZERS = {
    "hita-v": TokenizerConfig(),
    "hita-u": TokenizerConfig(vfm_recon=True),
    "emoji": TokenizerConfig(image_size=64, channels=16, channel_mult=(1, 2, 4, 8), res_blocks=1, latent_dim=128, layers=2,
                             heads=4, dropout=0.0, num_global=16, codebook_size=512, k=8, revive_codes=True, dino="none"),
}

LLAMA_SIZES = {  # the paper's names; in brackets its nominal size and the true number of parameters
    "B": dict(layers=12, heads=12, dim=768),      # (111M, 136.2M)
    "L": dict(layers=24, heads=16, dim=1024),     # (343M, 376.6M)
    "XL": dict(layers=36, heads=20, dim=1280),    # (775M, 816.8M)
    "XXL": dict(layers=48, heads=24, dim=1536),   # (1.4B, 1461.5M)
    "2B": dict(layers=48, heads=32, dim=1920),    # (2.0B, 2251.5M)
    "emoji": dict(layers=4, heads=4, dim=128, dropout=0.0, token_dropout=0.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# Convolutional encoder and decoder (VQGAN, Esser et al. 2021)
# ---------------------------------------------------------------------------------------------------------------------

def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, fewer for the thin nets of small presets."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, silu, conv, norm, silu, conv, plus the input. (B, c_in, H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


class AttnBlock(nn.Module):
    """Single-head attention over all pixels, plus the input. (B, c, H, W) -> (B, c, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, HW, c)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)      # (B, c, H, W)
        return x + self.out(y)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if asked for, then a change of resolution."""
    recompute = False  # True saves memory: what happens inside is computed again in the backward pass

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        """What forward does, once or, to save memory, twice."""
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)


def downsample(c: int) -> nn.Module:
    """Halve the resolution: zeros on the right and below only, then a 3x3 convolution with stride 2."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))


def upsample(c: int) -> nn.Module:
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(c, c, 3, padding=1))


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> patch embeddings (B, D, H/f, W/f)."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_mult]     # highest resolution first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1)
        self.levels = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], c, cfg.res_blocks, i == last, downsample(c) if i < last else nn.Identity())
            for i, c in enumerate(widths)))
        self.mid = nn.Sequential(ResBlock(c := widths[-1], c), AttnBlock(c), ResBlock(c, c))
        self.norm_out, self.conv_out = group_norm(c), nn.Conv2d(c, cfg.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.levels(self.conv_in(x)))                # (B, c, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))            # (B, D, h, w)


class Decoder(nn.Module):
    """Fused states (B, D, h, w) -> image (B, 3, h*f, w*f), no output activation."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_mult][::-1]  # lowest resolution first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(cfg.latent_dim, c := widths[0], 3, padding=1)
        self.mid = nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))
        self.levels = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], c, cfg.res_blocks + 1, i == 0, upsample(c) if i < last else nn.Identity())
            for i, c in enumerate(widths)))
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels(self.mid(self.conv_in(x)))                # (B, c, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))            # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# DINOv2 (Oquab et al. 2023): frozen semantic features for the queries to read
# ---------------------------------------------------------------------------------------------------------------------

def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a PyTorch file, which may hold nothing but tensors."""
    if Path(file).suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


class DINOv2(nn.Module):
    """Frozen ViT. Images (B, 3, H, W) in [-1, 1] -> normalised cls and patch tokens (B, 257, dim), registers dropped.

    name: a timm model; file: its weights (the original .pth or timm's safetensors, which give the same function), None to
    fetch them from the Hub; pretrained=False keeps random weights (for tests and timing). HitaError if there are none.
    """
    SIZE = 224  # the ViT always sees 224 px: 16 x 16 patches of 14 px

    def __init__(self, name: str = TokenizerConfig.dino, file: str | None = None, pretrained: bool = True):
        super().__init__()
        import timm  # slow to import, and decoding does without it
        check(file is None or os.path.isfile(file), f"there is no DINOv2 weights file {file}")
        check(timm.is_model(name), f"timm has no model {name}")
        if file is None and pretrained:
            file, = fetch(name, otherwise="pass the original dinov2_vitl14_reg4_pretrain.pth with --dino-file (with --features for --fd)")
        try:
            overlay = dict(pretrained_cfg_overlay=dict(state_dict=read_tensors(file))) if file else {}
            self.vit = timm.create_model(name, pretrained=file is not None, img_size=self.SIZE, num_classes=0, **overlay)
        except Exception as e:  # timm, torch and safetensors raise many kinds; the file is of no use in either case
            raise HitaError(f"{file} does not hold the weights of {name} ({short(e)})") from e
        self.eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, 224, 224), normalised for the ViT; blurred first where it shrinks."""
        factors = [side / self.SIZE for side in images.shape[-2:]]
        if max(factors) > 1:
            sigmas = [max((f - 1) / 2, 0.001) for f in factors]
            sizes = [int(max(4 * s, 3)) // 2 * 2 + 1 for s in sigmas]  # the next odd number
            images = TF.gaussian_blur(images, sizes[::-1], sigmas[::-1])  # torchvision wants x before y
        # align_corners=True because the released weights were trained with it
        images = F.interpolate(images, (self.SIZE, self.SIZE), mode="bicubic", align_corners=True).clamp(-1, 1)
        mean, std = (images.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return ((images + 1) / 2 - mean) / std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(self.preprocess(images))                         # (B, 1 + 4 + 256, dim)
        return torch.cat([tokens[:, :1], tokens[:, self.vit.num_prefix_tokens:]], dim=1)    # (B, 257, dim)

    def train(self, mode: bool = True) -> "DINOv2":
        """Frozen: stays in eval mode."""
        return super().train(False)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer layer of the tokenizer
# ---------------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention (B, T, D) -> (B, T, D), in the two kinds that the released model mixes: the bidirectional one
    has no bias on q, k, v and drops its output; the causal one has biases and drops attention probabilities."""

    def __init__(self, dim: int, heads: int, causal: bool, dropout: float):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=causal) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, heads, T, d)
        drop = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None,
                                           dropout_p=drop if self.causal else 0.0)
        x = self.out(x.transpose(1, 2).flatten(2))                                                          # (B, T, D)
        return x if self.causal else F.dropout(x, drop)


class SwiGLU(nn.Module):
    """w3(silu(u) * v) with u, v the halves of w12(x). (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(u) * v)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual. (B, T, D) -> (B, T, D)"""

    def __init__(self, cfg: TokenizerConfig, causal: bool):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(cfg.latent_dim), Attention(cfg.latent_dim, cfg.heads, causal, cfg.dropout)
        self.norm2, self.ffn = nn.LayerNorm(cfg.latent_dim), SwiGLU(cfg.latent_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


def table(length: int, dim: int) -> nn.Parameter:
    """A learned table (1, length, dim) of queries or positions."""
    return nn.Parameter(torch.randn(1, length, dim) * dim ** -0.5)


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """Position table (1, G*G, D) of a G x G grid -> (1, h*w, D), bicubic where the grid differs.

    The 0.1 shifts the sampling step a little, as in DINO; the released model was evaluated with it.
    """
    side = math.isqrt(positions.shape[1])
    if (h, w) == (side, side):
        return positions
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)                                         # (1, D, G, G)
    grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")           # (1, D, h, w)
    return grid.flatten(2).transpose(1, 2)                                                                  # (1, h*w, D)


# ---------------------------------------------------------------------------------------------------------------------
# Causal query extractor: M learnable queries gather what is global
# ---------------------------------------------------------------------------------------------------------------------

class QueryExtractor(nn.Module):
    """Patch embeddings (B, D, h, w) and DINOv2 tokens (B, 257, dino_dim) or None -> queries (B, M, D), patches (B, N, D)."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D = cfg.latent_dim
        self.queries = table(cfg.num_global, D)
        self.positions = table(cfg.grid ** 2, D)
        self.dino_proj = nn.Sequential(nn.Linear(cfg.dino_dim, D, bias=False), nn.LayerNorm(D), nn.ReLU(),
                                       nn.Linear(D, D, bias=False), nn.LayerNorm(D)) if cfg.uses_dino else None
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.bidirectional = nn.Sequential(*(Layer(cfg, causal=False) for _ in range(cfg.layers)))
        self.causal = nn.Sequential(*(Layer(cfg, causal=True) for _ in range(cfg.layers)))

    def forward(self, patches: Tensor, dino_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        B, _, h, w = patches.shape
        M = self.queries.shape[1]
        patches = patches.flatten(2).transpose(1, 2) + resize_positions(self.positions, h, w)   # (B, N, D)
        parts = [self.queries.expand(B, -1, -1), patches]
        if self.dino_proj is not None:
            parts.insert(1, self.dino_proj(dino_tokens))                                        # (B, 257, D)
        x = self.bidirectional(self.norm1(torch.cat(parts, dim=1)))                             # (B, M + 257 + N, D)
        x = torch.cat([x[:, :M], x[:, -h * w:]], dim=1)                                         # (B, M + N, D)
        x = self.causal(self.norm2(x))
        return x[:, :M], x[:, M:]                                                               # (B, M, D), (B, N, D)


# ---------------------------------------------------------------------------------------------------------------------
# Vector quantizer, used twice: once for global, once for patch tokens
# ---------------------------------------------------------------------------------------------------------------------

class VectorQuantizer(nn.Module):
    """Nearest code on the unit sphere (van den Oord et al. 2017; l2-normalised as in ViT-VQGAN, Yu et al. 2022).

    forward: z (B, T, C) -> (codes (B, T, C), ids (B, T), loss); the codes carry the gradient straight through to z.
    loss = mean (code - sg[z])^2 + beta * mean (sg[code] - z)^2, both sides normalised: the first term moves the codes to
    the encoder's outputs, the second, weighted by beta, keeps the encoder's outputs near their codes.
    `revive` moves codes that are hardly used onto encoder outputs while training; it also starts the codebook from data,
    since at the first step no code has been used.
    """
    MEMORY = 0.97     # share of a code's hits that is remembered from step to step
    DEAD = 0.1        # remembered hits below which a code is moved

    def __init__(self, size: int, dim: int, beta: float = 0.25, revive: bool = False):
        super().__init__()
        self.beta, self.revive = beta, revive
        self.codebook = nn.Parameter(F.normalize(torch.empty(size, dim).uniform_(-1 / size, 1 / size), dim=-1))  # (V, C)
        if revive:
            self.register_buffer("hits", torch.zeros(size))                         # (V,), remembered hits of each code

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):  # in bf16 one id in twenty would differ
            z = F.normalize(z.float(), dim=-1)                                      # (B, T, C)
            if self.revive and self.training:
                self.revive_dead_codes(z.detach().flatten(0, 1))
            codebook = F.normalize(self.codebook.float(), dim=-1)                   # (V, C)
            ids = (z @ codebook.T).argmax(dim=-1)                                   # (B, T); nearest = largest cosine
            if self.revive and self.training:
                self.hits += all_sum(count_ids(ids, len(self.hits)))
            codes = codebook[ids]                                                   # (B, T, C)
            loss = F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(codes.detach(), z)
            return z + (codes - z).detach(), ids, loss

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> normalised codes (B, T, C). Raises HitaError for an id outside the codebook."""
        if ids.numel():
            low, high, last = int(ids.min()), int(ids.max()), len(self.codebook) - 1
            check(0 <= low and high <= last, f"token ids must lie between 0 and {last}, these reach from {low} to {high}")
        return F.normalize(self.codebook.float(), dim=-1)[ids]

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor) -> None:
        """Put each hardly used code onto a random one of the encoder outputs z (B*T, C); the same in every process."""
        self.hits *= self.MEMORY
        z = all_gather(z)
        drawn = z[from_first(torch.randint(len(z), self.hits.shape, device=z.device))]  # (V, C); no host sync: all V are drawn
        dead = (self.hits < self.DEAD) & drawn.isfinite().all(dim=1)                # (V,); a diverged step moves nothing
        self.codebook.copy_(torch.where(dead[:, None], drawn, self.codebook))
        self.hits.masked_fill_(dead, 1.0)


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each of the ids 0 .. size-1 occurs in a tensor of any shape -> (size,); unlike bincount without a host sync."""
    ids = ids.flatten()
    return torch.zeros(size, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))


def usage_and_perplexity(hits: Tensor) -> tuple[float, float]:
    """How often each code was used (V,) -> share of the codes in use, and exp(entropy) of their distribution."""
    hits = hits.cpu().double()  # on the CPU because MPS has no float64
    p = hits / hits.sum().clamp(min=1)
    return (hits > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


# ---------------------------------------------------------------------------------------------------------------------
# Fusion with k-replacement
# ---------------------------------------------------------------------------------------------------------------------

class Fusion(nn.Module):
    """Global codes (B, M, D) and patch codes (B, N, D) -> fused states (B, N, D), one for each cell of the patch grid.

    A causal transformer reads [global; patch]. Cell i is its state at position M - k + i: the last k global tokens stand
    where the first k patch tokens would, and every cell sees all global tokens but only the patch tokens up to i - k.
    With k = 0 cell i sees its own patch code and nothing forces the global tokens to carry information: the paper finds that
    they collapse.
    """

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D = cfg.latent_dim
        self.k = cfg.k
        self.global_positions, self.positions = table(cfg.num_global, D), table(cfg.grid ** 2, D)
        self.norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(Layer(cfg, causal=True) for _ in range(cfg.layers))
        if cfg.vfm_recon:
            self.mask_token, self.vfm_norm, self.vfm_proj = table(1, D), nn.LayerNorm(D), nn.Linear(D, cfg.dino_dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, globals_: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        M, N = globals_.shape[1], patches.shape[1]
        x = self.norm(torch.cat([globals_ + self.global_positions,
                                 patches + resize_positions(self.positions, *grid)], dim=1))    # (B, M + N, D)
        for layer in self.layers:
            x = layer(x)
        return x[:, M - self.k: M - self.k + N]                                                 # (B, N, D)

    def reconstruct_features(self, globals_: Tensor, grid: int = 16) -> Tensor:
        """Hita-U: global codes (B, M, D) -> DINOv2 patch features (B, 256, dino_dim), through the same layers.

        The globals come without their positions, as in the released model: causal among themselves and blind to the 256
        mask tokens, which see everything.
        """
        B, M, _ = globals_.shape
        masks = (self.mask_token + resize_positions(self.positions, grid, grid)).expand(B, -1, -1)  # (B, 256, D)
        T = M + grid ** 2
        sees = torch.ones(T, T, dtype=torch.bool, device=globals_.device).tril()                # (query, key)
        sees[M:] = True
        x = self.vfm_norm(torch.cat([globals_, masks], dim=1))                                  # (B, M + 256, D)
        for layer in self.layers:
            x = layer(x, sees)
        return self.vfm_proj(x[:, M:])                                                          # (B, 256, dino_dim)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class TokenizerOutput:
    """What the training forward returns: recon (B, 3, H, W), differentiable scalars, and the ids."""
    recon: Tensor
    codebook_loss: Tensor     # codebook + commitment term, both codebooks
    feature_loss: Tensor | None  # Hita-U while training: 1 - cosine to the DINOv2 features
    global_ids: Tensor        # (B, M)
    patch_ids: Tensor         # (B, N)


class HitaTokenizer(nn.Module):
    """Images <-> M global and N patch token ids. With num_global = 0 it is a plain VQGAN.

    Encoding needs `tokenizer.dino` where the configuration names a DINOv2: `tokenizer.dino = DINOv2()`. Decoding does not.
    """

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        self.dino = None
        self.encoder = Encoder(cfg)
        self.patch_down = nn.Linear(cfg.latent_dim, cfg.patch_code_dim)
        self.patch_quantizer = VectorQuantizer(cfg.codebook_size, cfg.patch_code_dim, cfg.beta, cfg.revive_codes)
        self.patch_up = nn.Linear(cfg.patch_code_dim, cfg.latent_dim)
        if cfg.num_global:
            self.extractor = QueryExtractor(cfg)
            self.global_down = nn.Linear(cfg.latent_dim, cfg.global_code_dim)
            self.global_quantizer = VectorQuantizer(cfg.codebook_size, cfg.global_code_dim, cfg.beta, cfg.revive_codes)
            self.global_up = nn.Linear(cfg.global_code_dim, cfg.latent_dim)
            self.fusion = Fusion(cfg)
        self.decoder = Decoder(cfg)

    def __setattr__(self, name: str, value) -> None:
        """`dino` is kept out of the registered modules: it is frozen, so no optimizer, EMA, DDP or checkpoint may see it."""
        if name == "dino":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def dino_tokens(self, images: Tensor) -> Tensor | None:
        """Frozen features (B, 257, dino_dim), None where the configuration does without. HitaError if DINOv2 is missing."""
        if not self.cfg.uses_dino:
            return None
        check(self.dino is not None, f"this tokenizer reads images through {self.cfg.dino}: "
                                     "give load_tokenizer(path, dino=...) a timm name or a weights file")
        return self.dino.to(images.device)(images)

    def embed(self, images: Tensor, dino_tokens: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Images (B, 3, H, W) -> what is quantized: global (B, M, C) or None, patch (B, N, C)."""
        f = self.cfg.stride
        check(images.dim() == 4 and images.shape[1] == 3, f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
        check(images.shape[2] % f == 0 and images.shape[3] % f == 0,
              f"images of {images.shape[2]} x {images.shape[3]} pixels: both sides must be multiples of the stride {f}")
        patches = self.encoder(images)                                      # (B, D, h, w)
        if not self.cfg.num_global:
            return None, self.patch_down(patches.flatten(2).transpose(1, 2))
        queries, patches = self.extractor(patches, dino_tokens)             # (B, M, D), (B, N, D)
        return self.global_down(queries), self.patch_down(patches)

    def render(self, global_codes: Tensor | None, patch_codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Quantized codes -> images (B, 3, H, W)."""
        x = self.patch_up(patch_codes)                                      # (B, N, D)
        if self.cfg.num_global:
            x = self.fusion(self.global_up(global_codes), x, grid)          # (B, N, D)
        return self.decoder(x.transpose(1, 2).unflatten(2, grid))           # (B, 3, H, W)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> global ids (B, M), patch ids (B, N) row by row, both int64."""
        global_z, patch_z = self.embed(images, self.dino_tokens(images))
        _, patch_ids, _ = self.patch_quantizer(patch_z)
        if global_z is None:
            return patch_ids.new_empty(len(images), 0), patch_ids
        return self.global_quantizer(global_z)[1], patch_ids

    @torch.no_grad()
    def decode(self, global_ids: Tensor, patch_ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Global ids (B, M), patch ids (B, N) -> images (B, 3, H, W), about [-1, 1] but not clamped.

        grid: patch rows and columns, square unless given. Raises HitaError where the shapes or ids do not fit.
        """
        N, M = patch_ids.shape[1], self.cfg.num_global
        grid = grid or (math.isqrt(N),) * 2
        check(global_ids.shape == (len(patch_ids), M),
              f"global ids have shape {tuple(global_ids.shape)}, this tokenizer needs ({len(patch_ids)}, {M})")
        check(grid[0] * grid[1] == N, f"{N} patch ids do not fill a grid of {grid[0]} x {grid[1]}")
        global_codes = self.global_quantizer.lookup(global_ids) if M else None
        return self.render(global_codes, self.patch_quantizer.lookup(patch_ids), grid)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Training forward: straight-through codes, so that the loss reaches the encoder."""
        dino_tokens = self.dino_tokens(images)
        global_z, patch_z = self.embed(images, dino_tokens)
        patch_codes, patch_ids, codebook_loss = self.patch_quantizer(patch_z)
        global_codes, global_ids, feature_loss = None, patch_ids.new_empty(len(images), 0), None
        if self.cfg.num_global:
            global_codes, global_ids, global_loss = self.global_quantizer(global_z)
            codebook_loss = codebook_loss + global_loss
        if self.cfg.vfm_recon and self.training:
            features = self.fusion.reconstruct_features(self.global_up(global_codes))           # (B, 256, dino_dim)
            feature_loss = 1 - F.cosine_similarity(dino_tokens[:, 1:].float(), features.float(), dim=-1, eps=1e-6).mean()
        f = self.cfg.stride
        recon = self.render(global_codes, patch_codes, (images.shape[2] // f, images.shape[3] // f))
        return TokenizerOutput(recon, codebook_loss, feature_loss, global_ids, patch_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) -> one logit per overlapping patch (B, 1, h', w')."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for m in self.main:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017) of the discriminator's logits for real and reconstructed images."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adversarial_loss(fake: Tensor) -> Tensor:
    """Non-saturating softplus(-D(recon)): what the generator minimises."""
    return F.softplus(-fake.float()).mean()


def reconstruction_loss(images: Tensor, recon: Tensor) -> Tensor:
    """Twice the mean squared error: the released recipe adds it once as L2 and once more by default."""
    return 2 * F.mse_loss(recon.float(), images)


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) on VGG-16, frozen and in eval mode: images, recon (B, 3, H, W) -> scalar.

    Raises HitaError if the VGG weights cannot be had.
    """

    def __init__(self, pretrained: bool = True):
        super().__init__()
        import lpips  # slow to import, and needed for training only
        # the package takes the root of a sum of squares that can be 0, where its gradient is not a number
        lpips.normalize_tensor = lambda x: x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-20)
        try:
            warnings.filterwarnings("ignore", module="torchvision")  # lpips calls it in an old way
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
        except Exception as e:  # torchvision's download raises many kinds; the remedy is the same
            raise HitaError(f"LPIPS: cannot load the VGG-16 weights ({short(e)}); download "
                            "https://download.pytorch.org/models/vgg16-397923af.pth into "
                            f"{torch.hub.get_dir()}/checkpoints/, or train with --lpips-weight 0") from e
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        return self.lpips(images, recon).mean()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in eval mode: LPIPS has dropout, which belongs to its own training."""
        return super().train(False)


# ---------------------------------------------------------------------------------------------------------------------
# Measures of reconstructions (PSNR, SSIM), of sets of samples (Fréchet distance) and of tokens (linear probe)
# ---------------------------------------------------------------------------------------------------------------------

def psnr(images: Tensor, recon: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = (images - recon.clamp(-1, 1)).float().square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


def ssim(images: Tensor, recon: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each picture, (B, 3, H, W) in [-1, 1] -> (B,), so with a data range of 2.
    Each channel by itself, in a Gaussian window of 11 pixels with sigma 1.5, wherever it fits; sides of 11 pixels or more."""
    window = torch.exp(-torch.arange(-5, 6, device=images.device) ** 2 / (2 * 1.5 ** 2))
    window = (window[:, None] * window / window.sum() ** 2).expand(3, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=3)
    x, y = images.float(), recon.float().clamp(-1, 1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx ** 2, mean(y * y) - my ** 2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).flatten(1).mean(dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to features (n, D) and (m, D), as in FID (Heusel et al. 2017):
    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2).

    With C = R^T R, where R comes from a QR decomposition of the centred features, the last trace is the sum of the singular
    values of R_a R_b^T: exact where C has not full rank, too. Raises HitaError for fewer than two pictures.
    """
    check(min(len(a), len(b)) >= 2, f"a Fréchet distance of {len(a)} and {len(b)} pictures: at least two are needed of each")
    a, b = a.double().cpu(), b.double().cpu()
    roots = [torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + sum(r.square().sum() for r in roots) - 2 * cross
    return max(0.0, distance.item())  # rounding can bring it below


@torch.enable_grad()
def linear_probe(x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor, classes: int, decay: float = 0.01) -> float:
    """Share of the pictures val_x (m, D) whose class val_y (m,) a linear classifier finds that was fitted to x (n, D), y (n,):
    logistic regression on standardised features, with the L2 penalty decay / 2 * |W|^2."""
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, val_x = (x - mean) / std, (val_x - mean) / std
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), y) + decay / 2 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (layer(val_x).argmax(dim=1) == val_y).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# The generator: a Llama (Touvron et al. 2023; for images Sun et al. 2024) over [class; M global; N patch]
# ---------------------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a weight."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def position_rotations(num_global: int, grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (M + N, head_dim / 2) by which the channel pairs of q and k turn at each input position.

    0 .. M-1 (class, globals): cos 1, sin 0, no rotation; these positions are learned. M+1+i (patch i): 2-D RoPE, half of
    the pairs by the row of the cell, half by its column. Position M (the last global token, where the first patch is
    predicted): cos = sin = 0, so q and k vanish there and its query attends to all positions alike. That is an accident
    of the released code, kept because the released weights were trained with it.
    """
    pairs = head_dim // 2
    theta = 10000.0 ** (-2 * torch.arange(pairs // 2) / pairs)                              # (pairs/2,)
    angle = torch.arange(grid)[:, None] * theta                                             # (grid, pairs/2)
    cells = torch.cat([angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)], dim=1)     # (N, pairs): row, column
    cos = torch.cat([torch.ones(num_global, pairs), torch.zeros(1, pairs), cells.cos()])
    sin = torch.cat([torch.zeros(num_global + 1, pairs), cells.sin()])
    return cos[:-1], sin[:-1]                                                               # the last patch is never an input


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, heads, T, d) by angles given as cos, sin (T, d/2); in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)                                  # (B, heads, T, d/2) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class Linear(nn.Linear):
    """Without bias. On CPUs, the few rows of a decoding step go through MKL up to four times faster in the other order."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = math.prod(x.shape[:-1])
        if rows > 32 or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        columns = (torch.cat([x, x]) if rows == 1 else x).flatten(0, -2).T                  # a single row is faster doubled
        return (self.weight @ columns)[:, :rows].T.contiguous().unflatten(0, x.shape[:-1])


class LlamaBlock(nn.Module):
    """Causal attention and SwiGLU, pre-norm with RMSNorm, no biases. (B, T, dim) -> (B, T, dim)"""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        dim, hidden = cfg.dim, (int(2 * 4 * cfg.dim / 3) + 255) // 256 * 256
        self.heads, self.dropout = cfg.heads, nn.Dropout(cfg.dropout)
        self.norm1, self.qkv, self.out = RMSNorm(dim), Linear(dim, 3 * dim), Linear(dim, dim)
        self.norm2, self.w1, self.w3, self.w2 = RMSNorm(dim), Linear(dim, hidden), Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor, place: tuple[Tensor, ...], cache: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """place: positions (T,) of the inputs in the sequence, and for each shift (T, dim), cos, sin (T, d/2).
        cache (2, B, heads, L', d): keys and values of the inputs before; those of x are added to it at their positions, and x
        attends to the first L as the mask (T, L) says. Without a cache the inputs attend to each other causally."""
        positions, shift, cos, sin = place
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        shift = shift.unflatten(-1, (self.heads, -1)).transpose(0, 1)                       # (heads, T, d)
        q, k = rotate(q + shift, cos, sin), rotate(k + shift, cos, sin)                     # (B, heads, T, d)
        if cache is not None:
            k, v = (part.index_copy_(2, positions, new)[:, :, :mask.shape[1]] for part, new in zip(cache, (k, v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.w2(F.silu(self.w1(y := self.norm2(x))) * self.w3(y)))


class Llama(nn.Module):
    """Predicts the M global ids, then the N patch ids of a class. With num_global = 0 it is a plain LlamaGen.

    The inputs are class, global_0 .. global_M-1, patch_0 .. patch_N-2: M + N positions, and position p predicts token p of
    global_0 .. global_M-1, patch_0 .. patch_N-1. Each kind of token has its own embedding table and its own head.
    """

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.cfg = cfg
        M, V, dim = cfg.num_global, cfg.codebook_size, cfg.dim
        self.class_embedding = nn.Embedding(cfg.num_classes + 1, dim)                       # the last row: no class
        self.patch_embedding, self.patch_head = nn.Embedding(V, dim), Linear(dim, V)
        if M:
            self.global_embedding, self.global_head = nn.Embedding(V, dim), Linear(dim, V)
            self.global_positions = nn.Embedding(M, dim)                                    # of inputs 0 .. M-1
        self.token_dropout = nn.Dropout(cfg.token_dropout)
        self.blocks = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(dim)
        cos, sin = position_rotations(M, cfg.grid, dim // cfg.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
        for head in self.heads():
            nn.init.zeros_(head.weight)

    def heads(self) -> list[nn.Linear]:
        """The output layers: global (if there are global tokens) and patch."""
        return [self.global_head, self.patch_head] if self.cfg.num_global else [self.patch_head]

    def embed(self, class_ids: Tensor, global_ids: Tensor, patch_ids: Tensor) -> Tensor:
        """Class ids (B,) and any numbers m, n of ids (B, m), (B, n) -> embeddings (B, 1 + m + n, dim)."""
        parts = [self.class_embedding(class_ids)[:, None], self.patch_embedding(patch_ids)]
        if self.cfg.num_global:
            parts.insert(1, self.global_embedding(global_ids))
        return torch.cat(parts, dim=1)

    def backbone(self, x: Tensor, positions: Tensor, caches: list[Tensor] | None = None, length: int = 0) -> Tensor:
        """Embedded inputs (B, T, dim) at their positions (T,) -> normalised states (B, T, dim).

        With caches (see LlamaBlock) they also attend to what stands there before them, within the first `length` positions.
        """
        shift = x.new_zeros(len(positions), x.shape[2])
        if self.cfg.num_global:
            shift = F.pad(self.global_positions.weight, (0, 0, 0, self.cfg.num_patches))[positions].type_as(x)  # 0 on patches
        place = positions, shift, self.cos[positions], self.sin[positions]
        mask = torch.arange(length, device=x.device) <= positions[:, None] if caches else None  # (T, length)
        for i, block in enumerate(self.blocks):
            x = block(x, place, caches[i] if caches else None, mask)
        return self.norm(x)

    def forward(self, class_ids: Tensor, global_ids: Tensor, patch_ids: Tensor) -> tuple[Tensor, Tensor]:
        """class ids (B,), global ids (B, M), patch ids (B, N) -> logits (B, M, V) and (B, N, V) in float32.

        In training mode class labels are dropped with probability class_dropout. With M = 0 the global logits are empty.
        """
        self.check_classes(class_ids)
        M = self.cfg.num_global
        if self.training:
            draws = from_first(torch.rand(world() * len(class_ids), device=class_ids.device))   # of the whole batch
            dropped = draws.chunk(world())[rank()] < self.cfg.class_dropout                     # (B,)
            class_ids = class_ids.masked_fill(dropped, self.cfg.num_classes)
        x = self.token_dropout(self.embed(class_ids, global_ids, patch_ids[:, :-1]))        # (B, M + N, dim)
        x = self.backbone(x, torch.arange(x.shape[1], device=x.device))
        patch_logits = self.patch_head(x[:, M:]).float()                                    # (B, N, V)
        global_logits = self.global_head(x[:, :M]).float() if M else patch_logits[:, :0]    # (B, M, V)
        return global_logits, patch_logits

    def generate(self, class_ids: Tensor, cfg_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 generator: torch.Generator | None = None, **how) -> tuple[Tensor, Tensor]:
        """Sample pictures of the classes (B,) -> global ids (B, M), patch ids (B, N); see Sampler for the arguments."""
        self.check_classes(class_ids)
        return Sampler(self, len(class_ids), cfg_scale, temperature, top_k, top_p)(class_ids, generator, **how)

    def check_classes(self, class_ids: Tensor) -> None:
        """HitaError unless class_ids is one dimension of ints that this model has."""
        check(class_ids.dim() == 1 and class_ids.dtype == torch.int64,
              f"class ids are {class_ids.dtype} of shape {tuple(class_ids.shape)}, expected int64 of shape (B,)")
        if class_ids.device.type == "cpu" and len(class_ids):  # on a GPU reading them would stall the stream
            low, high = int(class_ids.min()), int(class_ids.max())
            check(0 <= low and high < self.cfg.num_classes,
                  f"class {low if low < 0 else high} is out of range, this model has classes 0 to {self.cfg.num_classes - 1}")


class Sampler:
    """Draws pictures from a Llama, a batch at a time, with a KV cache that is allocated once.

    cfg_scale: strength of classifier-free guidance, logits = uncond + cfg_scale * (cond - uncond); 1 is without.
    temperature, top_k (0: all), top_p: see `filter_logits`; top_k=1 is greedy. Raises HitaError for a setting out of range.

    Nothing in a step waits for the device: position, tokens and noise are tensors there. So on CUDA a step is recorded as a
    graph, once for each kind of token and each SPAN of the cache, and then launched as a whole; elsewhere it runs as it is.
    """
    SPAN = 128  # on CUDA attention reads the filled part of the cache rounded up to multiples of this

    def __init__(self, llama: Llama, batch: int, cfg_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        check_sampling(cfg_scale, temperature, top_k, top_p)
        self.llama, self.cfg_scale, self.filters, self.graphs = llama, cfg_scale, (temperature, top_k, top_p), {}
        cfg, like = llama.cfg, llama.norm.weight
        self.total, self.copies = cfg.num_global + cfg.num_patches, 1 if cfg_scale == 1 else 2  # one batch: [cond; uncond]
        self.span = self.SPAN if like.is_cuda else 1
        shape = 2, self.copies * batch, cfg.heads, self.round_up(self.total), cfg.dim // cfg.heads
        self.caches = [like.new_zeros(shape) for _ in llama.blocks]
        self.x, self.position = like.new_zeros(shape[1], 1, cfg.dim), torch.zeros(1, dtype=torch.int64, device=like.device)
        self.ids = torch.zeros(batch, self.total, dtype=torch.int64, device=like.device)
        self.noise = torch.empty(batch, cfg.codebook_size, device=like.device)

    def round_up(self, length: int) -> int:
        """The next multiple of the span."""
        return -(-length // self.span) * self.span

    def step(self, x: Tensor, positions: Tensor, length: int, predicts_global: bool, embeds_global: bool) -> None:
        """Embedded inputs x (B or 2B, T, dim) at their positions (T,) -> the token that the last of them predicts goes to
        self.ids, its embedding to self.x, its position as an input to self.position."""
        llama = self.llama
        head = llama.global_head if predicts_global else llama.patch_head
        logits = head(llama.backbone(x, positions, self.caches, length)[:, -1]).float()     # (B or 2B, V)
        if self.copies == 2:
            cond, uncond = logits.chunk(2)
            logits = uncond + self.cfg_scale * (cond - uncond)                              # (B, V)
        probs = filter_logits(logits, *self.filters).softmax(dim=-1)
        ids = (probs / self.noise).argmax(dim=-1, keepdim=True)                             # (B, 1); torch.multinomial waits
        embedding = llama.global_embedding if embeds_global else llama.patch_embedding
        self.ids.index_copy_(1, positions[-1:], ids)
        self.x.copy_(embedding(ids).repeat(self.copies, 1, 1))
        self.position.copy_(positions[-1:] + 1)

    @torch.no_grad()
    def __call__(self, class_ids: Tensor, generator: torch.Generator | None = None, given: Tensor | None = None,
                 progress: bool = False) -> tuple[Tensor, Tensor]:
        """Pictures of the classes (B,) -> global ids (B, M), patch ids (B, N). Raises HitaError for a class out of range.

        generator: seeds the draws. given (B, P): the first P tokens, which are read in one pass. progress: show a bar.
        """
        llama, M = self.llama, self.llama.cfg.num_global
        llama.check_classes(class_ids)
        check(len(class_ids) == len(self.ids), f"{len(class_ids)} classes for a batch of {len(self.ids)}")
        given = class_ids.new_empty(len(class_ids), 0) if given is None else given
        check(given.dim() == 2 and len(given) == len(class_ids) and given.shape[1] <= self.total,
              f"given ids have shape {tuple(given.shape)}, expected ({len(class_ids)}, up to {self.total})")
        table_end, P = M - (M > 0 and llama.cfg.released_sampling), given.shape[1]
        self.ids[:, :P] = given
        labels = [class_ids, torch.full_like(class_ids, llama.cfg.num_classes)][:self.copies]
        x = torch.cat([llama.embed(ids, given[:, :table_end], given[:, table_end:]) for ids in labels])  # (B or 2B, 1 + P, dim)
        for p in bar(range(P, self.total), "tokens", show=progress):
            self.noise.exponential_(generator=generator)
            kind = self.round_up(p + 1), p < M, p < table_end
            if p == P:
                self.step(x, torch.arange(P + 1, device=x.device), *kind)
            elif kind in self.graphs:
                self.graphs[kind].replay()
            else:
                self.step(self.x, self.position, *kind)
                if self.x.is_cuda:  # after a step as usual, which compiled and allocated what was needed
                    self.graphs[kind] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graphs[kind]):
                        self.step(self.x, self.position, *kind)
        ids = self.ids.clone()
        return ids[:, :M], ids[:, M:]


def check_sampling(cfg_scale: float, temperature: float, top_k: int, top_p: float) -> None:
    """Raise HitaError for a sampling setting out of range."""
    check(0 <= cfg_scale < math.inf, f"cfg_scale is {cfg_scale}, it must be 0 or more")
    check(0 < temperature < math.inf, f"temperature is {temperature}, it must be positive; for the most likely tokens use top_k 1")
    check(top_k >= 0, f"top_k is {top_k}, it must be 0 (all) or more")
    check(0 < top_p <= 1, f"top_p is {top_p}, it must be in (0, 1]")


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) -> logits (B, V) divided by the temperature, -inf where filtered out.

    top_k keeps the k largest (and ties), 0 keeps all. top_p then keeps the fewest largest whose probability reaches p.
    """
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]                      # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs                                               # mass of the larger ones
        logits = logits.masked_fill((before > top_p).scatter(1, order, before > top_p), -math.inf)
    return logits


def llama_losses(global_logits: Tensor, patch_logits: Tensor, global_ids: Tensor, patch_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of global and of patch tokens; their sum is trained, so that a global token of the released
    model weighs N / M = 3.4 times a patch token. The global loss is 0 where there are no global tokens."""
    patch_loss = F.cross_entropy(patch_logits.flatten(0, 1), patch_ids.flatten())
    if global_ids.shape[1] == 0:
        return torch.zeros_like(patch_loss), patch_loss
    return F.cross_entropy(global_logits.flatten(0, 1), global_ids.flatten()), patch_loss


# ---------------------------------------------------------------------------------------------------------------------
# The released models, on the Hugging Face Hub
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Released:
    """A released generator; fid is the published one, of 50,000 pictures with guidance, resized to 256 px."""
    tokenizer: str
    size: str
    epochs: int
    fid: float


RELEASED = {f"{tokenizer}-{size.lower()}-{epochs}e": Released(tokenizer, size, epochs, fid) for tokenizer, size, epochs, fid in [
    ("hita-v", "B", 50, 5.85), ("hita-v", "B", 300, 4.33), ("hita-v", "L", 50, 3.75), ("hita-v", "L", 300, 2.86),
    ("hita-v", "XL", 50, 2.98), ("hita-v", "XXL", 50, 2.70), ("hita-v", "2B", 50, 2.59),
    ("hita-u", "B", 50, 4.21), ("hita-u", "B", 250, 3.49), ("hita-u", "L", 50, 2.97), ("hita-u", "L", 250, 2.44),
    ("hita-u", "XL", 50, 2.40), ("hita-u", "XL", 100, 2.16), ("hita-u", "XXL", 50, 2.07), ("hita-u", "XXL", 100, 2.01),
    ("hita-u", "2B", 50, 1.93), ("hita-u", "2B", 100, 1.82)]}
TOKENIZER_FILES = {"hita-v": "vanilla/tokenizer/hita-tok.pt", "hita-u": "ultra/tokenizer/hita-ultra.pt"}
LLAMA_FILES = {name: f"{TOKENIZER_FILES[m.tokenizer].split('/')[0]}/GPT-{m.size}/GPT-{m.size}-{m.epochs}e.pt"
               for name, m in RELEASED.items()}
WEIGHTS = Path(__file__).parent / "weights"  # where files that were downloaded by hand are looked for


def on_hub(name: str) -> tuple[str, str]:
    """Repository and file of a released tokenizer or generator, or else of a timm model."""
    file = (TOKENIZER_FILES | LLAMA_FILES).get(name)
    return ("yexiguafu/hita-gen", file) if file else (f"timm/{name}", "model.safetensors")


def by_hand(name: str) -> Path:
    """Where the file of a model is looked for before the Hub is."""
    return WEIGHTS / (name + Path(on_hub(name)[1]).suffix)


def local_copy(name: str) -> Path | None:
    """The file of a model if it is on this machine: downloaded by hand, or in the Hub's cache."""
    import huggingface_hub  # slow to import, and most runs do without
    found = huggingface_hub.try_to_load_from_cache(*on_hub(name))
    return by_hand(name) if by_hand(name).is_file() else Path(found) if isinstance(found, str) else None


def fetch(*names: str, otherwise: str) -> list[Path]:
    """Files of released or timm models, downloaded where they are not on this machine yet.

    Raises HitaError that says what to download by hand, or `otherwise` what else to do.
    """
    import huggingface_hub as hub
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry
    missing = [name for name in names if not local_copy(name)]
    try:
        for name in missing:
            hub.get_hf_file_metadata(hub.hf_hub_url(*on_hub(name)))  # fails at once where the download retries for long
            hub.hf_hub_download(*on_hub(name))
    except Exception as e:  # network, server, disk: the library raises many kinds; the remedy is the same
        files = " and ".join(f"{hub.hf_hub_url(*on_hub(n))} as {by_hand(n)}" for n in missing if not local_copy(n))
        raise HitaError(f"cannot fetch {name} from the Hub ({short(e)}); download by hand {files}, or {otherwise}") from e
    return [local_copy(name) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain tensors and numbers, loaded with weights_only=True
# ---------------------------------------------------------------------------------------------------------------------

# Our names (regular expressions) -> names in the released files, applied one after another.
RELEASED_TOKENIZER = [
    (r"extractor\.queries", "encode_transformer.carrier_tokens"), (r"extractor\.positions", "encode_transformer.pos_embed"),
    (r"extractor\.dino_proj", "encode_transformer.proj.mlp"), (r"extractor\.norm", "encode_transformer.norm_pre"),
    (r"(extractor\.bidirectional.*)attn\.out", r"\1attn1.to_out.0"), (r"(extractor\.bidirectional.*)attn\.", r"\1attn1.to_"),
    (r"((?:extractor|fusion)\..*)attn\.(\w+)", r"\1attn1.\2_proj"), (r"ffn", "ffnet"),
    (r"extractor\.bidirectional", "encode_transformer.transformer1.layers"),
    (r"extractor\.causal", "encode_transformer.transformer2.layers"),
    (r"fusion\.global_positions", "decode_transformer.slot_position_embedding"),
    (r"fusion\.positions", "decode_transformer.position_embedding"), (r"fusion\.layers", "decode_transformer.transformer.layers"),
    (r"fusion\.mask_token", "decode_transformer.mask_embedding"), (r"fusion\.vfm_norm", "decode_transformer.norm_vfm"),
    (r"fusion\.vfm_proj", "decode_transformer.proj"), (r"fusion\.norm", "decode_transformer.norm"),
    (r"global_quantizer\.codebook", "slot_quantize.embedding.weight"), (r"patch_quantizer\.codebook", "quantize.embedding.weight"),
    (r"patch_down", "quant_conv"), (r"patch_up", "post_quant_conv"),
    (r"global_down", "pre_slots_quant"), (r"global_up", "post_slots_quant"),
    (r"levels", "conv_blocks"), (r"shortcut", "nin_shortcut"), (r"((?:coder)\..*)\.out\.", r"\1.proj_out."),
    (r"(encoder.*)resample\.1", r"\1downsample.conv"), (r"(decoder.*)resample\.1", r"\1upsample.conv"),
]
RELEASED_LLAMA = [
    (r"class_embedding", "cls_embedding.embedding_table"), (r"patch_embedding", "tok_embeddings"),
    (r"global_embedding", "slot_embeddings"), (r"global_positions", "slot_pos"), (r"blocks", "layers"),
    (r"norm1", "attention_norm"), (r"norm2", "ffn_norm"), (r"qkv", "attention.wqkv"), (r"out\.", "attention.wo."),
    (r"\.(w\d)", r".feed_forward.\1"), (r".*_head", "output"),
]
MODELS = {"tokenizer": (TokenizerConfig, HitaTokenizer, "train_tokenizer.py"), "llama": (LlamaConfig, Llama, "train_ar.py")}


def released_name(ours: str, names: list[tuple[str, str]]) -> str:
    """The name that one of our tensors has in the released files."""
    for pattern, name in names:
        ours = re.sub(pattern, name, ours)
    return ours


def from_released(weights: dict[str, Tensor]) -> dict:
    """A released file's tensors as a checkpoint of ours: kind, config, and "ema" with the tensors under our names.

    Its 1x1 convolutions are our linear layers, its one output layer is our two heads, and its usage statistics and DINOv2
    weights are left out. What does not fit stays as it is, for strict loading to find.
    """
    weights = {k: v for k, v in weights.items() if not k.endswith("codebook_used") and "backbone" not in k}
    if any(k.startswith("layers.") for k in weights):
        width = lambda size: sum(v.shape[-1:] == (size["dim"],) for v in weights.values())
        kind, names, config = "llama", RELEASED_LLAMA, LlamaConfig(**max(LLAMA_SIZES.values(), key=width))
    else:
        ultra = any("mask_embedding" in k or "norm_vfm" in k for k in weights)
        kind, names, config = "tokenizer", RELEASED_TOKENIZER, TOKENIZERS["hita-u" if ultra else "hita-v"]
    with torch.device("meta"):
        own = MODELS[kind][1](config).state_dict()
    renamed = {}
    for ours, tensor in own.items():
        if (theirs := released_name(ours, names)) in weights:
            found = weights[theirs]
            if theirs == "output.weight" and found.dim() == 2:
                found = found.tensor_split(2)[ours == "patch_head.weight"]
            renamed[ours] = found.flatten(1) if tensor.dim() == 2 and found.shape[2:] == (1, 1) else found
    unknown = weights.keys() - {released_name(ours, names) for ours in own}
    return {"kind": kind, "config": config, "ema": {**renamed, **{k: weights[k] for k in unknown}}, "names": names}


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """A checkpoint, ours or a released one, as a dictionary with its "config" (a dataclass), its weights under our names
    ("ema"), and whatever else ours holds; tensors are on the CPU and read from the disk when they are used.

    path: a file or the name of a released model; kind: "tokenizer" or "llama". Raises HitaError if the file is missing, is
    no checkpoint, would run code, or holds another kind of model.
    """
    config, _, script = MODELS[kind]
    names = TOKENIZER_FILES if kind == "tokenizer" else LLAMA_FILES
    if not os.path.exists(path) and str(path) in names:
        path, = fetch(str(path), otherwise=f"make your own with `python {script}`")
    check(os.path.isfile(path), f"there is no {kind} checkpoint at {path}; make one with `python {script}`, or name a released "
                                "one (`python sample.py --list`)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released files carry their arguments
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # zip, pickle and I/O errors of many kinds; the file is of no use in either case
        raise HitaError(f"{path} is not a checkpoint that can be read safely ({short(e)}); fetch or make it again") from e
    check(isinstance(data, dict), f"{path} holds no model weights")
    weights = next((data[key] for key in ("ema", "model", "module", "state_dict") if key in data), data)
    check(isinstance(weights, dict) and weights and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()),
          f"{path} holds no model weights")
    ours = "kind" in data
    data = {**data, "ema": weights, "names": []} if ours else {**data, **from_released(weights)}
    check(data["kind"] == kind, f"{path} holds a {data['kind']}, a {kind} is needed; make one with `python {script}`")
    if ours:
        data["config"] = settings_of(config, data.get("config"), path)
        names = data.get("classes", [""] * getattr(data["config"], "num_classes", 0))
        check(isinstance(names, list) and all(isinstance(name, str) for name in names)
              and len(names) == getattr(data["config"], "num_classes", 0), f"{path} has no name for each of its classes")
    return data


def settings_of(kind: type, values: dict, path: str | Path):
    """The dataclass `kind` made of values from a file. Raises HitaError if they do not fit."""
    try:
        return kind(**values)
    except (TypeError, HitaError) as e:
        raise HitaError(f"{path} has settings that this version of the code cannot use ({short(e)})") from e


def check_weights(model: nn.Module, data: dict, path: str | Path) -> None:
    """Raise HitaError unless the weights that `read_checkpoint` gave are just those of the model: it names the first missing,
    unexpected or misshapen tensor, those of a released file by their names there."""
    weights, own = data["ema"], model.state_dict()
    called = {key: released_name(key, data["names"]) for key in own}
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has the unexpected", weights.keys() - own.keys())):
        check(not keys, f"{path} {problem} tensor {min((called.get(k, k) for k in keys), default='')} ({len(keys)} such)")
    for key, tensor in own.items():
        check(weights[key].shape == tensor.shape,
              f"{path}: {called[key]} has shape {tuple(weights[key].shape)}, this model needs {tuple(tensor.shape)}")
        check(weights[key].is_floating_point() == tensor.is_floating_point() and weights[key].layout == torch.strided,
              f"{path}: {called[key]} is of the kind {weights[key].dtype}, {weights[key].layout}, this model needs {tensor.dtype}")


def load_weights(model: nn.Module, data: dict, path: str | Path) -> None:
    """Put the weights that `read_checkpoint` gave into the model. Raises HitaError if they do not fit."""
    check_weights(model, data, path)
    model.load_state_dict(data["ema"])


def load_model(data: dict, path: str | Path) -> HitaTokenizer | Llama:
    """The model that `read_checkpoint` gave, in eval mode on the CPU. Raises HitaError if its weights do not fit."""
    _, model, _ = MODELS[data["kind"]]
    with torch.device("meta"):  # takes no memory: a damaged file may ask for any size
        check_weights(model(data["config"]), data, path)
    model = model(data["config"])
    model.load_state_dict(data["ema"])
    return model.eval()


def load_tokenizer(path: str | Path, dino: str | None = None) -> HitaTokenizer:
    """The EMA weights of a tokenizer checkpoint, ours or a released one, in eval mode on the CPU.

    path: a file, or "hita-v" or "hita-u" for a download. dino: a timm name or a weights file of the DINOv2 that encoding
    needs, None to decode only; a tokenizer that was built without DINOv2 ignores it. Raises HitaError if a file is missing
    or does not fit.
    """
    tokenizer = load_model(read_checkpoint(path, "tokenizer"), path)
    if dino is not None:
        attach_dino(tokenizer, dino)
    return tokenizer


def attach_dino(tokenizer: HitaTokenizer, dino: str | None = None) -> None:
    """Give the tokenizer the frozen DINOv2 that its configuration names, if any; dino: another timm name or a weights file."""
    cfg = tokenizer.cfg
    if not cfg.uses_dino:
        return
    is_file = dino is not None and (os.path.exists(dino) or Path(dino).suffix in (".pth", ".pt", ".bin", ".safetensors"))
    tokenizer.dino = DINOv2(cfg.dino, file=dino) if is_file else DINOv2(dino or cfg.dino)
    check(tokenizer.dino.vit.embed_dim == cfg.dino_dim,
          f"{dino or cfg.dino} has {tokenizer.dino.vit.embed_dim} features, the tokenizer expects {cfg.dino_dim}")


def load_llama(path: str | Path) -> Llama:
    """The EMA weights of a Llama checkpoint, ours or a released one, in eval mode on the CPU.

    path: a file, or a name in RELEASED for a download. Raises HitaError if the file is missing or does not fit.
    """
    return load_model(read_checkpoint(path, "llama"), path)


def start_from(model: HitaTokenizer | Llama, data: dict, path: str | Path) -> None:
    """Fine-tuning: put the weights that `read_checkpoint` gave into a new model, and say which settings differ from those
    the checkpoint was trained with. Raises HitaError if they differ so much that the weights do not fit."""
    theirs, ours = vars(data["config"]), vars(model.cfg)
    differing = ", ".join(f"{name} is {ours[name]} and was {theirs[name]}" for name in ours if ours[name] != theirs[name])
    try:
        load_weights(model, data, path)
    except HitaError as e:
        raise HitaError(f"{e}; {differing or 'the settings are the same'}: start with the --preset and flags of {path}") from e
    if rank() == 0:
        print(f"starting from the weights of {path}" + (f"; {differing}" if differing else ""), flush=True)


def save_checkpoint(path: Path, data: dict) -> None:
    """Write to a temporary file, sync it, and move it into place: whatever happens, `path` is the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HitaError(f"cannot write {path} ({short(e)}): is the disk full? Earlier checkpoints there are untouched") from e


def fingerprint(*parts) -> str:
    """A short hash of modules' weights and of plain values: equal where nothing that matters has changed."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Runs: a training run is its parts (everything with a state_dict), saved together and restored together
# ---------------------------------------------------------------------------------------------------------------------

REGULARISERS = {"dropout", "token_dropout", "class_dropout", "beta"}  # settings of a model that may change within a run
FIXED = {"seed", "batch_size", "gan_width", "copies"}                 # settings of a recipe that may not


def find_run(args: argparse.Namespace, kind: str, recipe: type) -> dict | None:
    """The checkpoint that --resume continues, with "recipe" as a dataclass; None for a new run. What was not said about
    data and files is taken from it. Raises HitaError if the run directory holds a run and --resume was not given."""
    out, newest = Path(args.out), Path(args.out) / f"{kind}.pt"
    held = [newest.name] if newest.exists() else sorted(p.name for p in out.glob(f"{kind}-*.pt"))
    logs = [p.name for p in out.glob(f"{kind}.jsonl")]
    if args.resume is None:
        check(not held + logs, f"{out} holds a run already ({', '.join((held + logs)[:1])}): continue it with --resume, or choose "
                               "another directory with --out")
        return None
    if not args.resume and not held:
        if rank() == 0:
            print(f"there is nothing to resume in {out}: a new run starts", flush=True)
        return None
    path = Path(args.resume or out / held[-1])
    check(not held or path.resolve() == (out / held[-1]).resolve(), f"{out} holds another run than {path}, or a later step of it "
          f"({', '.join(held[-1:])}): choose another directory with --out")
    saved = read_checkpoint(path, kind)
    check(isinstance(saved.get("step"), int) and isinstance(saved.get("files"), dict),
          f"{path} is not the checkpoint of a run; start a new run from its weights with --init-from {path}")
    for name, value in saved["files"].items():
        if getattr(args, name, "") is None and isinstance(value, str):
            setattr(args, name, value)
    return {**saved, "recipe": settings_of(recipe, saved.get("recipe"), path), "path": path}


def check_settings(saved: dict, cfg, recipe, train: ImageFolder) -> None:
    """Say which settings differ from those of the checkpoint. Raises HitaError for one that cannot change within a run."""
    old, new = vars(saved["config"]) | vars(saved["recipe"]), vars(cfg) | vars(recipe)
    fixed = FIXED | vars(cfg).keys() - REGULARISERS
    changed = [name for name in new if new[name] != old[name]]
    for name in changed:
        check(name not in fixed, f"{name} is {new[name]} and was {old[name]} in {saved['path']}: it cannot change within a run; "
              f"leave it as it was, or start a new run in another directory with --init-from {saved['path']}")
    check(saved.get("pictures") == train.fingerprint(), f"the pictures in {train.folder} are not those that {saved['path']} was "
          f"trained on; give the same --data, or start a new run in another directory with --init-from {saved['path']}")
    if rank() == 0:
        text = ", ".join(f"{name} is {new[name]} and was {old[name]}" for name in changed)
        print(f"resuming {saved['path']} after step {saved['step']}" + (f"; {text}" if changed else ""), flush=True)


def restore(saved: dict | None, parts: dict) -> int:
    """Put the states of a checkpoint, if there is one, into the parts of a run -> the steps that are done.
    Raises HitaError if a state does not fit, or if the processes do not see the same checkpoint."""
    done = saved["step"] if saved else 0
    steps = all_gather(torch.tensor([done])).tolist()
    check(len(set(steps)) == 1, f"the processes see checkpoints of different steps {steps}: they need the same run directory")
    if not saved:
        parts["log"].truncate(0)  # of a run that ended before its first checkpoint
        return 0
    for name, part in parts.items():
        try:
            state = saved[name]
            if isinstance(part, torch.optim.Optimizer):  # learning rate and the like are today's
                state = {**part.state_dict(), "state": copy.deepcopy(state["state"])}
            part.load_state_dict(state)
            if isinstance(part, torch.optim.Optimizer) and part.state:  # fused optimizers trust these blindly
                for p in (p for group in part.param_groups for p in group["params"]):
                    if {k: x.shape for k, x in part.state[p].items()} != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                        raise ValueError("its tensors have other shapes than the model's")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            raise HitaError(f"{saved['path']} cannot be resumed, its {name} does not fit ({short(e)})") from e
    saved.clear()  # lets go of the file, which the next checkpoint replaces
    return done


class RandomState:
    """The random numbers of all processes, as a part of a run."""

    def __init__(self, device: torch.device):
        self.modules = {"cpu": torch.random} | ({device.type: torch.get_device_module(device)} if device.type != "cpu" else {})

    def state_dict(self) -> dict[str, Tensor]:
        """Device type -> states (processes, bytes)."""
        return {name: all_gather(module.get_rng_state()[None]) for name, module in self.modules.items()}

    def load_state_dict(self, states: dict[str, Tensor]) -> None:
        """With another number of processes or another device the random numbers start anew."""
        for name, module in self.modules.items():
            if name in states and len(states[name]) == world():
                module.set_rng_state(states[name][rank()].clone())
            elif rank() == 0:
                print(f"random numbers on {name} start anew: the run had other devices or another number of processes")


class Stop:
    """SIGTERM and Ctrl-C let the run finish its step and save; a second one ends it at once. What comes within half a second
    counts as one, since schedulers and torchrun may both pass the same signal on."""

    def __init__(self):
        self.since = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        """Called by Python when a signal has come."""
        if self.since is not None:
            return os._exit(128 + number) if time.monotonic() - self.since > 0.5 else None
        self.since = time.monotonic()
        if rank() == 0:  # not print, which may have been interrupted just now
            os.write(2, b"stopping after this step; once more to stop at once, without saving\n")

    def asked(self) -> bool:
        """Whether any process was told to stop; the same answer in all."""
        return all_sum(torch.tensor(float(self.since is not None))).item() > 0  # on the CPU: a GPU does not wait for it


def ignore_signals(worker: int) -> None:
    """For data loader processes: they end with the process that they load for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def careful_step(optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
    """optimizer.step(), but not if loss or gradient norm is not finite in any process. The decision is made on the device,
    so that nothing waits for it: fused optimizers do nothing where `found_inf` is 1. `Log` then stops the run."""
    optimizer.found_inf = all_sum((~torch.isfinite(loss.detach() + grad_norm)).float()).clamp(max=1)
    optimizer.step()


def steps(out: Path, kind: str, recipe, parts: dict, facts: dict, saved: dict | None, look, usage=None) -> Iterator[int]:
    """The steps of a run that are still to be done, from 1 or from where the checkpoint `saved` was written. After each step
    comes what is due: a log line, a checkpoint, an evaluation, or the end if the run was told to stop.

    <kind>.pt is the newest checkpoint; those of multiples of recipe.keep_every are kept as <kind>-<step>.pt too. They hold the
    states of the parts, and the facts. look(step) evaluates and returns figures; usage: see Log.write.
    """
    due = lambda every: every > 0 and step % every == 0
    log, step = parts["log"], restore(saved, parts)
    stop = Stop()
    for unfinished in out.glob(f"{kind}*.tmp") if rank() == 0 else ():
        unfinished.unlink()  # of a run that was killed while it saved
    if step and (due(recipe.eval_every) or step >= recipe.steps):
        log.line(step, look(step))  # again or for the first time: checkpoints are written before evaluations
    for step in range(step + 1, recipe.steps + 1):
        yield step
        evaluating = due(recipe.eval_every) or step == recipe.steps
        if due(recipe.log_every) or evaluating:
            log.write(step, recipe.batch_size, usage)
        stopping = stop.asked()
        if stopping or evaluating or due(recipe.keep_every):
            data = {"kind": kind, "step": step, **facts, **{name: part.state_dict() for name, part in parts.items()}}
            if rank() == 0:  # but the states were gathered in all processes
                if due(recipe.keep_every):
                    save_checkpoint(out / f"{kind}-{step:06d}.pt", data)
                save_checkpoint(out / f"{kind}.pt", data)
            barrier()
        if stopping:
            if rank() == 0:
                print(f"stopped after step {step}, which is saved in {out / kind}.pt: continue with --resume", flush=True)
            return
        if evaluating:
            log.line(step, look(step))


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share: processes, the command line, data, schedules, logs, pictures
# ---------------------------------------------------------------------------------------------------------------------

def short(error: BaseException) -> str:
    """The first line of an error, for a one-line message."""
    if "weights_only" in str(error):  # torch would have the reader load the file unsafely
        return "it holds other things than tensors and plain values"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def bar(items, title: str, show: bool = True, scale: int = 1) -> tqdm:
    """A progress bar over items that count `scale` each; few lines where the output is a file."""
    return tqdm(items, title, disable=not show, unit_scale=scale if scale > 1 else False, leave=False,
                mininterval=0.1 if sys.stderr.isatty() else 30)


def run(main) -> None:
    """Call a script's main. What a user or the machine has caused is printed as one line, with exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold anything
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if message := explain(e):
            print(f"error: {message}", file=sys.stderr, flush=True)
        elif not dist.is_initialized():
            raise
        else:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(2) if dist.is_initialized() else sys.exit(2)  # a rank that waits for the others must not hang here
    if dist.is_initialized():
        dist.destroy_process_group()


def explain(error: Exception) -> str:
    """One line for what a user or the machine has caused, "" for what is a mistake of the program."""
    text = str(error)
    if isinstance(error, HitaError):  # a data loader's worker puts its traceback before the message
        return text.splitlines()[-1].removeprefix("hita.HitaError: ") if text.startswith("Caught") else text.replace("\n", " ")
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|size calculation overflow", text):
        return f"not enough memory ({short(error)}); choose a smaller model, fewer or smaller pictures, or another --batch-size"
    if "DataLoader worker" in text:
        return f"a data loader process has died ({short(error)}); if memory is short, use fewer --workers"
    if isinstance(error, OSError):
        return short(error)
    if dist.is_initialized() and re.search("gloo|NCCL|[Cc]onnection|peer", text):
        return f"another process of this run has ended ({short(error)})"
    return ""


def rank() -> int:
    """Index of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Tensors (n, ...) of all processes, one after another (world * n, ...)."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def from_first(x: Tensor) -> Tensor:
    """The tensor of process 0."""
    if world() > 1:
        dist.broadcast(x, 0)
    return x


def barrier() -> None:
    """Wait until every process is here."""
    all_sum(torch.zeros(1))


def start(device: str | None) -> torch.device:
    """Choose the device and join the process group that torchrun announces."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise HitaError(f"device {device} cannot be used here ({short(e)}); try --device cpu") from e
    torch.backends.cudnn.allow_tf32 = False  # in float32 the encoder's convolutions must be exact, or some ids are others
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif sys.platform == "linux":  # let glibc keep freed memory: to fetch it anew page by page takes a fifth of a decoder's time
        with contextlib.suppress(AttributeError, OSError):
            for setting, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX none, M_TRIM_THRESHOLD never
                ctypes.CDLL(None).mallopt(setting, value)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as e:
            raise HitaError(f"cannot join the other processes ({short(e)}); start the script with torchrun") from e
    return chosen


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose flags can come from dataclasses."""

    def __init__(self, description: str, **kwargs):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        """One line, with the nearest flag if one is unknown, and exit status 2."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [w for w in message.split() if w.startswith("--")] if "unrecognized" in message else []
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1) if unknown else []
        print(f"error: {message}" + (f"; did you mean {near[0]}?" if near else "; see --help"), file=sys.stderr)
        sys.exit(2)

    def add_choice(self, flag: str, choices: list[str], default: str, help: str) -> str:
        """Add a flag on which the defaults of others depend, and return its value at once."""
        early = Parser("", add_help=False)
        for parser, missing in ((early, default), (self, argparse.SUPPRESS)):
            parser.add_argument(flag, choices=choices, default=missing, help=f"{help} [{default}]")
        return vars(early.parse_known_args()[0])[flag[2:].replace("-", "_")]

    def add_run(self, init_from: str) -> None:
        """The flags of both training scripts; init_from: the help of --init-from."""
        self.add_argument("--data", help="folder with train/<class>/<pictures> and val/... [the embedded emoji pictures]")
        self.add_argument("--out", default="out", help="run directory [out]")
        self.add_argument("--resume", nargs="?", const="", metavar="CHECKPOINT", help="go on with a run: from this checkpoint, or "
                          "from the newest in the run directory, where a new run starts if there is none")
        self.add_argument("--init-from", metavar="CHECKPOINT", help=init_from)
        self.add_argument("--dino-file", help="DINOv2 weights, the original .pth or timm's .safetensors [from the Hub]")
        self.add_argument("--device", help="cuda, mps or cpu [the best there is]")
        self.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile, takes minutes [yes on CUDA]")
        self.add_argument("--bench", action="store_true", help="measure speed and memory with random weights and data, and stop")

    def add_config(self, title: str, config, skip: tuple[str, ...] = ()) -> None:
        """One flag for each field of a dataclass instance but those in `skip`; the help shows the instance's values."""
        group = self.add_argument_group(title)
        for f in dataclasses.fields(config):
            if f.name in skip:
                continue
            value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            text = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
            if isinstance(value, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            else:
                kind = integers if isinstance(value, tuple) else type(value)
                group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text)


def integers(text: str) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4)"""
    return tuple(int(part) for part in text.split(","))


def compiled(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether to use torch.compile: as --compile says, else on CUDA."""
    return device.type == "cuda" if args.compile is None else args.compile


def override(config, args: argparse.Namespace):
    """A copy of a dataclass with the fields that were given as flags. Raises HitaError where they contradict."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(config) if hasattr(args, f.name)}
    return dataclasses.replace(config, **given)


def run_directory(path: str) -> Path:
    """Make the directory that a run writes to. Raises HitaError if that or writing to it is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise HitaError(f"cannot write to the run directory {path} ({short(e)}); choose another with --out") from e
    return Path(path)


# data ---------------------------------------------------------------------------------------------------------------

IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
EMOJI_ZIP = Path(__file__).parent / "data" / "emoji64.zip"


def embedded_data() -> Path:
    """The folder of the embedded emoji pictures; unpacked beside the zip at first use."""
    folder = EMOJI_ZIP.with_suffix("")
    if rank() == 0 and not folder.is_dir():
        check(EMOJI_ZIP.is_file(), f"the embedded data {EMOJI_ZIP} is missing; clone the repository again or pass --data DIR")
        temporary = folder.with_suffix(f".{os.getpid()}.tmp")
        with zipfile.ZipFile(EMOJI_ZIP) as z:
            z.extractall(temporary)
        os.replace(temporary, folder)
    barrier()
    return folder


def fit(image: Image.Image, size: int, rng: np.random.Generator | None = None, crop_range: float = 1.0) -> np.ndarray:
    """Bring a picture to (size, size, 3) uint8: halve with a box filter while it is twice too large, resize its smaller side
    bicubically, crop. Centre crop as in ADM's evaluation; with rng the smaller side is drawn from size .. size / crop_range
    and the place of the crop too."""
    side = size if rng is None else int(rng.integers(size, math.ceil(size / crop_range) + 1))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > 16 * min(image.size):  # of a strip only the middle: resized as a whole it could fill the memory
        image = TF.center_crop(image, [min(length, 16 * min(image.size)) for length in (image.height, image.width)])
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    spare = image.width - size, image.height - size
    x, y = (s // 2 for s in spare) if rng is None else (int(rng.integers(s + 1)) for s in spare)
    return np.asarray(image.crop((x, y, x + size, y + size)))


def on_white(image: Image.Image) -> Image.Image:
    """Any picture as RGB, upright as its EXIF data say, transparent parts white, 16 bits brought to 8."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(path: str | Path, size: int) -> Tensor:
    """Any picture as (3, size, size) in [-1, 1], by the evaluation crop. Raises HitaError if it cannot be read."""
    check(os.path.isfile(path), f"there is no picture {path}")
    try:
        with Image.open(path) as image:
            return to_tensor(fit(on_white(image), size))
    except Exception as e:  # decoders of damaged files raise nearly everything
        raise HitaError(f"the picture {path} cannot be read ({short(e)}); open and save it again with another program") from e


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class ImageFolder(torch.utils.data.Dataset):
    """DIR/<split>/<class>/<picture>. Items are (image (3, size, size) in [-1, 1], class index).

    An item is asked for by (variant, index). augment=True draws crop and flip from (seed, variant, index), so that every
    epoch is a variant and a picture's augmentation depends on nothing else. augment=False: variant 0 is the centre crop,
    1 its mirror image, and further ones are augmented.
    A picture that cannot be read is named once (by each process under torchrun) and replaced by the next. Raises HitaError if
    there are no pictures, or if of up to 500 that are looked at here more than half cannot be read.
    """

    def __init__(self, root: str | Path, split: str, size: int, augment: bool = False, crop_range: float = 1.0, seed: int = 0):
        self.folder, self.size, self.augment, self.crop_range, self.seed = Path(root) / split, size, augment, crop_range, seed
        for folder in (Path(root), Path(root) / "train", self.folder):
            check(folder.is_dir(), f"there is no data folder {folder}; pictures belong in {Path(root) / 'train'}/<class>/")
        self.classes = sorted(d.name for d in (Path(root) / "train").iterdir() if d.is_dir())
        unknown = {d.name for d in self.folder.iterdir() if d.is_dir()} - set(self.classes)
        check(not unknown, f"{self.folder} has the class {min(unknown, default='')}, which the folder train has not")
        files = [(path, label) for label, name in enumerate(self.classes) for path in sorted((self.folder / name).rglob("*"))]
        self.files = [(path, label) for path, label in files if path.suffix.lower() in IMAGE_TYPES]
        check(len(self.files) > 0, f"{self.folder} has no pictures in <class> folders ({', '.join(sorted(IMAGE_TYPES))})")
        self.bad = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # seen by all loader processes
        ignored = [path for path, _ in files if path.suffix.lower() not in IMAGE_TYPES and not path.is_dir()]
        empty = sorted(set(range(len(self.classes))) - {label for _, label in self.files})
        if rank() == 0 and ignored:
            print(f"{self.folder}: {len(ignored)} files are ignored for their names, as {ignored[0]}", file=sys.stderr)
        if rank() == 0 and empty:
            print(f"{self.folder}: no pictures of {len(empty)} classes, as {self.classes[empty[0]]}", file=sys.stderr)
        chosen = range(0, len(self.files), max(1, len(self.files) // 500))
        unreadable = sum(self.read(i, quiet=rank() > 0) is None for i in chosen)
        check(unreadable <= len(chosen) / 2, f"{unreadable} of the {len(chosen)} pictures looked at in {self.folder} cannot be read, "
                                             "which is too many; replace them")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, quiet: bool = False) -> Image.Image | None:
        """A picture as RGB; None if it cannot be read, and then it is named, unless it was before."""
        path, _ = self.files[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at twice the size it is an error
                with Image.open(path) as image:
                    return on_white(image)
        except Exception as e:  # decoders of damaged files raise nearly everything
            if not self.bad[index]:
                self.bad[index] = True
                if not quiet:
                    print(f"skipped {path}, {self.bad.sum()} so far: cannot be read ({short(e)})", file=sys.stderr, flush=True)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        variant, start = item
        for index in range(start, start + len(self.files)):
            if (image := self.read(index % len(self.files))) is not None:
                break
        else:
            raise HitaError(f"none of the {len(self.files)} pictures in {self.folder} can be read")
        label = self.files[index % len(self.files)][1]
        random = self.augment or variant > 1
        rng = np.random.default_rng((self.seed, variant, index)) if random else None
        pixels = fit(image, self.size, rng, self.crop_range)                                # (size, size, 3)
        if rng.random() < 0.5 if random else variant == 1:
            pixels = pixels[:, ::-1]
        return to_tensor(pixels), label

    def fingerprint(self) -> str:
        """Equal for two folders with the same names in the same places: the order of the data depends on nothing else."""
        return fingerprint(self.classes, [str(path.relative_to(self.folder)) for path, _ in self.files])

    def signature(self, variants: int) -> list:
        """What a cache made from these pictures depends on: classes, names, sizes and times of the files, preparation."""
        stats = [(str(path.relative_to(self.folder)), (s := path.lstat()).st_size, s.st_mtime_ns) for path, _ in self.files]
        random = [self.crop_range, self.seed] if self.augment or variants > 2 else []
        return [self.classes, stats, self.size, variants, random]


def validation_data(train: ImageFolder) -> ImageFolder:
    """The folder val beside the training pictures, or where there is none about a thousand of these, not augmented."""
    if (train.folder.parent / "val").is_dir():
        return ImageFolder(train.folder.parent, "val", train.size)
    val, every = copy.copy(train), max(1, len(train) // 1000)
    val.augment, val.files, val.bad = False, train.files[::every], train.bad[::every]
    return val


class Shuffled(torch.utils.data.Sampler):
    """Endless batches of (epoch, index) for this process. The data are gone through in epochs, each in its own order that
    depends on the seed alone; batches run on across the end of an epoch, and each process gets its share of every batch."""

    def __init__(self, length: int, batch_size: int, seed: int, first_step: int = 0):
        check(batch_size >= 1 and batch_size % world() == 0,
              f"the batch of {batch_size} pictures cannot be divided among {world()} processes")
        self.length, self.batch_size, self.seed, self.first_step, self.epoch = length, batch_size, seed, first_step, -1

    def __iter__(self):
        share, position = self.batch_size // world(), self.first_step * self.batch_size
        while True:
            yield [self.item(position + rank() * share + i) for i in range(share)]
            position += self.batch_size

    def item(self, position: int) -> tuple[int, int]:
        """The (epoch, index) at a place of the endless stream of pictures."""
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return epoch, int(self.order[place])


# training -----------------------------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, warmup: int, lr: float, lr_final: float) -> float:
    """Linear warm-up from 1e-7 over `warmup` steps, then a cosine from lr to lr_final; step counts from 1."""
    if step <= warmup:
        return 1e-7 + step * (lr - 1e-7) / warmup
    return lr_final + (lr - lr_final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model for the parameters; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(ema.buffers(), model.buffers()):
        ours.copy_(theirs)


class Log:
    """Keeps figures on the device and, at each `write`, prints their means as one line and appends them to a file as JSON."""

    def __init__(self, path: Path, steps: int, device: torch.device):
        self.path, self.steps, self.device = path, steps, device
        self.values, self.hits, self.step = {}, None, 0     # figure -> its values up to this step; uses of codes
        self.start, self.count = time.time(), 0             # steps since then, for the speed

    def add(self, step: int, metrics: dict[str, Tensor], hits: Tensor | None = None) -> None:
        """Figures of a step, as scalars on the device, and uses of codes to be summed up; no host sync."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value.detach().float())
        self.hits = hits if self.hits is None else self.hits + hits
        self.step, self.count = step, self.count + 1

    def gather(self) -> None:
        """Replace values and hits by their means over all processes. Raises HitaError if a value is not finite."""
        if not self.values:
            return
        means = all_sum(torch.stack(sum(self.values.values(), []))) / world()
        lengths = [len(values) for values in self.values.values()]
        places = [(self.step - n + 1 + i, name) for name, n in zip(self.values, lengths) for i in range(n)]  # the last is this step's
        bad = [place for place, value in zip(places, means.tolist()) if not math.isfinite(value)]
        self.values = {name: list(values) for name, values in zip(self.values, means.split(lengths))}
        self.hits = None if self.hits is None else all_sum(self.hits) / world()
        step = min(bad, default=(0,))[0]
        check(not bad, f"step {step}: {', '.join(name for s, name in bad if s == step)} not finite, the run has diverged. It reached "
                       "neither weights nor checkpoint: go on from the last one with --resume and a lower --lr")

    def write(self, step: int, images: int, usage=None) -> None:
        """Print means since the last call, figures made by `usage` from the hits, and the speed; images: pictures per step over
        all processes. Raises HitaError if a figure is not finite."""
        self.gather()
        metrics = {name: torch.stack(values).mean().item() for name, values in self.values.items()}
        speed = self.count / (time.time() - self.start)                                     # steps per second
        self.line(step, metrics | (usage(self.hits) if usage else {})
                  | {"images/s": speed * images, "eta_min": (self.steps - step) / speed / 60})
        self.values, self.hits = {}, None

    def line(self, step: int, metrics: dict[str, float]) -> None:
        """Print and append one line of figures."""
        if rank() == 0:
            text = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}", flush=True)
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        self.start, self.count = time.time(), 0  # what came between the steps does not count as training

    def state_dict(self) -> dict:
        """What has been added since the last line, and the length of the file."""
        self.gather()
        values = {name: torch.stack(values) for name, values in self.values.items()}
        return {"step": self.step, "values": values, "hits": self.hits, "bytes": os.path.getsize(self.path) if self.path.exists() else 0}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was called; lines that were written later are removed."""
        self.step, self.hits = state["step"], None if state["hits"] is None else state["hits"].to(self.device)
        self.values = {name: list(values.to(self.device)) for name, values in state["values"].items()}
        self.truncate(state["bytes"])

    def truncate(self, length: int) -> None:
        """Shorten the file to so many bytes, if it is longer."""
        if rank() == 0 and self.path.exists() and os.path.getsize(self.path) > length:
            os.truncate(self.path, length)


def spread(num_classes: int, count: int = 12) -> list[int]:
    """Up to `count` class indices, spread over all."""
    count = min(count, num_classes)
    return [i * num_classes // count for i in range(count)]


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], about, -> the nearest pixel values from 0 to 255."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def at_published_size(images: Tensor, antialias: bool) -> Tensor:
    """336 px pictures at 256 px, the size of the published figures: generated ones without antialiasing; reconstructions and
    their originals with it, and rounded to uint8 before. Others stay as they are."""
    size = published_size(images.shape[-1])
    if size == images.shape[-1]:
        return images
    return F.interpolate(to_uint8(images) / 127.5 - 1 if antialias else images, size, mode="bicubic", antialias=antialias)


def published_size(size: int) -> int:
    """Side at which pictures of this side are judged."""
    return 256 if size == 336 else size


class PictureFile:
    """Pictures in an .npz file as uint8 (n, H, W, 3) under the key arr_0, written in any order and by several processes; memory
    does not grow with their number. Raises HitaError if the file cannot be written."""

    def __init__(self, path: Path, count: int, size: int):
        check(path.name != "" and not path.is_dir(), f"--npz {path} is a folder, name a file in it")
        self.path, self.temporary = path, path.with_suffix(".npy.tmp")
        try:
            if rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(self.temporary, "w+", np.uint8, (count, size, size, 3)).flush()
            barrier()
            self.start, self.file = np.load(self.temporary, mmap_mode="r").offset, open(self.temporary, "r+b")
        except OSError as e:
            raise HitaError(f"cannot write {path} ({short(e)}); choose another place with --npz") from e

    def put(self, first: int, pictures: Tensor) -> None:
        """Pictures (B, 3, S, S) as uint8 at the places from `first` on."""
        self.file.seek(self.start + first * pictures[0].numel())  # not through a map, where a full disk would be a crash
        self.file.write(pictures.permute(0, 2, 3, 1).cpu().numpy().tobytes())

    def close(self) -> None:
        """Move what was put into place, when all processes are here."""
        self.file.close()
        barrier()
        if rank() == 0:
            with zipfile.ZipFile(packed := self.temporary.with_suffix(".zip"), "w") as z:
                z.write(self.temporary, "arr_0.npy")
            os.replace(packed, self.path)
            self.temporary.unlink()
        barrier()


def read_npz(path: str | Path) -> np.ndarray:
    """The uint8 pictures (n, H, W, 3) of a file as `PictureFile` writes it. Raises HitaError if it holds something else."""
    check(os.path.isfile(path), f"there is neither a folder nor a file {path}")
    try:
        pixels = np.load(path, allow_pickle=False)["arr_0"]
    except Exception as e:  # numpy and zipfile raise many kinds
        raise HitaError(f"{path} is not an .npz file with pictures under the key arr_0 ({short(e)})") from e
    check(pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3,
          f"{path} holds {pixels.dtype} of shape {pixels.shape}, expected uint8 (n, H, W, 3)")
    return pixels


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Pictures (B, 3, H, W), in [-1, 1] about or as uint8, as one picture with so many columns."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    Image.fromarray(make_grid(pixels.cpu(), columns, pad_value=255).permute(1, 2, 0).numpy()).save(path)


# measuring ----------------------------------------------------------------------------------------------------------

PEAKS = {"H100 PCIe": (756, 2000), "H100": (989, 3350), "H200": (989, 4800), "B200": (2250, 8000), "A100-SXM4-80GB": (312, 2039),
         "A100": (312, 1555), "RTX 4090": (165, 1008)}  # part of the name -> dense bf16 TFLOP/s, GB/s of memory


def measure(title: str, work, device: torch.device, images: int, steps: int = 1, count_flops: bool = False, read: float = 0) -> None:
    """Time work(), which does `steps` steps on or for so many images, and print one line: time, throughput, memory and the
    distance to what the device could do. The first call is the warm-up, of the others (at least one, for ten seconds) the
    median counts. count_flops: count the operations; read: bytes that work() must at least read from memory."""
    import resource  # not on Windows
    module, cuda, times = torch.get_device_module(device), device.type == "cuda", []
    while len(times) < 2 or sum(times[1:]) < 10:
        if cuda and len(times) == 1:
            module.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        module.synchronize()
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times[1:]))
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads"
    unit = 1 if sys.platform == "darwin" else 1024
    memory = module.max_memory_allocated() if cuda else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if count_flops:  # last, since it takes memory of its own
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            work()
    peak = next((peak for key, peak in PEAKS.items() if key in name), (None, None))
    share = lambda value, limit: f"{value / limit:.0%} of its peak" if limit else "peak of this device unknown"
    print(f"{title} on {name}: {1000 * seconds / steps:.4g} ms/step, {images / seconds:.3g} images/s"
          + (f", {steps * images / seconds:.4g} tokens/s" if steps > 1 else "")
          + f", peak memory {memory / 1e9:.3g} GB, warm-up {times[0]:.3g} s"
          + (f", {(flops := counter.get_total_flops() / 1e12) / images:.3g} TFLOP/image, {flops / seconds:.3g} TFLOP/s "
             f"({share(flops / seconds, peak[0])})" if count_flops else "")
          + (f", reads {read / seconds / 1e9:.3g} GB/s ({share(read / seconds / 1e9, peak[1])})" if read else ""), flush=True)
