"""Hita, the holistic tokenizer for autoregressive image generation, in one file.

ICCV 2025, arXiv 2507.02358. Most image tokenizers give a picture one token per patch. Hita puts M
*global* (holistic) tokens before them, which describe the picture as a whole. The decoder gets one
state per patch, from a window that starts k positions before the patches. So no state knows its
own patch, which, the paper says, makes the decoder use the globals:

    image (B, 3, H, W)
      Encoder             conv VQGAN, stride f                  -> (B, D, h, w), N = h*w
      DINOv2              frozen ViT, sees the image at 224 px  -> (B, 257, 1024)
      QueryExtractor      [M queries; DINOv2; N patches] bidirectional,
                          then [M queries; N patches] causal    -> (B, M, D), (B, N, D)
      2 VectorQuantizers  a codebook of V codes for each kind   -> ids (B, M), (B, N)
      Fusion              [M global; N patch] causal; keeps the N
                          states in a row that start at M - k   -> (B, N, D)
      Decoder             conv VQGAN                            -> (B, 3, H, W)

    class -> Llama -> M global ids -> N patch ids -> Fusion, Decoder -> a new picture

Letters in shapes: B batch, H W pixels, h w patch grid, N = h*w patch tokens, M global tokens,
D latent width, C code width (12 global, 8 patch), V codebook size, T sequence length,
d channels of a head, f stride (pixels per patch side), k positions of k-replacement.
Images are float (B, 3, H, W) in [-1, 1], token ids are int64.

Part 1 is the method, in the order in which data flows. Part 2 is what the three scripts share.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.utils
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm


class HitaError(ValueError):
    """A mistake that a user can mend. The scripts report it in one line."""


def check(condition: bool, message: str) -> None:
    """Raise HitaError(message) unless the condition holds."""
    if not condition:
        raise HitaError(message)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ==== PART 1: THE METHOD =========================================================================
#
# Settings; conv nets; DINOv2; attention; query extractor; quantizer; fusion; tokenizer; losses and
# discriminator; Llama and sampling; what is not in the paper.


# ---- Settings ------------------------------------------------------------------------------------
#
# Each field becomes a flag of the scripts, and the comment behind it becomes the flag's help.

@dataclass
class TokenizerConfig:
    """The tokenizer. The defaults are the released Hita-V, 104.2 M parameters."""
    image_size: int = 336  # pixels per side of the training images
    channels: int = 128  # channels of the conv nets at full resolution
    channel_mult: tuple = (1, 1, 2, 2, 4)  # widths of the n levels; stride is 2^(n-1)
    res_blocks: int = 2  # residual blocks per encoder level (the decoder has one more)
    latent_dim: int = 512  # width D of patch embeddings, queries and transformers
    layers: int = 3  # transformer layers in each of the three stages
    heads: int = 8  # attention heads of the transformers
    dropout: float = 0.1  # dropout in the transformers' attention
    num_global: int = 128  # number M of global tokens; 0 (and k = 0) is a plain VQGAN
    global_codebook_size: int = 16384  # codes V of the global codebook
    patch_codebook_size: int = 16384  # codes V of the patch codebook
    global_code_dim: int = 12  # width of a global code
    patch_code_dim: int = 8  # width of a patch code
    beta: float = 0.25  # weight of the commitment term
    centre: bool = False  # mean 0, variance 1 before quantizing; for short trainings
    revive_codes: bool = False  # move unused codes onto encoder outputs; for small data
    k: int = 4  # positions by which the decoder's window starts before the patches
    dino: str = "vit_large_patch14_reg4_dinov2.lvd142m"  # timm name of the DINOv2, or none
    dino_dim: int = 1024  # feature width of the DINOv2
    vfm_recon: bool = False  # Hita-U: predict DINOv2 features from the globals

    def __post_init__(self):
        check(self.grid > 0 and self.image_size % self.stride == 0,
              f"image_size {self.image_size} is no multiple of the stride {self.stride}")
        check(self.latent_dim % self.heads == 0,
              f"latent_dim {self.latent_dim} is not divisible by {self.heads} heads")
        check(0 <= self.k <= self.num_global,
              f"k is {self.k}, it must be from 0 to num_global, {self.num_global}")
        check(self.uses_dino or not self.vfm_recon, "vfm_recon needs DINOv2 and global tokens")

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
        """Whether encoding needs the frozen DINOv2."""
        return self.dino != "none" and self.num_global > 0


@dataclass
class LlamaConfig:
    """The generator. The defaults are size B at 336 px, 136.2 M parameters."""
    layers: int = 12  # transformer blocks
    heads: int = 12  # attention heads
    dim: int = 768  # width of the residual stream
    dropout: float = 0.1  # dropout after attention and feed-forward
    token_dropout: float = 0.1  # dropout on the embedded sequence
    class_dropout: float = 0.1  # share of class labels that are dropped, for guidance
    num_classes: int = 1000  # number of classes
    num_global: int = 128  # number M of global tokens
    grid: int = 21  # patch tokens per side, N = grid * grid
    global_codebook_size: int = 16384  # codes V of the global codebook
    patch_codebook_size: int = 16384  # codes V of the patch codebook

    def __post_init__(self):
        check(self.dim % (4 * self.heads) == 0,
              f"dim {self.dim} is not divisible by 4 x {self.heads} heads (2-D RoPE)")

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture, M + N."""
        return self.num_global + self.grid ** 2


TOKENIZERS = {
    "hita-v": TokenizerConfig(),
    "hita-u": TokenizerConfig(vfm_recon=True),
    "emoji": TokenizerConfig(
        image_size=64, channels=16, channel_mult=(1, 2, 2), res_blocks=1, latent_dim=128,
        layers=1, heads=4, dropout=0.0, num_global=16, global_codebook_size=256,
        patch_codebook_size=8, centre=True, revive_codes=True, k=16, dino="none"),
}
TOKENIZERS["prints"] = replace(
    TOKENIZERS["emoji"], channels=32, channel_mult=(1, 1, 2, 2), latent_dim=160, layers=2, heads=5,
    patch_codebook_size=32, k=8)

LLAMA_SIZES = {  # the paper's names, its nominal sizes and the true ones
    "B": dict(layers=12, heads=12, dim=768),      # (111M, 136.2M)
    "L": dict(layers=24, heads=16, dim=1024),     # (343M, 376.6M)
    "XL": dict(layers=36, heads=20, dim=1280),    # (775M, 816.8M)
    "XXL": dict(layers=48, heads=24, dim=1536),   # (1.4B, 1461.5M)
    "2B": dict(layers=48, heads=32, dim=1920),    # (2.0B, 2251.5M)
    "emoji": dict(layers=4, heads=3, dim=96, dropout=0.0, token_dropout=0.0),
    "prints": dict(layers=6, heads=7, dim=224, dropout=0.15),
}


# ---- Convolutional encoder and decoder (VQGAN, Esser et al. 2021) --------------------------------

def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, as released, or with a single one below 128 channels.

    A norm removes the mean and the scale of each group, so groups of very few channels lose much of
    what these channels could say. With groups of four, the small nets of the demo learned late
    that pictures have hues."""
    return nn.GroupNorm(32 if channels >= 128 else 1, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution follow each other twice, and the input is added.
    (B, c_in, H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


def row_by_row(x: Tensor) -> Tensor:
    """(B, c, H, W) -> (B, H*W, c)"""
    return x.flatten(2).transpose(1, 2)


class AttnBlock(nn.Module):
    """Single-head attention over all pixels, plus the input. (B, c, H, W) -> (B, c, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = row_by_row(self.q(y))[:, None]  # (B, 1, H*W, c)
        k = row_by_row(self.k(y))[:, None]
        v = row_by_row(self.v(y))[:, None]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, c)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """Residual blocks at one resolution, then a resampling. With attention=True an AttnBlock
    follows each residual block."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(
            AttnBlock(c_out) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)


def downsample(c: int) -> nn.Module:
    """Halve the resolution: zeros on the right and below, then a 3x3 convolution of stride 2."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))


def upsample(c: int) -> nn.Module:
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(c, c, 3, padding=1))


def stack(c: int, widths: list[int], blocks: int, resample, lowest: int) -> nn.Sequential:
    """Levels of these widths with a resampling between them. The lowest one has attention."""
    levels = []
    for i, width in enumerate(widths):
        after = resample(width) if i < len(widths) - 1 else nn.Identity()
        levels.append(Level(c, width, blocks, i == lowest, after))
        c = width
    return nn.Sequential(*levels)


def middle(c: int) -> nn.Sequential:
    """What both nets do at the lowest resolution."""
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> patch embeddings (B, D, H/f, W/f).

    Any module that does the same can take its place, for example a ViT with patches of f pixels:
    name it in HitaTokenizer.__init__."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_mult]  # highest resolution first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1)
        self.levels = stack(cfg.channels, widths, cfg.res_blocks, downsample, lowest=last)
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.levels(self.conv_in(x)))  # (B, c, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, D, h, w)


class Decoder(nn.Module):
    """Fused states (B, D, h, w) -> image (B, 3, h*f, w*f), without an output activation."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_mult[::-1]]  # lowest resolution first
        self.conv_in = nn.Conv2d(cfg.latent_dim, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.levels = stack(widths[0], widths, cfg.res_blocks + 1, upsample, lowest=0)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels(self.mid(self.conv_in(x)))  # (B, c, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


# ---- DINOv2 (Oquab et al. 2023): frozen features for the queries ---------------------------------

class DINOv2(nn.Module):
    """Frozen ViT: images (B, 3, H, W) in [-1, 1] -> normalised class token and patch tokens
    (B, 1 + 256, dim).

    name: a model of timm. file: its weights, as the original .pth or in timm's format; without a
    file they come from the Hub, or are random with pretrained=False.
    Raises HitaError if they cannot be had, or if the model has no class token."""
    SIZE = 224  # the ViT always sees 224 px: 16 x 16 patches of 14 px

    def __init__(self, name: str = TokenizerConfig.dino, file: str | Path | None = None,
                 pretrained: bool = True):
        super().__init__()
        import timm  # here, because it is slow to import and decoding does without it
        given = {}
        try:
            if file is not None:  # then timm does not fetch the weights
                given["state_dict"] = timm.models.load_state_dict(file, weights_only=True)
            self.vit = timm.create_model(
                name, pretrained or file is not None, num_classes=0, img_size=self.SIZE,
                pretrained_cfg_overlay=given)
        except Exception as e:  # files, the network and timm raise many kinds
            raise HitaError(f"cannot load {name} from {file or 'the Hub'}: {first_line(e)} "
                            "(a file of weights is named by --dino-file)") from e
        check(getattr(self.vit, "cls_token", None) is not None,
              f"{name} has no class token, a DINOv2 has one")
        self.vit.pretrained_cfg.pop("state_dict", None)  # timm would keep a second copy
        for stat, rgb in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(stat, torch.tensor(rgb)[:, None, None])
        self.eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, 224, 224) as the ViT wants it, in float32."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            # A picture that shrinks is blurred first, as in kornia's resize.
            factors = [side / self.SIZE for side in images.shape[-2:]]
            if max(factors) > 1:
                sigmas = [max((f - 1) / 2, 0.001) for f in factors]
                sizes = [int(max(4 * s, 3)) // 2 * 2 + 1 for s in sigmas]  # the next odd one
                images = TF.gaussian_blur(images, sizes[::-1], sigmas[::-1])  # x before y
            # The released weights were trained with align_corners=True.
            images = F.interpolate(images, self.SIZE, mode="bicubic", align_corners=True)
            return ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(self.preprocess(images))  # (B, 1 + 4 + 256, dim)
        # The four registers are scratch memory of the ViT and say nothing about the picture.
        cls, patches = tokens[:, :1], tokens[:, self.vit.num_prefix_tokens:]
        return torch.cat([cls, patches], dim=1)  # (B, 1 + 256, dim)


# ---- The transformer layer of the tokenizer ------------------------------------------------------

# What a token sees. A mask (T, T) of booleans, True where a row sees a column, says anything else.
EVERYTHING = "everything"
BEFORE = "before"  # itself and those before it: causal attention


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention. (B, T, D) -> (B, T, D)

    qkv_bias: whether q, k and v have biases. drop_probabilities: whether dropout acts on the
    attention probabilities or, if not, on the output. The released model has both kinds, because it
    joins two code bases."""

    def __init__(self, dim: int, heads: int, dropout: float, qkv_bias: bool,
                 drop_probabilities: bool):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.drop_probabilities = drop_probabilities
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sees: str | Tensor) -> Tensor:
        """sees: EVERYTHING, BEFORE, or a mask (T, T) that is True where a row sees a column."""
        # BEFORE needs no mask, which allows fast kernels.
        mask = None if sees is EVERYTHING or sees is BEFORE else sees
        dropout = self.dropout if self.training else 0.0

        q = split_heads(self.q(x), self.heads)  # (B, heads, T, d)
        k = split_heads(self.k(x), self.heads)
        v = split_heads(self.v(x), self.heads)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=sees is BEFORE,
            dropout_p=dropout if self.drop_probabilities else 0.0)
        x = self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)
        return x if self.drop_probabilities else F.dropout(x, dropout)


class SwiGLU(nn.Module):
    """w3(silu(u) * v), where u and v are the halves of w12(x). (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (8 * dim // 3 + 7) // 8 * 8  # 8/3 of dim, rounded up to a multiple of 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(u) * v)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and with a residual. (B, T, D) -> (B, T, D)

    qkv_bias, drop_probabilities and sees are those of Attention."""

    def __init__(self, cfg: TokenizerConfig, qkv_bias: bool, drop_probabilities: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.latent_dim)
        self.attn = Attention(
            cfg.latent_dim, cfg.heads, cfg.dropout, qkv_bias, drop_probabilities)
        self.norm2 = nn.LayerNorm(cfg.latent_dim)
        self.ffn = SwiGLU(cfg.latent_dim)

    def forward(self, x: Tensor, sees: str | Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), sees)
        return x + self.ffn(self.norm2(x))


def layers(cfg: TokenizerConfig, qkv_bias: bool, drop_probabilities: bool) -> nn.ModuleList:
    """The cfg.layers layers of one stage."""
    return nn.ModuleList(Layer(cfg, qkv_bias, drop_probabilities) for _ in range(cfg.layers))


def learned(length: int, dim: int) -> nn.Parameter:
    """A learned table (1, length, dim), of queries or of positions."""
    return nn.Parameter(torch.randn(1, length, dim) * dim ** -0.5)


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """Positions (1, G*G, D) of a G x G grid -> (1, h*w, D), bicubic if the grid differs."""
    side = math.isqrt(positions.shape[1])
    if (h, w) == (side, side):
        return positions
    # The 0.1 moves the sampling points a little, as in DINO and in the released model.
    scale = (h + 0.1) / side, (w + 0.1) / side
    # What each of the old cells gives to the new ones, and then a product with it: a GPU has no
    # gradient of bicubic interpolation where deterministic algorithms are asked for.
    cells = torch.eye(side ** 2, device=positions.device).unflatten(1, (side, side))[:, None]
    weights = F.interpolate(cells, scale_factor=scale, mode="bicubic").flatten(1)  # (G*G, h*w)
    with torch.autocast(positions.device.type, enabled=False):
        return weights.T.type_as(positions) @ positions  # (1, h*w, D)


# ---- Causal query extractor: M learnable queries gather what is global ---------------------------

class QueryExtractor(nn.Module):
    """Patches (B, D, h, w) and frozen features (B, 1 + n, dino_dim) -> queries (B, M, D) and
    patches (B, N, D).

    In stage 1 the queries look at everything, because they are to summarise the picture. In stage
    2 a query sees only the queries before it, as the Llama will when it predicts their ids. Only
    patches get positions: the queries are learned, so each of them is a position of its own.
    Where there are no frozen features, their tensor is empty, (B, 0, dino_dim)."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D = cfg.latent_dim
        self.queries = learned(cfg.num_global, D)
        self.positions = learned(cfg.grid ** 2, D)
        if cfg.uses_dino:
            self.dino_proj = nn.Sequential(
                nn.Linear(cfg.dino_dim, D, bias=False), nn.LayerNorm(D), nn.ReLU(),
                nn.Linear(D, D, bias=False), nn.LayerNorm(D))
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.bidirectional = layers(cfg, qkv_bias=False, drop_probabilities=False)
        self.causal = layers(cfg, qkv_bias=True, drop_probabilities=True)

    def forward(self, patches: Tensor, dino_tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen_in_stage_1 = EVERYTHING  # of [queries; DINOv2; patches]
        seen_in_stage_2 = BEFORE  # of [queries; patches]

        B, _, h, w = patches.shape
        M, N = self.queries.shape[1], h * w
        parts = [self.queries.expand(B, -1, -1)]  # (B, M, D)
        if dino_tokens.shape[1] > 0:
            parts.append(self.dino_proj(dino_tokens))  # (B, 1 + n, D)
        parts.append(row_by_row(patches) + resize_positions(self.positions, h, w))  # (B, N, D)

        x = self.norm1(torch.cat(parts, dim=1))  # (B, M + 1 + n + N, D)
        for layer in self.bidirectional:
            x = layer(x, seen_in_stage_1)

        # The DINOv2 tokens have done their work.
        x = self.norm2(torch.cat([x[:, :M], x[:, -N:]], dim=1))  # (B, M + N, D)
        for layer in self.causal:
            x = layer(x, seen_in_stage_2)
        return x[:, :M], x[:, M:]  # (B, M, D), (B, N, D)


# ---- The quantizer, used twice: for global and for patch tokens ----------------------------------

class VectorQuantizer(nn.Module):
    """The nearest of V codes on the unit sphere (VQ-VAE, van den Oord et al. 2017; ViT-VQGAN).

    Another quantizer (FSQ, LFQ, ...) can take its place: name it in HitaTokenizer.__init__. It is
    called with the same three arguments, of which it may ignore some, and it has two methods:
    forward: z (B, T, C) -> codes (B, T, C) with a gradient to z, ids (B, T) below the codebook
    size of the configuration, and a loss, perhaps 0;
    lookup: ids (B, T) -> the same codes (B, T, C), up to rounding.
    Codes are in float32, also under autocast."""

    def __init__(self, size: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        codebook = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        self.codebook = nn.Parameter(F.normalize(codebook, dim=-1))  # (V, C)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # In bfloat16 one id in twenty would be another, so autocast is off here.
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)  # (B, T, C)
            codebook = F.normalize(self.codebook.float(), dim=-1)  # (V, C)
            # On the sphere the nearest code is the one with the largest cosine.
            ids = (z @ codebook.T).argmax(dim=-1)  # (B, T)
            codes = codebook[ids]  # (B, T, C)
            # This term moves the codes to the encoder's outputs,
            loss = F.mse_loss(codes, z.detach())
            # and this one, the commitment, keeps the outputs near their codes.
            loss = loss + self.beta * F.mse_loss(z, codes.detach())
            # Straight through: the values of the codes, with the gradient of z.
            return z + (codes - z).detach(), ids, loss

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> normalised codes (B, T, C)"""
        return F.normalize(self.codebook.float(), dim=-1)[ids]


# ---- Fusion with k-replacement -------------------------------------------------------------------

class Fusion(nn.Module):
    """Global tokens (B, M, D) and patch tokens (B, N, D) -> a state for each cell (B, N, D).

    Causal layers read [global; patch]. The decoder gets a window of N states that starts k
    positions before the first patch, so cell i is the state at position M - k + i:

        position   0 ... M-k  ...  M-1 | M   M+1 ... M+N-1-k | M+N-k ... M+N-1
        token      globals             | patches 0, 1, ...   | the last k patches
        cell             0    ...  k-1 | k   k+1 ... N-1     | -

    The first k cells are made of global tokens alone: cell i sees globals 0 to M - k + i, and cell
    k - 1 is the first to see all of them. A later cell i also sees the patches up to i - k. With
    k > 0 no cell sees its own patch. The last k patches reach no cell, yet the Llama predicts them
    like all others. All this is said of the states; the decoder then mixes all cells.

    The paper says that the decoder ignores the globals without this, at k = 0. On the small data
    of this repository that does not show."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D = cfg.latent_dim
        self.k = cfg.k
        self.global_positions = learned(cfg.num_global, D)
        self.positions = learned(cfg.grid ** 2, D)
        self.norm = nn.LayerNorm(D)
        self.layers = layers(cfg, qkv_bias=True, drop_probabilities=True)
        if cfg.vfm_recon:
            self.mask_token = learned(1, D)
            self.vfm_norm = nn.LayerNorm(D)
            self.vfm_proj = nn.Linear(D, cfg.dino_dim)

        # The released model starts like this here, and with torch's defaults in the extractor.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, global_tokens: Tensor, patch_tokens: Tensor,
                grid: tuple[int, int]) -> Tensor:
        seen = BEFORE  # of [global; patch]

        M, N = global_tokens.shape[1], patch_tokens.shape[1]
        global_tokens = global_tokens + self.global_positions  # (B, M, D)
        patch_tokens = patch_tokens + resize_positions(self.positions, *grid)  # (B, N, D)
        x = self.norm(torch.cat([global_tokens, patch_tokens], dim=1))  # (B, M + N, D)
        for layer in self.layers:
            x = layer(x, seen)

        first = M - self.k
        return x[:, first:first + N]  # (B, N, D)

    def reconstruct_features(self, global_tokens: Tensor, side: int) -> Tensor:
        """Hita-U: global tokens (B, M, D) -> DINOv2 patch features (B, side^2, dino_dim).

        The same layers read [global; mask tokens]. A global token sees the globals before it and
        no mask token, and a mask token sees everything. As in the released model, the globals have
        no positions here."""
        B, M, _ = global_tokens.shape
        T = M + side ** 2
        seen = torch.ones(T, T, dtype=torch.bool, device=global_tokens.device).tril()
        seen[M:] = True

        positions = resize_positions(self.positions, side, side)  # (1, side^2, D)
        mask_tokens = (self.mask_token + positions).expand(B, -1, -1)  # (B, side^2, D)
        x = self.vfm_norm(torch.cat([global_tokens, mask_tokens], dim=1))  # (B, M + side^2, D)
        for layer in self.layers:
            x = layer(x, seen)
        return self.vfm_proj(x[:, M:])  # (B, side^2, dino_dim)


# ---- The tokenizer -------------------------------------------------------------------------------

def evaluates(method):
    """Decorator: a method of a module that runs in eval mode and without gradients, whatever mode
    the module is in. Afterwards the mode is what it was, also after an error.

    Only the parts that are in train mode are switched, so that parts which a user holds in eval
    mode stay so. Threads must not share a model that is in train mode."""
    @wraps(method)
    def evaluating(self, *args, **kwargs):
        in_training = [module for module in self.modules() if module.training]
        try:
            for module in in_training:
                module.training = False
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            for module in in_training:
                module.training = True
    return evaluating


def without_tf32(device: torch.device):
    """Context in which a GPU computes in float32. torch's default for convolutions is TF32, with
    which about one id in a hundred would be another. While a model is compiled or exported it does
    nothing: there the caller has to see to it. It switches settings of the whole process, so
    threads should not encode on a GPU at once."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and newer
        switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        return temporarily(switches, "fp32_precision", "ieee")
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    return temporarily(switches, "allow_tf32", False)


@contextlib.contextmanager
def temporarily(owners: tuple, name: str, value):
    """Context in which this attribute of the owners has this value."""
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, before):
            setattr(owner, name, old)


@dataclass
class TokenizerOutput:
    """What the training forward of HitaTokenizer returns. The losses are differentiable scalars."""
    recon: Tensor                # (B, 3, H, W)
    codebook_loss: Tensor        # codebook and commitment terms of both quantizers
    feature_loss: Tensor | None  # Hita-U while training: 1 - cosine to DINOv2
    global_ids: Tensor           # (B, M)
    patch_ids: Tensor            # (B, N)
    global_latents: Tensor       # (B, M, C), what was quantized, without gradients
    patch_latents: Tensor        # (B, N, C)


class HitaTokenizer(nn.Module):
    """Images <-> M global and N patch token ids. With num_global = 0 it is a plain VQGAN.

    Encoding needs the frozen DINOv2 of the configuration, if there is one: see `attach_dino`. As a
    frozen part of another model hold it in eval mode: in train mode dropout is active, and the
    statistics of Centring follow the batches even where no parameter learns."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        # Where the training pictures and DINOv2 came from. load_tokenizer fills this in.
        self.sources = {"data": "", "dino_file": None}
        self.attach_dino(None)
        D, M = cfg.latent_dim, cfg.num_global

        self.encoder = Encoder(cfg)
        self.patch_down = nn.Linear(D, cfg.patch_code_dim)
        self.patch_centring = Centring(cfg.patch_code_dim) if cfg.centre else nn.Identity()
        self.patch_quantizer = VectorQuantizer(
            cfg.patch_codebook_size, cfg.patch_code_dim, cfg.beta)
        self.patch_up = nn.Linear(cfg.patch_code_dim, D)

        # Without global tokens there is no transformer.
        if M > 0:
            self.extractor = QueryExtractor(cfg)
            self.global_down = nn.Linear(D, cfg.global_code_dim)
            self.global_centring = (
                Centring(cfg.global_code_dim, M, per_position=True) if cfg.centre
                else nn.Identity())
            self.global_quantizer = VectorQuantizer(
                cfg.global_codebook_size, cfg.global_code_dim, cfg.beta)
            self.global_up = nn.Linear(cfg.global_code_dim, D)
            self.fusion = Fusion(cfg)
        self.decoder = Decoder(cfg)

        if cfg.revive_codes:
            self.patch_revival = CodeRevival(self.patch_quantizer)
            if M > 0:
                self.global_revival = CodeRevival(self.global_quantizer)

    def attach_dino(self, dino: nn.Module | None) -> None:
        """Set the frozen features: the DINOv2 of the configuration, or any other module that turns
        images (B, 3, H, W) in [-1, 1] into one token for the whole picture and n for its parts,
        (B, 1 + n, cfg.dino_dim), n a square. Its mode becomes eval, and it gets no gradient.
        Raises HitaError if the configuration has none."""
        if dino is not None:
            check(self.cfg.uses_dino, "this configuration has no place for frozen features: give "
                                      "dino a name, dino_dim their width, and have global tokens")
            dino.eval().requires_grad_(False)
        # Written into __dict__ it does not become a submodule, so no optimizer, average, DDP or
        # checkpoint sees it.
        self.__dict__["dino"] = dino

    @torch.no_grad()
    def dino_tokens(self, images: Tensor) -> Tensor:
        """Frozen features (B, 1 + n, dino_dim), or (B, 0, dino_dim) in a model without any.
        Raises HitaError if they are needed and not attached."""
        if not self.cfg.uses_dino:
            return images.new_zeros(images.shape[0], 0, self.cfg.dino_dim)
        check(self.dino is not None,
              f"encoding needs {self.cfg.dino}: hita.add_dino(tokenizer, file)")
        return self.dino.to(images.device)(images).type_as(images)

    def to_latents(self, images: Tensor, dino_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> what is to be quantized: global (B, M, C), patch (B, N, C)."""
        patches = self.encoder(images)  # (B, D, h, w)
        if self.cfg.num_global == 0:
            patch_z = self.patch_centring(self.patch_down(row_by_row(patches)))  # (B, N, C)
            return patch_z.new_zeros(patch_z.shape[0], 0, self.cfg.global_code_dim), patch_z
        queries, patches = self.extractor(patches, dino_tokens)  # (B, M, D), (B, N, D)
        global_z = self.global_centring(self.global_down(queries))  # (B, M, C)
        patch_z = self.patch_centring(self.patch_down(patches))  # (B, N, C)
        return global_z, patch_z

    def to_images(self, global_codes: Tensor, patch_codes: Tensor, grid: tuple) -> Tensor:
        """Quantized codes (B, M, C) and (B, N, C) -> images (B, 3, H, W)."""
        dtype = self.patch_up.weight.dtype  # perhaps half precision; codes are in float32
        x = self.patch_up(patch_codes.to(dtype))  # (B, N, D)
        if self.cfg.num_global > 0:
            x = self.fusion(self.global_up(global_codes.to(dtype)), x, grid)  # (B, N, D)
        return self.decoder(x.transpose(1, 2).unflatten(2, grid))  # (B, 3, H, W)

    @evaluates
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> global ids (B, M) and patch ids (B, N), row by row,
        int64.

        It raises HitaError for other images and for weights that are not finite, and warns where
        the pictures look like ones in [0, 1]."""
        check_images(images, self.cfg.stride, self.patch_up.weight.dtype)
        device = images.device
        # Float32, whatever the caller has on: otherwise some ids would be others.
        with torch.autocast(device.type, enabled=False), without_tf32(device):
            global_z, patch_z = self.to_latents(images, self.dino_tokens(images))
            patch_codes, patch_ids, _ = self.patch_quantizer(patch_z)  # ids (B, N)
            check_finite("the patch codes", patch_codes)
            if self.cfg.num_global == 0:
                return patch_ids[:, :0], patch_ids  # (B, 0), (B, N)
            global_codes, global_ids, _ = self.global_quantizer(global_z)  # ids (B, M)
            check_finite("the global codes", global_codes)
            return global_ids, patch_ids

    @evaluates
    def decode(self, global_ids: Tensor, patch_ids: Tensor,
               grid: tuple[int, int] | None = None) -> Tensor:
        """Global ids (B, M) and patch ids (B, N) -> images (B, 3, H, W) in about [-1, 1].

        grid: rows and columns of the patches; without it the grid is the model's own. Another
        square number of ids is taken for a square, with a warning. Neither the encoder nor DINOv2
        is needed. Raises HitaError where the ids do not fit."""
        M = self.cfg.num_global
        check_ids("patch ids", patch_ids, (None, None), self.cfg.patch_codebook_size)
        B, N = patch_ids.shape
        check_ids("global ids", global_ids, (B, M), self.cfg.global_codebook_size)
        grid = self.choose_grid(N) if grid is None else tuple(grid)
        check(math.prod(grid) == N and min(grid) > 0, f"{N} patch ids do not fill a grid of {grid}")

        patch_codes = self.patch_quantizer.lookup(patch_ids)  # (B, N, C)
        if M == 0:
            return self.to_images(patch_codes[:, :0], patch_codes, grid)
        return self.to_images(self.global_quantizer.lookup(global_ids), patch_codes, grid)

    def choose_grid(self, N: int) -> tuple[int, int]:
        """Rows and columns of N patch ids whose grid is not given."""
        side, own = math.isqrt(N), self.cfg.grid
        check(side ** 2 == N, f"{N} patch ids fill neither the model's own grid of {own} x {own} "
                              "nor a square: give grid=(rows, columns)")
        if side != own:
            warnings.warn(f"{N} patch ids are taken for a square of {side} x {side}, the model's "
                          f"own grid is {own} x {own}: give grid=(rows, columns)", stacklevel=4)
        return side, side

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Images (B, 3, H, W), for training: gradients pass through the codes. In train mode this
        moves the statistics of Centring and nothing else. Unused codes are moved by `revive`."""
        dino_tokens = self.dino_tokens(images)  # (B, 1 + n, dino_dim)
        global_z, patch_z = self.to_latents(images, dino_tokens)  # (B, M, C), (B, N, C)
        patch_codes, patch_ids, codebook_loss = self.patch_quantizer(patch_z)
        if self.cfg.num_global > 0:
            global_codes, global_ids, global_loss = self.global_quantizer(global_z)
            codebook_loss = codebook_loss + global_loss
        else:
            global_codes, global_ids = global_z, patch_ids[:, :0]  # (B, 0, C), (B, 0)

        # Hita-U: the global codes alone have to tell what DINOv2 saw.
        feature_loss = None
        if self.cfg.vfm_recon and self.training:
            target = dino_tokens[:, 1:].float()  # (B, n, dino_dim)
            side = math.isqrt(target.shape[1])
            global_tokens = self.global_up(global_codes)  # (B, M, D)
            features = self.fusion.reconstruct_features(global_tokens, side).float()
            cosine = F.cosine_similarity(target, features, dim=-1, eps=1e-6)  # (B, n)
            feature_loss = 1 - cosine.mean()

        f = self.cfg.stride
        grid = images.shape[2] // f, images.shape[3] // f
        recon = self.to_images(global_codes, patch_codes, grid)
        return TokenizerOutput(recon, codebook_loss, feature_loss, global_ids, patch_ids,
                               global_z.detach(), patch_z.detach())

    def revive(self, out: TokenizerOutput) -> None:
        """Move codes that are hardly used, if cfg.revive_codes says so. A training calls this with
        what forward returned, after the optimizer's step. See CodeRevival."""
        if self.cfg.revive_codes:
            self.patch_revival.step(self.patch_quantizer, out.patch_latents, out.patch_ids)
            if self.cfg.num_global > 0:
                self.global_revival.step(self.global_quantizer, out.global_latents, out.global_ids)


# ---- Losses and discriminator --------------------------------------------------------------------
#
# generator_losses in train_tokenizer.py weighs those of the generator: reconstruction, LPIPS,
# adversarial, codebook and, in Hita-U, feature loss. Its loop sums them.

def reconstruction_loss(images: Tensor, recon: Tensor) -> Tensor:
    """Twice the mean squared error, because the released code adds it at two places."""
    return 2 * F.mse_loss(recon.float(), images)


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) on a frozen VGG-16: images, recon (B, 3, H, W) -> scalar.

    Raises HitaError if the VGG weights cannot be had. pretrained=False takes random ones, for
    tests."""

    def __init__(self, pretrained: bool = True):
        super().__init__()
        import lpips  # here, because it is slow to import and needed in training only
        # The package's own function takes a root, whose gradient is NaN where a feature is 0.
        lpips.normalize_tensor = lambda x: x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt()
        warnings.filterwarnings("ignore", module="torchvision")  # lpips uses an old call
        try:
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
        except Exception as e:  # the network raises many kinds
            url = "https://download.pytorch.org/models/vgg16-397923af.pth"
            raise HitaError(f"cannot fetch VGG-16 for LPIPS: download {url} into "
                            f"{torch.hub.get_dir()}/checkpoints, or use --lpips-weight 0") from e
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        return self.lpips(images, recon).mean()


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) -> a logit per patch (B, 1, h', w')"""

    def __init__(self, width: int = 64):
        super().__init__()
        parts = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)
            parts += [conv, nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, nn.Conv2d(8 * width, 1, 4, 1, 1))

        # It starts with small weights, as in pix2pix.
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017) of the logits for real and for reconstructed images. It pushes
    real logits above 1 and fake ones below -1, and no further."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adversarial_loss(fake: Tensor) -> Tensor:
    """Non-saturating -log sigmoid(D(recon)), which the generator minimises."""
    return F.softplus(-fake.float()).mean()


# ---- The generator: a Llama (Touvron et al. 2023; for images Sun et al. 2024) --------------------

def position_rotations(num_global: int, grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (M + N, head_dim / 2) of the angles by which the channel pairs of queries and
    keys are turned, for each input:

        input 0 ... M-1     the class, the globals but the last   not turned: a learned position
        input M             the last global (the class if M = 0)  cos = sin = 0
        input M + 1 + i     patch i                               2-D RoPE: half of the pairs turn
                                                                  with its row, half with its column

    The released code leaves cos = sin = 0 at M, so query and key are zero there: this input looks
    at itself and all before it alike, and those after it give it a logit of 0. We keep that,
    because the released weights were trained with it."""
    pairs = head_dim // 2
    theta = 10000.0 ** (-2 * torch.arange(pairs // 2) / pairs)  # (pairs/2,)
    angle = torch.arange(grid)[:, None] * theta  # (grid, pairs/2)
    rows = angle.repeat_interleave(grid, 0)  # (N, pairs/2)
    columns = angle.repeat(grid, 1)  # (N, pairs/2)
    cells = torch.cat([rows, columns], dim=1)  # (N, pairs)

    # The last patch is never an input.
    angles = torch.cat([cells.new_zeros(num_global + 1, pairs), cells[:-1]])  # (M + N, pairs)
    cos, sin = angles.cos(), angles.sin()
    cos[num_global] = 0.0
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, heads, T, d) by the angles of cos, sin (T, d/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)  # (B, heads, T, d/2) each
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attention of queries (B, heads, T, d) to the keys and values that `visible` (T, S) shows, or
    causal attention without it. -> (B, heads, T, d)"""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale)


def pad_channels(x: Tensor) -> Tensor:
    """Zeros behind the channels (..., d), up to a multiple of 8, which fast attention wants. They
    change no result. Only size 2B, with 60 channels a head, needs them."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


class Positions(NamedTuple):
    """Where T inputs stand in the sequence, and what follows from it for every block."""
    index: Tensor  # (T,), from 0 to M + N - 1
    shift: Tensor  # (T, dim), the learned positions of inputs 0 ... M-1, zeros after them
    cos: Tensor  # (T, d/2), see position_rotations
    sin: Tensor  # (T, d/2)
    visible: Tensor | None  # (T, M + N), what each input sees of a cache; None is causal


class LlamaBlock(nn.Module):
    """Causal attention and SwiGLU, each behind a norm and with a residual.
    (B, T, dim) -> (B, T, dim)"""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        dim = cfg.dim
        hidden = (8 * dim // 3 + 255) // 256 * 256  # 8/3 of dim, rounded up
        self.heads = cfg.heads
        self.dropout = nn.Dropout(cfg.dropout)
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, at: Positions,
                cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """In training x is the whole sequence. In sampling it is what is new, and the cache holds
        the keys and values (B, heads, M + N, d) of the inputs before; x is added to it."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)  # (B, T, dim) each
        # Positions act on queries and keys only, in every block, and not on the residual stream.
        q = rotate(split_heads(q + at.shift, self.heads), at.cos, at.sin)  # (B, heads, T, d)
        k = rotate(split_heads(k + at.shift, self.heads), at.cos, at.sin)
        v = split_heads(v, self.heads)
        d = q.shape[-1]
        q, k, v = pad_channels(q), pad_channels(k), pad_channels(v)

        if cache is not None:
            keys, values = cache
            keys[:, :, at.index] = k.type_as(keys)
            values[:, :, at.index] = v.type_as(values)
            k, v = keys, values
        y = attend(q, k, v, at.visible, scale=d ** -0.5)[..., :d]  # (B, heads, T, d)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))  # (B, T, dim)

        # The feed-forward net, a SwiGLU.
        y = self.norm2(x)
        y = F.silu(self.w1(y)) * self.w3(y)  # (B, T, hidden)
        return x + self.dropout(self.w2(y))


class Llama(nn.Module):
    """Predicts the M global ids of a picture from its class, then its N patch ids. With M = 0 it is
    a plain LlamaGen.

    The inputs are class, global_0 ... global_M-1, patch_0 ... patch_N-2, and the state at position
    p predicts token p of global_0 ... patch_N-1. Each kind of token has embeddings and a head of
    its own. A loaded model knows the names of its `classes`."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.cfg = cfg
        M, dim = cfg.num_global, cfg.dim
        # There is one row more than classes: the last means "no class".
        self.class_embedding = nn.Embedding(cfg.num_classes + 1, dim)
        self.patch_embedding = nn.Embedding(cfg.patch_codebook_size, dim)
        self.patch_head = nn.Linear(dim, cfg.patch_codebook_size, bias=False)
        if M > 0:
            self.global_embedding = nn.Embedding(cfg.global_codebook_size, dim)
            self.global_head = nn.Linear(dim, cfg.global_codebook_size, bias=False)
            self.global_positions = nn.Embedding(M, dim)  # of inputs 0 ... M-1
        self.token_dropout = nn.Dropout(cfg.token_dropout)
        self.blocks = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        # The rotations are kept as the bits of their floats: a caller's llama.bfloat16() rounds
        # every floating-point tensor of a module, and rotations have to stay exact.
        rotations = torch.stack(position_rotations(M, cfg.grid, dim // cfg.heads))
        self.register_buffer("rotation_bits", rotations.view(torch.int32), persistent=False)
        self.kept_caches = None  # see compile_step

        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # With heads of zero all ids are equally likely at first.
                nn.init.normal_(module.weight, std=0.0 if name.endswith("_head") else 0.02)

    def embed(self, class_ids: Tensor, global_ids: Tensor, patch_ids: Tensor) -> Tensor:
        """Class ids (B,), ids (B, m) and (B, n) -> embeddings (B, 1 + m + n, dim).

        For another condition than a class, replace class_embedding by a module that turns the
        condition into (B, dim). forward and generate write cfg.num_classes for "no class": replace
        that by the value that means "none" in yours. generate also checks its first argument as
        class ids."""
        parts = [self.class_embedding(class_ids)[:, None]]  # (B, 1, dim)
        if self.cfg.num_global > 0:
            parts.append(self.global_embedding(global_ids))  # (B, m, dim)
        parts.append(self.patch_embedding(patch_ids))  # (B, n, dim)
        return torch.cat(parts, dim=1)

    def backbone(self, x: Tensor, index: Tensor, caches: list[tuple] | None = None) -> Tensor:
        """Embedded inputs (B, T, dim) at positions (T,) -> normalised states (B, T, dim)."""
        M = self.cfg.num_global
        shift = x.new_zeros(1, 1)
        if M > 0:
            shift = self.global_positions(index.clamp(max=M - 1))  # (T, dim)
            shift = shift.masked_fill((index >= M)[:, None], 0.0)
        cos, sin = self.rotation_bits.view(torch.float32)[:, index]  # (T, d/2) each
        visible = None
        if caches is not None:
            # The caches have room for the whole picture. An input at position p may look at entries
            # 0 to p; those after it are not written yet.
            entries = torch.arange(self.cfg.num_tokens, device=x.device)  # (M + N,)
            visible = entries <= index[:, None]  # (T, M + N)
        at = Positions(index, shift, cos, sin, visible)

        for i, block in enumerate(self.blocks):
            x = block(x, at, None if caches is None else caches[i])
        return self.norm(x)

    def forward(self, class_ids: Tensor, global_ids: Tensor,
                patch_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Class ids (B,), global ids (B, M), patch ids (B, N) -> logits (B, M, V), (B, N, V).
        Training drops class labels with probability class_dropout."""
        M = self.cfg.num_global
        # Guidance needs to know what the model says without the class.
        if self.training:
            drop = torch.rand(len(class_ids), device=class_ids.device) < self.cfg.class_dropout
            class_ids = class_ids.masked_fill(drop, self.cfg.num_classes)

        x = self.embed(class_ids, global_ids, patch_ids[:, :-1])  # (B, M + N, dim)
        x = self.backbone(self.token_dropout(x), torch.arange(x.shape[1], device=x.device))
        patch_logits = self.patch_head(x[:, M:])  # (B, N, V)
        if M == 0:
            return patch_logits[:, :0], patch_logits  # (B, 0, V), (B, N, V)
        return self.global_head(x[:, :M]), patch_logits  # (B, M, V), (B, N, V)

    @evaluates
    def generate(self, class_ids: Tensor, cfg_scale: float | Tensor = 1.0,
                 given: Tensor | None = None, seed: int | None = None,
                 random: Tensor | None = None, released_sampling: bool = False,
                 progress: bool = False, **filters) -> tuple[Tensor, Tensor]:
        """Draw pictures of classes (B,), int64 -> global ids (B, M), patch ids (B, N).

        cfg_scale: strength of classifier-free guidance (Ho & Salimans 2022), 1 is without; a
          tensor (M + N,) has one for each token.
        given: the first P ids of each picture (B, P).
        seed: makes the random numbers those of random_numbers; without it torch's global generator
          decides, so that two calls differ and torch.manual_seed repeats them.
        random: the random numbers themselves, uniform in [0, 1), (B, M + N).
        released_sampling: embed the last global token as a patch, as the released code does by
          mistake.
        filters: the arguments of filter_logits; top_k=1 always takes the likeliest id.
        Raises HitaError for ids, guidance or filters that are out of range, and for logits that are
        not finite."""
        cfg = self.cfg
        M, total, B = cfg.num_global, cfg.num_tokens, len(class_ids)
        device = class_ids.device
        filter_logits(torch.zeros(1, 1), **filters)  # what is wrong with the filters shows here

        check_ids("class ids", class_ids, (None,), cfg.num_classes)
        ids = class_ids.new_empty(B, 0) if given is None else given  # (B, P)
        check_ids("given global ids", ids[:, :M], (B, None), cfg.global_codebook_size)
        check_ids("given patch ids", ids[:, M:], (B, None), cfg.patch_codebook_size)
        check(ids.shape[1] <= total, f"{ids.shape[1]} ids are given, a picture has {total}")
        if random is None:
            random = (torch.rand(B, total, device=device) if seed is None
                      else random_numbers(class_ids, total, seed))
        check(random.shape == (B, total), f"random is {tuple(random.shape)}, not {(B, total)}")
        sizes = cfg.global_codebook_size, cfg.patch_codebook_size
        check(not released_sampling or sizes[0] == sizes[1],
              f"released_sampling needs codebooks of one size, not {sizes}")

        # Guidance predicts with the class and without it, in one batch [with; without].
        prompt_classes, prompt_ids = class_ids, ids
        scale = None
        if isinstance(cfg_scale, Tensor) or cfg_scale != 1:
            scale = torch.as_tensor(cfg_scale, dtype=torch.float32, device=device)
            check(scale.shape in ((), (total,)),
                  f"cfg_scale is of shape {tuple(scale.shape)}, it must be a number or ({total},)")
            check(bool((scale >= 0).all()), f"cfg_scale is {cfg_scale}, it must be 0 or more")
            scale = scale.expand(total)
            check(cfg.class_dropout > 0, "this model was trained with class_dropout 0 and cannot "
                                         "be guided: use cfg_scale 1")
            no_class = torch.full_like(class_ids, cfg.num_classes)
            prompt_classes = torch.cat([class_ids, no_class])  # (2B,)
            prompt_ids = torch.cat([ids, ids])  # (2B, P)

        # The prompt, the class and the given ids, is read at once; then it goes on id by id.
        num_as_global = max(0, M - 1) if released_sampling else M
        x = self.embed(prompt_classes, prompt_ids[:, :num_as_global], prompt_ids[:, num_as_global:])
        index = torch.arange(x.shape[1], device=device)  # (1 + P,)
        caches = self.make_caches(len(x))
        finite = torch.ones((), dtype=torch.bool, device=device)
        for p in tqdm(range(ids.shape[1], total), "tokens", disable=not progress, leave=False):
            token, x, step_finite = self.step(
                x, index, caches, random[:, p, None], scale, p < M, **filters)
            if released_sampling and p == M - 1:
                x = self.patch_embedding(token if scale is None else torch.cat([token, token]))
            ids = torch.cat([ids, token], dim=1)  # (B, p + 1)
            finite = finite & step_finite  # asked below: asking here would wait for the device
            x, index = x.clone(), index[-1:] + 1  # a CUDA graph overwrites its outputs next time
        check(bool(finite), "the logits are not finite: a weight may be NaN, or the range of "
                            "float16 too small for this model (bfloat16 has more)")
        return ids[:, :M], ids[:, M:]

    def step(self, x: Tensor, index: Tensor, caches: list[tuple], random: Tensor,
             scale: Tensor | None, is_global: bool, **filters) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B or 2B, T, dim) at positions (T,), random numbers (B, 1) -> the next token
        (B, 1), the same embedded as the next input (B or 2B, 1, dim), whether logits were finite.

        is_global: whether the next token is a global one. Between two steps only tensors and the
        kind of the token change. So a step is compiled once for each kind, and once more for a
        prompt of given ids."""
        logits = self.next_logits(x, index, caches, scale, is_global)  # (B, V)
        token = draw(filter_logits(logits, **filters).softmax(dim=-1), random)  # (B, 1)
        embedding = self.global_embedding if is_global else self.patch_embedding
        embedded = embedding(token)  # (B, 1, dim)
        if scale is not None:
            embedded = torch.cat([embedded, embedded])  # (2B, 1, dim)
        return token, embedded, logits.isfinite().all()

    def next_logits(self, x: Tensor, index: Tensor, caches: list[tuple], scale: Tensor | None,
                    is_global: bool) -> Tensor:
        """Inputs at positions (T,) -> logits (B, V) of the token that follows them. With a scale
        (M + N,) x is [with the class; without], and the logits are guided."""
        state = self.backbone(x, index, caches)[:, -1]  # (B or 2B, dim)
        head = self.global_head if is_global else self.patch_head
        logits = head(state).float()  # (B or 2B, V)
        if scale is None:
            return logits
        # Away from what the model would say without the class.
        cond, uncond = logits.chunk(2)
        return uncond + scale[index[-1:]] * (cond - uncond)

    def make_caches(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each block for all inputs, (batch, heads, M + N, d), zeros. A compiled
        model has one set and uses it again, because CUDA graphs want it to stay where it is."""
        cfg, kept, like = self.cfg, self.kept_caches, self.norm.weight
        if kept:
            old = kept[0][0]
            if (len(old), old.dtype, old.device) == (batch, like.dtype, like.device):
                for keys, values in kept:
                    keys.zero_()
                    values.zero_()
                return kept

        d = pad_channels(torch.empty(cfg.dim // cfg.heads)).shape[0]  # as in LlamaBlock
        # Tensors made in inference_mode could not be used outside of it. They are made one by one:
        # compiled, parts of a common tensor would be copied at each step.
        with torch.inference_mode(False):
            caches = []
            for _ in self.blocks:
                keys = like.new_zeros(batch, cfg.heads, cfg.num_tokens, d)
                caches.append((keys, torch.zeros_like(keys)))
        if kept is not None:
            for keys, values in caches:
                torch._dynamo.mark_static_address(keys, guard=False)
                torch._dynamo.mark_static_address(values, guard=False)
            self.kept_caches = caches
        return caches

    def compile_step(self) -> None:
        """Compile sampling, on a GPU into CUDA graphs. From then on one thread at a time may draw,
        since all share the caches."""
        self.step = torch.compile(self.step, mode="reduce-overhead", fullgraph=True)
        self.kept_caches = []


def random_numbers(class_ids: Tensor, length: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), one for each token, of pictures of classes (B,) -> (B, length).

    The j-th picture of class c gets those of (seed, c, j), whatever else is drawn beside it."""
    rows, count = [], Counter()
    for c in class_ids.tolist():
        generator = np.random.default_rng((seed, c, count[c]))
        rows.append(generator.random(length, dtype=np.float32))
        count[c] += 1
    return torch.from_numpy(np.array(rows)).to(class_ids.device)


def draw(probs: Tensor, random: Tensor) -> Tensor:
    """Probabilities (B, V), uniform numbers in [0, 1) (B, 1) -> ids (B, 1).

    The id is the first whose cumulative sum exceeds the random number. Unlike torch.multinomial
    this takes its random numbers as an argument, so that a picture does not depend on those that
    are drawn beside it, and a GPU draws what a CPU draws."""
    # Zeros here mean that an id of probability 0 can never exceed the target.
    sums = cumulative_sums(probs).masked_fill(probs == 0, 0.0)
    # The largest sum is 1 but for rounding. Scaled by it, the target stays below it.
    target = random * sums.amax(dim=-1, keepdim=True)
    # Of equal values argmax takes the first.
    return (sums > target).int().argmax(dim=-1, keepdim=True)


def cumulative_sums(probs: Tensor) -> Tensor:
    """Cumulative sums (B, V) by doubling (Hillis & Steele): after each round an entry is the sum of
    twice as many.

    torch.cumsum is refused by torch 2.6 on a GPU where deterministic algorithms are asked for, and
    torch 2.11 cannot compile one of 16,384 numbers."""
    sums, width = probs, 1
    while width < probs.shape[-1]:
        sums = sums + F.pad(sums[:, :-width], (width, 0))
        width *= 2
    return sums


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0,
                  top_p: float = 1.0) -> Tensor:
    """Logits (B, V) -> divided by the temperature, and -inf where they are filtered out.

    top_k keeps the k largest (and ties), 0 keeps all. Of these top_p keeps the largest until their
    probability exceeds p. A temperature below 1e-6 counts as 1e-6, which always takes the
    likeliest. A new argument here is one of generate, too.
    Raises HitaError for what is out of range."""
    check(temperature >= 0, f"temperature is {temperature}, it must be 0 or more")
    check(top_k >= 0, f"top_k is {top_k}, it must be 0 or more")
    check(0 <= top_p <= 1, f"top_p is {top_p}, it must be from 0 to 1")

    logits = logits / max(temperature, 1e-6)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        # Those that come after p has been exceeded go; the one that exceeds it stays.
        beyond = cumulative_sums(probs) - probs > top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logits


def llama_losses(global_logits: Tensor, patch_logits: Tensor, global_ids: Tensor,
                 patch_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of global tokens, 0 if there are none, and of patch tokens.

    Their sum is trained, so in the released model a global token weighs N / M = 3.4 patch tokens.
    With --global-weight M / N in train_ar.py all tokens weigh the same."""
    patch_loss = F.cross_entropy(patch_logits.flatten(0, 1).float(), patch_ids.flatten())
    if global_ids.shape[1] == 0:
        return torch.zeros_like(patch_loss), patch_loss
    global_loss = F.cross_entropy(global_logits.flatten(0, 1).float(), global_ids.flatten())
    return global_loss, patch_loss


# ---- Not in the paper: centring and revival, for short trainings on small data -------------------

class Centring(nn.Module):
    """Shift and scale each channel to mean 0 and variance 1 over the batch, like a BatchNorm
    without weights. (B, T, C) -> (B, T, C) in float32

    Early in training a query's vector depends far more on which query it is than on the picture.
    Its nearest code would be the same for every picture, and the decoder would learn to ignore it.
    With per_position=True each of the `positions` has statistics of its own, as global tokens
    need. Patch tokens share one set.

    In train mode the statistics are those of the batch, over all processes, and running averages
    follow them, as in BatchNorm once for each forward, also for the second one of checkpointing.
    Eval mode uses the averages. Raises HitaError in train mode for a batch of one picture."""

    def __init__(self, dim: int, positions: int = 1, per_position: bool = False):
        super().__init__()
        self.per_position = per_position
        self.register_buffer("mean", torch.zeros(positions if per_position else 1, dim))
        self.register_buffer("var", torch.ones(positions if per_position else 1, dim))

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            mean, var = self.mean.float(), self.var.float()  # (positions or 1, C) both
            if self.training:
                check(len(z) * world() > 1, "centring needs two pictures: raise --batch-size")
                dims = (0,) if self.per_position else (0, 1)
                # Gradients flow through both statistics. Without them a shift common to all
                # pictures would cost nothing, and grow.
                mean = AllMean.apply(z.mean(dims, keepdim=True))[0]
                var = AllMean.apply((z - mean).square().mean(dims, keepdim=True))[0]
                with torch.no_grad():
                    n = world() * z[..., 0].numel() // len(mean)  # values behind each statistic
                    self.mean.lerp_(mean.type_as(self.mean), 0.01)
                    self.var.lerp_((var * n / (n - 1)).type_as(self.var), 0.01)
            return (z - mean) * (var + 1e-5).rsqrt()


class CodeRevival(nn.Module):
    """Keeps a small codebook alive: after each step of a training, codes that were hardly ever
    nearest, and at first all codes, are put onto some of the encoder's outputs.

    It stands beside a quantizer, which needs a parameter `codebook` (V, C). Only the directions of
    its rows matter. Raises HitaError for a quantizer that has none."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        check(hasattr(quantizer, "codebook"), f"{type(quantizer).__name__} has no codebook whose "
                                              "codes could be revived: use --no-revive-codes")
        self.register_buffer("hits", torch.zeros(len(quantizer.codebook)))  # (V,)

    @torch.no_grad()
    def step(self, quantizer: nn.Module, z: Tensor, ids: Tensor) -> None:
        """z (B, T, C) is what was quantized, to ids (B, T). A frozen codebook never moves, whether
        it is frozen by eval mode or by requires_grad_(False)."""
        codebook = quantizer.codebook
        if not (quantizer.training and codebook.requires_grad):
            return

        # A use is forgotten after 22 steps, when it counts less than 0.1. Dead codes are looked for
        # before the ids of this step are counted, so that the first step moves all of them, since
        # they are random.
        self.hits *= 0.9
        dead = self.hits < 0.1  # (V,)
        counts = all_sum(count_ids(ids, len(dead)).sum(dim=0))  # (V,)
        self.hits += counts.masked_fill(dead, 0.0)
        self.hits.masked_fill_(dead, 1.0)

        # The first process chooses from the outputs of all, so that the codebooks stay the same.
        z = F.normalize(z.float(), dim=-1).flatten(0, 1)  # (B*T, C)
        of_all = z.new_zeros(world(), *z.shape)
        of_all[rank()] = z
        z = all_sum(of_all).flatten(0, 1)  # (world * B*T, C)
        choice = torch.randint(len(z), dead.shape, device=z.device)
        choice = all_sum(choice * (rank() == 0))
        codebook.copy_(torch.where(dead[:, None], z[choice].type_as(codebook), codebook))


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each id stands at each position: (B, T) -> (T, size)."""
    counts = torch.zeros(ids.shape[1], size, device=ids.device)
    return counts.scatter_add_(1, ids.T, torch.ones_like(ids.T, dtype=counts.dtype))


# ==== PART 2: WHAT THE SCRIPTS SHARE =============================================================
#
# Checks; processes and errors; pictures; training; checkpoints; the released files; the command
# line.


# ---- Checks: what would otherwise be silently wrong ----------------------------------------------
#
# They look at shapes and at values. A compiler or an exporter has no values, so there only shapes
# are checked.

def check_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], size: int) -> None:
    """Raises HitaError unless ids are int64, from 0 to size - 1, and of this shape; None fits any
    number.

    Without this check an id that is too large stops a GPU with a message about something else."""
    same_shape = ids.dim() == len(shape) and all(
        wanted is None or wanted == found for wanted, found in zip(shape, ids.shape))
    check(ids.dtype == torch.int64 and same_shape,
          f"{name} are {ids.dtype} of shape {tuple(ids.shape)}, they must be int64 of {shape}")
    if not torch.compiler.is_compiling():
        outside = ids[(ids < 0) | (ids >= size)]
        check(len(outside) == 0, f"{name} must be from 0 to {size - 1}, not {outside[:3].tolist()}")


def check_images(images: Tensor, stride: int, dtype: torch.dtype) -> None:
    """Raises HitaError unless images are (B, 3, H, W) with sides that are multiples of the stride,
    and in [-1, 1]. Warns where they look like pictures in [0, 1], which would be encoded as pale
    ones: their darkest pixel is about 0, while a bright photograph's may be anywhere above."""
    check(images.dtype == dtype, f"images are {images.dtype}, the weights are {dtype}: "
                                 "load_picture makes such images, or x / 127.5 - 1 of bytes")
    sides_fit = images.dim() == 4 and images.shape[1] == 3 and not any(
        side % stride for side in images.shape[2:])
    check(sides_fit, f"images are {tuple(images.shape)}, they must be (B, 3, H, W) with H and W "
                     f"multiples of {stride}")
    if not torch.compiler.is_compiling():
        low, high = images.min(), images.max()
        check(low > -2 and high < 2, f"pixels are {low:.3g} to {high:.3g}, they must be in [-1, 1]")
        if 0 <= low < min(0.1, high):
            warnings.warn("no pixel is below 0: of pictures in [0, 1] encode 2 * x - 1",
                          stacklevel=4)


def check_finite(name: str, x: Tensor) -> None:
    """Raises HitaError if a value is NaN or infinite. The id of such a code is arbitrary."""
    if not torch.compiler.is_compiling():
        check(bool(x.isfinite().all()), f"{name} are not finite: a weight may be NaN, or the range "
                                        "of float16 too small for this model (bfloat16 has more)")


# ---- Processes -----------------------------------------------------------------------------------
#
# N processes of torchrun compute what one would. Each takes its share of a batch (batch), DDP
# averages the gradients (distribute), AllMean the statistics of centring, Log its figures, the
# first process chooses the revived codes, and all of them stop after the same step (Stop.asked).
# Two things differ: each process drops out other units (seed_step), and the discriminator's
# BatchNorm sees its own share of the batch only.

def rank() -> int:
    """Index of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


class AllMean(torch.autograd.Function):
    """Mean over all processes, with a gradient, which torch's own all_reduce does not have."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_sum(x.clone()) / world()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The mean again, because the losses of all processes depend on this x."""
        return all_sum(grad.clone()) / world()


def barrier() -> None:
    """Wait until every process is here."""
    all_sum(torch.zeros(1))


def print_once(text: str) -> None:
    """Print a line, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def set_up_device(name: str | None) -> torch.device:
    """The named device, or the best there is. Under torchrun it joins the other processes.
    Raises HitaError if there is no such device."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        check(device.type in ("cuda", "mps", "cpu"), "it is not cuda, mps or cpu")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise HitaError(
            f"there is no device {name} here ({first_line(e)}): try --device cpu") from e

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and not has_bfloat16(device):
        print_once("this GPU only emulates bfloat16: everything is computed in float32")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16. Those before Ampere only emulate it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def distribute(model: nn.Module) -> nn.Module:
    """The model, wrapped by DistributedDataParallel where there are several processes."""
    if world() == 1:
        return model
    # DDP's own optimizer for compiled models fails with --recompute in torch 2.6.
    torch._dynamo.config.optimize_ddp = False
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # As an argument of the constructor this warns on new versions of torch.
    model.broadcast_buffers = False
    return model


def use_compile(asked: bool | None, model: nn.Module, device: torch.device) -> bool:
    """Whether to compile: as asked, else on CUDA for models above 20 million parameters."""
    if asked is not None:
        return asked
    return device.type == "cuda" and sum(p.numel() for p in model.parameters()) > 20e6


# ---- How a run ends ------------------------------------------------------------------------------

class Stop:
    """With this, SIGTERM and Ctrl-C let the step end and the run be saved. A second Ctrl-C ends the
    run at once. After the with block the signals do again what they did before."""

    def __enter__(self):
        self.signalled = torch.zeros(1)
        self.before = {number: signal.signal(number, self.handle)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        """A signal has come."""
        self.signalled += 1
        # print is not allowed here: the signal may have come in the middle of another print.
        os.write(2, b"stopping after this step\n")
        # torchrun passes each Ctrl-C on, so under torchrun a second one may not be meant.
        if world() == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self) -> bool:
        """Whether any process was told to stop. All processes get the same answer."""
        return all_sum(self.signalled.clone()).item() > 0


def ignore_signals(worker: int) -> None:
    """For the processes of a loader: the last step may still need their batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def run_script(main) -> None:
    """Call a script's main. A HitaError ends it in one line and with status 2, anything else in its
    traceback. Either way all its processes end."""
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except HitaError as e:
        # One that comes from a loader's process is the last line of that process's traceback.
        text = str(e).rpartition("hita.HitaError: ")[2].strip()
        print("error:", text, file=sys.stderr, flush=True)
        status = 2
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        end_loaders()

    sys.stdout.flush()
    sys.stderr.flush()
    if world() > 1:
        # Leaving in the usual way would wait for the other processes, perhaps for ever. Where they
        # are well, all of them have done their last common step here.
        os._exit(status)
    if status:
        sys.exit(status)


def end_loaders() -> None:
    """End the processes of all loaders. Python would wait for them for ever."""
    # torch's own handler would raise an error when one of them ends.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for loader in torch.multiprocessing.active_children():
        loader.kill()
        loader.join()


# ---- Pictures ------------------------------------------------------------------------------------

EMBEDDED = Path(__file__).parent / "data" / "prints64.zip"
PICTURES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif", ".jp2")
warnings.filterwarnings("ignore", module="PIL")  # it warns of faults in files that do no harm


def embedded_data() -> Path:
    """The folder of the embedded pictures, unpacked beside the zip at first use."""
    folder = EMBEDDED.with_suffix("")
    if rank() == 0 and not folder.is_dir():
        temporary = folder.with_suffix(f".{os.getpid()}.tmp")
        shutil.unpack_archive(EMBEDDED, temporary)
        with contextlib.suppress(OSError):  # another run may have been faster
            os.replace(temporary, folder)
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    return folder


def on_white(image: Image.Image) -> Image.Image:
    """A picture of 8 bits as RGB, upright by its EXIF data, on white where it is transparent.
    Raises HitaError for other numbers of bits."""
    check(image.mode[0] not in "IF", f"its pixels are {image.mode}: save it with 8 bits")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF blocks raise nearly everything, and the picture may be fine
        pass
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(picture, side: int | None = None) -> Image.Image:
    """A file (its name, or an open one) or a PIL picture -> as on_white gives it.

    side: how many pixels the shorter side will be scaled to, where this is known. A large JPEG is
    then read at a half, a quarter or an eighth of its size, but at no less than twice `side`. One
    of 12 megapixels is read and scaled in a fifth of the time.
    Raises HitaError if it cannot be read."""
    if isinstance(picture, Image.Image):
        return on_white(picture)
    try:
        image = Image.open(picture)
        if side is not None:
            image.draft(None, (2 * side, 2 * side))
        image.load()
    except Exception as e:  # damaged files raise nearly everything, in Pillow
        raise HitaError(f"the picture {picture} cannot be read: {first_line(e)}") from e
    try:
        return on_white(image)
    except HitaError as e:
        raise HitaError(f"the picture {picture} cannot be used: {e}") from e


def crop_square(image: Image.Image, size: int, rng: np.random.Generator | None = None,
                crop_range: float = 1.0) -> Tensor:
    """A picture -> (3, size, size) in [-1, 1].

    Without rng it is the centre, as in ADM's evaluation. With rng it is a random square whose side
    is between crop_range of the picture's smaller side and all of it."""
    side = size
    if rng is not None:
        side = rng.integers(size, math.ceil(size / crop_range) + 1)

    # Halving as long as possible avoids aliasing.
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = ImageOps.scale(image, side / min(image.size), Image.Resampling.BICUBIC)

    spare_x, spare_y = image.width - size, image.height - size
    if rng is None:
        x, y = spare_x // 2, spare_y // 2
    else:
        x, y = int(rng.integers(spare_x + 1)), int(rng.integers(spare_y + 1))
    image = image.crop((x, y, x + size, y + size))
    return TF.pil_to_tensor(image).float() / 127.5 - 1  # (3, size, size)


def load_picture(picture, size: int) -> Tensor:
    """A file or PIL picture -> its centre (1, 3, size, size) in [-1, 1].
    Raises HitaError if it cannot be read."""
    return crop_square(read_picture(picture, size), size)[None]


def to_uint8(images: Tensor) -> Tensor:
    """Images in about [-1, 1] -> the nearest pixel values 0 ... 255."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def picture_grid(images: Tensor, columns: int = 8) -> Image.Image:
    """Images (B, 3, H, W), uint8 or in about [-1, 1] -> a grid as a PIL picture."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    grid = torchvision.utils.make_grid(pixels.cpu(), columns, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def psnr(images: Tensor, recon: Tensor) -> Tensor:
    """PSNR in dB of recon (B, 3, H, W), clamped, to images (B, 3, H, W) in [-1, 1] -> (B,)"""
    mse = (images - recon.clamp(-1, 1)).float().square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))  # 4, since the values span 2


class Pictures(torch.utils.data.Dataset):
    """DIR/<split>/<class>/<picture>, with the folders of DIR/train as the classes of every split.

    data[i] is the plain picture i, an image (3, size, size) in [-1, 1], and its class. A training
    asks for data[epoch, i]. With augment=True its crop and flip follow from (seed, epoch, i) and
    nothing else, so that a resumed run sees the same pictures; without it epoch 0 is the plain
    picture, epoch 1 its mirror image, and later ones are augmented.
    A picture that cannot be read is named, and the next one stands in.
    Raises HitaError if there are no pictures, or if twenty in a row, or all, cannot be read."""

    def __init__(self, root: str | Path, split: str, size: int, augment: bool = False,
                 crop_range: float = 1.0, seed: int = 0):
        self.root = Path(root) / split
        self.split = split
        self.size = size
        self.augment = augment
        self.crop_range = crop_range
        self.seed = seed
        check(0 < crop_range <= 1, f"crop_range is {crop_range}, it must be above 0 and at most 1")

        train = Path(root) / "train"
        check(train.is_dir(), f"there is no folder {train}: put pictures into {train}/<class>/")
        self.classes = sorted(entry.name for entry in os.scandir(train)
                              if entry.is_dir() and not entry.name.startswith("."))
        check(len(self.classes) > 0, f"{train} has no folders: put pictures into {train}/<class>/")
        labels = {name: label for label, name in enumerate(self.classes)}

        def is_picture(path: str) -> bool:
            hidden = f"{os.sep}." in path[len(str(self.root)):]
            return path.lower().endswith(PICTURES) and not hidden

        # A validation split may lack classes. In train an empty class would never be learned.
        try:
            self.samples = make_dataset(self.root, labels, is_valid_file=is_picture,
                                        allow_empty=split != "train")  # (path, label)
        except (FileNotFoundError, ValueError) as e:
            raise HitaError(f"{self.root}/<class>/: {first_line(e)}") from e
        check(len(self.samples) > 0, f"there are no pictures in {self.root}/<class>/")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, side: int) -> tuple[Image.Image, int]:
        """The picture, or the next one that can be read, for scaling to this side; its class."""
        tries = min(20, len(self))
        for i in range(index, index + tries):
            path, label = self.samples[i % len(self)]
            try:
                return read_picture(path, side), label
            except HitaError as e:
                print("skipped:", e, file=sys.stderr, flush=True)
        raise HitaError(f"no picture from {self.samples[index][0]} on can be read: {tries} in a "
                        "row were tried")

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        plain = not isinstance(item, tuple)
        epoch, index = (0, item) if plain else item
        if not 0 <= index < len(self):
            # Python asks a for loop over the data to end by this error.
            raise IndexError(f"there are {len(self)} pictures, number {index} is asked for")

        if epoch > 1 or (self.augment and not plain):
            rng = np.random.default_rng((self.seed, epoch, index))
            image, label = self.read(index, math.ceil(self.size / self.crop_range))
            image = crop_square(image, self.size, rng, self.crop_range)
            flip = rng.random() < 0.5
        else:
            image, label = self.read(index, self.size)
            image = crop_square(image, self.size)
            flip = epoch == 1
        return image.flip(-1) if flip else image, label


def validation_pictures(train: Pictures) -> Pictures:
    """The pictures in val or, where there is no val, 1,000 to 2,000 of train (or all), spread over
    all classes. Raises HitaError if val is there and empty."""
    root = train.root.parent
    if (root / "val").is_dir():
        return Pictures(root, "val", train.size)

    print_once(f"{root} has no val: figures called train_... are of training pictures")
    pictures = copy.copy(train)
    pictures.samples = train.samples[::max(1, len(train) // 1000)]
    return pictures


@lru_cache(2)
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the data in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def batch(step: int, length: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index) of the pictures of this process in a step. The arguments alone decide it.
    Raises HitaError if the processes cannot share the batch."""
    check(batch_size % world() == 0,
          f"batch_size is {batch_size}, no multiple of {world()} processes")
    share = batch_size // world()
    first = (step - 1) * batch_size + rank() * share
    items = []
    for position in range(first, first + share):
        epoch, place = divmod(position, length)
        items.append((epoch, epoch_order(length, seed, epoch)[place].item()))
    return items


# Arrays of pictures for evaluation: all processes fill one file, which is then packed.

def picture_array(path: Path, count: int, size: int) -> np.ndarray:
    """Zeros (count, size, size, 3) uint8 in a file beside path, for all processes to fill.
    Raises HitaError if it cannot be written."""
    raw = path.with_name(f".{path.name}.raw")
    if rank() == 0:
        write_file(raw, lambda f: np.save(f, np.zeros((count, size, size, 3), np.uint8)))
    barrier()
    return np.lib.format.open_memmap(raw, "r+")


def pack_pictures(path: Path, *labels: np.ndarray) -> None:
    """Pack the array of picture_array as .npz: the pictures as arr_0, as ADM has them, labels as
    arr_1."""
    barrier()
    if rank() == 0:
        raw = path.with_name(f".{path.name}.raw")
        write_file(path, lambda f: np.savez(f, np.load(raw, mmap_mode="r"), *labels))
        raw.unlink()
    barrier()


# ---- Training ------------------------------------------------------------------------------------

def seed_step(seed: int, step: int) -> None:
    """Seed torch from (seed, step, process), so that no random state has to be saved."""
    state = np.random.SeedSequence((seed, step, rank())).generate_state(1)
    torch.manual_seed(state.item())


def learning_rate(step: int, recipe) -> float:
    """A linear warm-up from 1e-7, then a cosine from lr to lr_final. Steps count from 1."""
    if step <= recipe.warmup:
        return 1e-7 + step * (recipe.lr - 1e-7) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    last = min(recipe.lr, recipe.lr_final)
    return last + (recipe.lr - last) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * model of the parameters; buffers are copied.

    In the first steps the decay is smaller. Otherwise the average would stay near the random start
    for long."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for averaged, current in zip(ema.buffers(), model.buffers()):
        averaged.copy_(current)


def optimizer_step(optimizer: torch.optim.Optimizer, model: nn.Module, clip: float) -> Tensor:
    """Clip the gradients and take a step -> their norm before. Whether it is finite is asked where
    the log is written, before anything is saved: asking here would make a GPU wait at each step."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return norm


def usage(name: str, counts: Tensor) -> dict[str, float]:
    """Counts of ids at each position (T, V) -> the share of codes in use, and bits: the mean
    entropy of an id at its position. The share can be 1 although each position always has the same
    id; bits are 0 then."""
    counts = counts.cpu().double()  # MPS has no float64
    p = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    bits = torch.special.entr(p).sum(dim=1).mean() / math.log(2)
    used = (counts.sum(dim=0) > 0).double().mean()
    return {f"{name}_use": used.item(), f"{name}_bits": bits.item()}


class Log:
    """Lines of figures, printed and added to a file of JSON lines. Lines after step `start`, which
    a killed run may have left, are dropped."""

    def __init__(self, path: Path, steps: int, start: int):
        self.path = path
        self.steps = steps
        self.last = start
        self.since = time.time()
        self.scalars = {}  # name: list of the values since the last line
        self.counts = {}  # name: sum of counts (T, V) since the last line
        if rank() == 0 and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]  # a kill may have cut the last
            path.write_text("".join(x for x in whole if json.loads(x)["step"] <= start))

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Figures of a step, on the device. A line shows their mean."""
        for name, value in scalars.items():
            self.scalars.setdefault(name, []).append(value.detach().float().mean())

    def count(self, name: str, counts: Tensor) -> None:
        """Counts of ids (T, V) of a step. A line shows their usage."""
        self.counts[name] = self.counts.get(name, 0) + counts

    def write(self, step: int, batch_size: int, lr: float) -> None:
        """A line of what was added since the last one, of the learning rate and of the speed.
        Raises HitaError if a gradient, or anything else, has not been finite."""
        figures = {}
        for name, values in self.scalars.items():
            # Only here the host waits for the device.
            total = all_sum(torch.stack(values).sum())
            figures[name] = total.item() / len(values) / world()
        for name, counts in self.counts.items():
            figures |= usage(name, all_sum(counts))
        steps_per_second = (step - self.last) / (time.time() - self.since)
        figures["lr"] = lr
        figures["images/s"] = steps_per_second * batch_size
        figures["eta_min"] = (self.steps - step) / steps_per_second / 60
        self.line(step, figures)

        wrong = [name for name, x in figures.items() if not math.isfinite(x)]
        check(not wrong, f"{', '.join(wrong)} not finite: the run has diverged. What was saved is "
                         "good: --resume with a lower --lr")

    def line(self, step: int, figures: dict[str, float]) -> None:
        """A line of these figures."""
        if rank() == 0:
            text = " ".join(f"{name} {x:.4g}" for name, x in figures.items())
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}", flush=True)
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **figures}) + "\n")
        self.scalars, self.counts = {}, {}
        self.last, self.since = step, time.time()


# ---- Checkpoints: plain tensors and values, loaded with weights_only=True ------------------------
#
# kind ("tokenizer" or "llama"), config, ema: what a model is, with averaged weights
# data: "embedded", a folder, or "" where that is not known; dino_file: a path, or None
# of a Llama also classes, their names, and tokenizer: config and ema of the tokenizer
# of a run also step, recipe, and the states of model, optimizer, ...

def write_file(path: Path, write) -> None:
    """write(file) fills a temporary file, which then moves to path.
    Raises HitaError if that cannot be done."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise HitaError(f"cannot write {path} ({first_line(e)}): choose another place, or make "
                        "room") from e
    finally:
        if temporary.exists():
            temporary.unlink()


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is not there yet. Raises HitaError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise HitaError(f"cannot write into {path} ({first_line(e)}): choose another place") from e
    return Path(path)


def save_run(out: Path, kind: str, step: int, cfg, recipe, parts: dict, **facts) -> None:
    """A run as <kind>.pt, and at multiples of keep_every also as <kind>-<step>.pt."""
    if rank() == 0:
        data = {"kind": kind, "step": step, "config": vars(cfg), "recipe": vars(recipe), **facts}
        for name, part in parts.items():
            data[name] = part.state_dict()
        if recipe.keep_every and step % recipe.keep_every == 0:
            write_file(out / f"{kind}-{step:06d}.pt", partial(torch.save, data))
        write_file(out / f"{kind}.pt", partial(torch.save, data))
    barrier()


def export(path: str, run: str | Path, kind: str) -> None:
    """--export: the averaged weights of a run in half precision, without paths of this machine."""
    check(not Path(path).exists(), f"{path} exists already: choose another file")
    data = read_checkpoint(run, kind)
    exported = {name: data[name] for name in ("kind", "config", "classes") if name in data}
    exported["data"] = "embedded" if data["data"] == "embedded" else ""
    exported["dino_file"] = None
    exported["ema"] = in_half(data["ema"])
    if "tokenizer" in data:
        tokenizer = data["tokenizer"]
        exported["tokenizer"] = {"config": tokenizer["config"], "ema": in_half(tokenizer["ema"])}
    write_file(Path(path), partial(torch.save, exported))
    print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB")


def in_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in half precision. Vectors stay as they are: they are small."""
    return {name: x.half() if x.dim() > 1 else x for name, x in weights.items()}


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """The checkpoint in a file or of a released name. In a Llama's file kind "tokenizer" finds the
    tokenizer that it was trained on.

    Raises HitaError if there is none, it would run code, or it holds something else."""
    path = released_file(path, kind)
    check(Path(path).is_file(), f"there is no file {path}: train a {kind} by train_"
                                f"{'ar' if kind == 'llama' else kind}.py, or see sample.py --list")
    try:
        # The released files hold the arguments of their training, too, which are a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch and pickle raise many kinds
        raise HitaError(f"{path} cannot be read safely: {first_line(e)}") from e

    if not isinstance(data, dict) or "kind" not in data:
        data = from_released(path, data)
    data = {"data": "", "dino_file": None, **data}
    if kind == "tokenizer" and "tokenizer" in data:
        data = {"kind": kind, "data": data["data"], "dino_file": data["dino_file"],
                **data["tokenizer"]}
    check(data["kind"] == kind, f"{path} holds a {data['kind']}, a {kind} is needed")
    return data


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Put weights into a model. Raises HitaError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        last = str(e).strip().splitlines()[-1].strip()
        raise HitaError(f"{path} does not fit: {last}") from e


def load_tokenizer(path: str | Path, dino: str | Path | None = None) -> HitaTokenizer:
    """The tokenizer in a file or of a released name, or the one in a Llama's file.

    It has the averaged weights and is in eval mode, on the CPU. It can decode at once. Encoding may
    need DINOv2: dino is a file of its weights; add_dino fetches the Hub's."""
    data = read_checkpoint(path, "tokenizer")
    tokenizer = HitaTokenizer(TokenizerConfig(**data["config"]))
    load_weights(tokenizer, data["ema"], path)
    tokenizer.sources = {name: data[name] for name in tokenizer.sources}
    if dino is not None:
        add_dino(tokenizer, dino)
    return tokenizer.eval()


def load_llama(path: str | Path) -> Llama:
    """The Llama in a file or of a released name: averaged weights, eval mode, on the CPU."""
    data = read_checkpoint(path, "llama")
    llama = Llama(LlamaConfig(**data["config"]))
    load_weights(llama, data["ema"], path)
    llama.classes = data.get("classes", IMAGENET)  # the authors' files do not name them
    count = llama.cfg.num_classes
    check(len(llama.classes) == count, f"{path} has {count} classes and {len(llama.classes)} names "
                                       "for them: save it with 'classes', a list of names")
    return llama.eval()


def load(path: str | Path, tokenizer: str | Path | None = None) -> tuple[HitaTokenizer, Llama]:
    """A pair, the tokenizer and the Llama trained on it, from one file or one released name.

    tokenizer: a file or name with the tokenizer, for a file of the authors, which holds none.
    Raises HitaError if the two do not fit."""
    llama = load_llama(path)
    source = path if tokenizer is None else tokenizer
    tokenizer = load_tokenizer(source)
    for name in ("num_global", "grid", "global_codebook_size", "patch_codebook_size"):
        theirs, ours = getattr(tokenizer.cfg, name), getattr(llama.cfg, name)
        check(theirs == ours, f"{name} is {theirs} in the tokenizer of {source} and {ours} in the "
                              f"Llama of {path}: they do not belong together")
    return tokenizer, llama


def add_dino(tokenizer: HitaTokenizer, file: str | Path | None = None) -> HitaTokenizer:
    """The tokenizer with the DINOv2 that it needs, if any: from the file, from the one it was
    trained with, or from the Hub. Raises HitaError if it cannot be had."""
    cfg = tokenizer.cfg
    if cfg.uses_dino:
        dino = DINOv2(cfg.dino, tokenizer.sources["dino_file"] if file is None else file)
        width = dino.vit.embed_dim
        check(width == cfg.dino_dim, f"{cfg.dino} gives {width} features, dino_dim is "
                                     f"{cfg.dino_dim}: use --dino-dim {width}")
        tokenizer.attach_dino(dino)
    return tokenizer


# A run: how it goes on, and what it starts from.

def find_run(out: str, kind: str, resume: bool) -> dict | None:
    """The checkpoint that --resume continues, None for a new run.
    Raises HitaError if the run directory is taken, or its checkpoint holds weights alone."""
    path = Path(out, f"{kind}.pt")
    if not resume:
        check(not path.exists(),
              f"{out} holds a run already: --resume it, or choose another --out")
        return None
    if not path.exists():
        print_once(f"there is nothing to resume in {out}: a new run starts")
        return None
    saved = read_checkpoint(path, kind)
    check("recipe" in saved, f"{path} holds weights alone: start with --init-from {path}")
    print_once(f"resuming {path} after step {saved['step']} of {saved['recipe']['steps']}")
    return saved


def choose(settings, args: argparse.Namespace, fixed: set[str] = frozenset(), owner: str = "",
           remedy: str = ""):
    """A copy of the settings with the flags that were given. Raises HitaError, which names the
    owner of the settings and a remedy, if a flag would change a setting that is fixed."""
    given = {name: value for name, value in vars(args).items() if name in vars(settings)}
    for name in fixed & given.keys():
        value = getattr(settings, name)
        check(given[name] == value,
              f"{name} is {value} in {owner} and cannot become {given[name]}: leave the flag out, "
              f"or {remedy}")
    return replace(settings, **given)


def find_sources(args: argparse.Namespace, recorded: dict) -> tuple[dict, Path]:
    """What --data and --dino-file say, else what a checkpoint has recorded. -> both, for the next
    checkpoint, and the folder of the pictures. Raises HitaError if there is no such folder."""
    sources = {}
    for name in ("data", "dino_file"):
        given = getattr(args, name)
        sources[name] = recorded[name] if given is None else os.path.abspath(given)
    data = sources["data"]
    check(data != "", "the file does not say which pictures it was trained on: give --data")
    if data == "embedded":
        return sources, embedded_data()
    check(Path(data).is_dir(), f"there is no folder {data}: give --data")
    return sources, Path(data)


def restore(saved: dict | None, parts: dict) -> int:
    """Put the states of a checkpoint, if any, into the parts of a run -> the steps done."""
    if saved is None:
        return 0
    for name, part in parts.items():
        state = saved[name]
        # Of an optimizer only the moments: its learning rate is today's, which flags may change.
        if isinstance(part, torch.optim.Optimizer):
            state = {**part.state_dict(), "state": state["state"]}
        part.load_state_dict(state)
    return saved["step"]


# ---- The released models, on the Hub -------------------------------------------------------------

IMAGENET = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
HUB = "yexiguafu/hita-gen"
huggingface_hub.utils.logging.set_verbosity_error()  # the library warns of every retry


def released_names() -> dict[str, str]:
    """Names of the released models -> their files on the Hub."""
    files = {"hita-v": "vanilla/tokenizer/hita-tok.pt", "hita-u": "ultra/tokenizer/hita-ultra.pt"}
    vanilla = "B-50 B-300 L-50 L-300 XL-50 XXL-50 2B-50"
    ultra = "B-50 B-250 L-50 L-250 XL-50 XL-100 XXL-50 XXL-100 2B-50 2B-100"
    for tokenizer, folder, models in (("hita-v", "vanilla", vanilla), ("hita-u", "ultra", ultra)):
        for model in models.split():
            size = model.split("-")[0]
            # For example hita-u-b-250e: ultra/GPT-B/GPT-B-250e.pt
            files[f"{tokenizer}-{model.lower()}e"] = f"{folder}/GPT-{size}/GPT-{model}e.pt"
    return files


RELEASED = released_names()


def released_file(path: str | Path, kind: str) -> str | Path:
    """The file of a released name, downloaded at first use, or of prints, which is in data/. Any
    other path stays as it is. kind says which file of a released pair is wanted.
    Raises HitaError if it cannot be fetched."""
    name = str(path)
    if name == "prints":
        return EMBEDDED.with_name("prints.pt")
    if name not in RELEASED:
        return path
    if kind == "tokenizer":
        name = name[:len("hita-u")]  # the tokenizer of hita-u-b-250e is hita-u
    try:
        return huggingface_hub.hf_hub_download(HUB, RELEASED[name])
    except Exception as e:  # the network and the Hub raise many kinds
        url = huggingface_hub.hf_hub_url(HUB, RELEASED[name])
        raise HitaError(f"cannot fetch {name} from the Hub ({type(e).__name__}): download {url} "
                        "elsewhere, and name the file instead") from e


# Parts of their names -> parts of ours. They are replaced in this order, so a longer name stands
# before one that it contains, as slot_quantize before quantize.
RELEASED_TOKENIZER = {
    "encode_transformer": "extractor", "decode_transformer": "fusion",
    "carrier_tokens": "queries", "pos_embed": "positions", "proj.mlp": "dino_proj",
    "norm_pre": "norm", "transformer1.layers": "bidirectional", "transformer2.layers": "causal",
    "slot_position_embedding": "global_positions", "position_embedding": "positions",
    "transformer.layers": "layers", "mask_embedding": "mask_token",
    "norm_vfm": "vfm_norm", "fusion.proj": "fusion.vfm_proj",
    "slot_quantize.embedding.weight": "global_quantizer.codebook",
    "quantize.embedding.weight": "patch_quantizer.codebook",
    "pre_slots_quant": "global_down", "post_slots_quant": "global_up",
    "post_quant_conv": "patch_up", "quant_conv": "patch_down",
    "conv_blocks": "levels", "nin_shortcut": "shortcut", "proj_out": "out",
    "downsample.conv": "resample.1", "upsample.conv": "resample.1",
    "attn1.to_out.0": "attn.out", "attn1.to_": "attn.", "attn1": "attn",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out", "ffnet": "ffn",
}
RELEASED_LLAMA = {
    "cls_embedding.embedding_table": "class_embedding", "tok_embeddings": "patch_embedding",
    "slot_embeddings": "global_embedding", "slot_pos": "global_positions", "layers": "blocks",
    "attention_norm": "norm1", "ffn_norm": "norm2", "attention.wqkv": "qkv",
    "attention.wo": "out", "feed_forward.": "",
}


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The same tensors under our names, without DINOv2 and statistics of use."""
    renamed = {}
    for key, tensor in weights.items():
        if "backbone" in key or "codebook_used" in key:
            continue
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    return renamed


def from_released(path: str | Path, data) -> dict:
    """What torch.load gives of a file of the authors -> as if it were a checkpoint of ours.
    Raises HitaError if it is none, for example a plain state_dict of ours."""
    weights = data if isinstance(data, dict) else {}
    for name in ("ema", "model"):
        if isinstance(weights.get(name), dict):
            weights = weights[name]
            break

    if "tok_embeddings.weight" in weights:
        ours = rename(weights, RELEASED_LLAMA)
        output = ours.pop("output.weight")  # (2V, dim), both heads
        ours["global_head.weight"], ours["patch_head.weight"] = output.chunk(2)
        sizes = {size["dim"]: size for size in LLAMA_SIZES.values()}
        width = output.shape[1]
        check(width in sizes, f"{path} is a Llama of width {width}, which no released one has")
        cfg = LlamaConfig(**sizes[width])
        return {"kind": "llama", "config": vars(cfg), "ema": ours}

    if "quant_conv.weight" in weights:
        ours = rename(weights, RELEASED_TOKENIZER)
        for name in ("patch_down.weight", "patch_up.weight"):
            ours[name] = ours[name].flatten(1)  # there they are 1x1 convolutions
        cfg = TOKENIZERS["hita-u" if "fusion.mask_token" in ours else "hita-v"]
        return {"kind": "tokenizer", "config": vars(cfg), "ema": ours}

    raise HitaError(
        f"{path} is no checkpoint and no released file. To save a model of your own so that it "
        "loads: torch.save({'kind': 'tokenizer' or 'llama', 'config': vars(model.cfg), 'ema': "
        "model.state_dict()}, file), for a Llama also 'classes': a list of names")


# ---- The command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        """The command line is wrong."""
        raise HitaError(f"{message}; see --help")

    def add_run(self, presets: list[str]) -> None:
        """The flags that both training scripts have."""
        add = self.add_argument
        add("--preset", choices=presets, help="settings to start from [emoji; with --init-from "
            "those that its model has]")
        add("--data", help="folder with train/<class>/, val/<class>/ [embedded]")
        add("--out", default="out", help="run directory [out]")
        add("--export", metavar="FILE", help="write the run's weights alone, and stop")
        add("--resume", action="store_true", help="go on with the run in the run directory")
        add("--init-from", metavar="FILE", help="start from the weights of a file or released name")
        add("--dino-file", metavar="FILE", help="DINOv2 weights [the Hub's]")
        add("--device", help="cuda, mps or cpu [the best there is]")
        add("--compile", action=argparse.BooleanOptionalAction,
            help="torch.compile, which takes minutes [on CUDA, for models above 20M parameters]")

    def add_settings(self, settings, skip: tuple[str, ...] = ()) -> None:
        """A flag for each field of a dataclass, with the comment behind the field as its help."""
        source = inspect.getsource(type(settings))
        comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE))
        group = self.add_argument_group(type(settings).__name__)
        for name, value in vars(settings).items():
            if name in skip:
                continue
            if isinstance(value, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            elif isinstance(value, tuple):
                kind = {"type": integers, "metavar": "X"}
            else:
                kind = {"type": type(value), "metavar": "X"}
            flag = "--" + name.replace("_", "-")
            text = f"{comments.get(name, '')} [{value}]".replace("%", "%%")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def integers(text: str) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4)"""
    return tuple(int(word) for word in text.split(","))
