"""Hita, the holistic tokenizer for autoregressive image generation, in one file.

ICCV 2025, arXiv 2507.02358. Most image tokenizers give a picture one code per patch.
Hita puts M *global* (holistic) tokens before them, which describe it as a whole. The decoder
reads a state per patch, taken k positions early: none sees its own patch, all need the globals:

    image (B, 3, H, W)
      Encoder             conv VQGAN, stride f                  -> (B, D, h, w), N = h*w
      DINOv2              frozen ViT, sees the image at 224 px  -> (B, 257, 1024)
      QueryExtractor      [M queries; DINOv2; N patches] bidirectional,
                          then [M queries; N patches] causal    -> (B, M, D), (B, N, D)
      2 VectorQuantizers  a codebook of V codes for each kind   -> ids (B, M), (B, N)
      Fusion              [M global; N patch] causal; keeps N states
                          in a row, from that of global M-k on  -> (B, N, D)
      Decoder             conv VQGAN                            -> (B, 3, H, W)

    class -> Llama -> M global ids -> N patch ids -> Fusion, Decoder -> a new picture

Letters in shapes: B batch, H W pixels, h w patch grid, N = h*w patch tokens, M global tokens,
D latent width, C code width (12 global, 8 patch), V codebook size, T sequence length,
d channels of a head, f stride (pixels per patch side), k positions of k-replacement.
Images are float (B, 3, H, W) in [-1, 1], token ids int64.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor, nn
from tqdm import tqdm


class HitaError(ValueError):
    """A user error; the scripts report it in one line."""


def check(condition: bool, message: str) -> None:
    """Raise HitaError(message) unless the condition holds."""
    if not condition:
        raise HitaError(message)


# ==== PART 1: HITA, in the order of the data (world, check_ids: Part 2) ====
#
# ---- Settings: each field becomes a flag of the scripts, its comment the help --

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
        check(self.channels % 4 == 0, f"channels is {self.channels}, no multiple of 4")
        check(self.heads > 0 and self.latent_dim % self.heads == 0,
              f"latent_dim {self.latent_dim} is not divisible by {self.heads} heads")
        check(self.k <= self.num_global, f"k is {self.k}, above num_global {self.num_global}")
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
        check(self.heads > 0 and self.dim % (4 * self.heads) == 0,
              f"dim {self.dim} is not divisible by 4 x {self.heads} heads (2-D RoPE)")


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


# ---- Convolutional encoder and decoder (VQGAN, Esser et al. 2021) ------------

def group_norm(channels: int) -> nn.GroupNorm:
    """As released from 128 channels on: up to 32 groups of at least 4. Below, a single one:
    a norm removes what a group shares, and with groups of 4 the demo learned hues late."""
    groups = math.gcd(32, channels // 4) if channels >= 128 else 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, silu, conv, twice, plus the input. (B, c_in, H, W) -> (B, c_out, H, W)"""

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
        conv = partial(nn.Conv2d, channels, channels, 1)
        self.q, self.k, self.v, self.out = conv(), conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = row_by_row(self.q(y))[:, None]  # (B, 1, H*W, c)
        k = row_by_row(self.k(y))[:, None]
        v = row_by_row(self.v(y))[:, None]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, c)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """Residual blocks at one resolution, perhaps with attention, then a resampling."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        attn = partial(AttnBlock, c_out) if attention else nn.Identity
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(attn() for _ in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)


def downsample(c: int) -> nn.Module:
    """Halve the resolution: zeros on the right and below, then 3x3 with stride 2."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))


def upsample(c: int) -> nn.Module:
    """Double the resolution: nearest neighbour, then 3x3."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(c, c, 3, padding=1))


def stack(c: int, widths: list[int], blocks: int, resample, lowest: int) -> nn.Sequential:
    """Levels of these widths, resampled in between; the lowest has attention."""
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
    """Image (B, 3, H, W) in [-1, 1] -> patch embeddings (B, D, H/f, W/f)."""

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
    """Fused states (B, D, h, w) -> image (B, 3, h*f, w*f), no output activation."""

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


# ---- DINOv2 (Oquab et al. 2023): frozen features for the queries ----

class DINOv2(nn.Module):
    """Frozen ViT. (B, 3, H, W) in [-1, 1] -> normalised cls and patch tokens (B, 257, dim).
    name: a timm model. file: its weights, the original .pth or timm's; else the Hub's, or
    random ones unless pretrained. HitaError if they cannot be had."""
    SIZE = 224  # the ViT always sees 224 px: 16 x 16 patches of 14 px

    def __init__(self, name: str = TokenizerConfig.dino, file: str | Path | None = None,
                 pretrained: bool = True):
        super().__init__()
        import timm  # slow to import, and decoding does without
        load = partial(timm.models.load_state_dict, weights_only=True)
        try:
            given = {"state_dict": load(file)} if file else {}  # then timm does not fetch
            self.vit = timm.create_model(name, pretrained, num_classes=0, img_size=self.SIZE,
                                         pretrained_cfg_overlay=given)
        except Exception as e:  # files, network, timm: many kinds
            raise HitaError(f"cannot load {name} from {file or 'the Hub'} ({type(e).__name__}): "
                            "name a file by --dino-file") from e
        self.vit.pretrained_cfg.pop("state_dict", None)  # timm keeps a second copy
        for stat, rgb in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(stat, torch.tensor(rgb)[:, None, None])
        self.eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, 224, 224) as the ViT wants it, in float32."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            # a picture that shrinks is blurred first, as in kornia's resize
            factors = [side / self.SIZE for side in images.shape[-2:]]
            if max(factors) > 1:
                sigmas = [max((f - 1) / 2, 0.001) for f in factors]
                sizes = [int(max(4 * s, 3)) // 2 * 2 + 1 for s in sigmas]  # the next odd one
                images = TF.gaussian_blur(images, sizes[::-1], sigmas[::-1])  # x before y
            # the released weights were trained with align_corners=True
            images = F.interpolate(images, self.SIZE, mode="bicubic", align_corners=True)
            return ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(self.preprocess(images))  # (B, 1 + 4 + 256, dim)
        # the four registers are scratch memory of the ViT and say nothing
        cls, patches = tokens[:, :1], tokens[:, self.vit.num_prefix_tokens:]
        return torch.cat([cls, patches], dim=1)  # (B, 257, dim)


# ---- The transformer layer of the tokenizer ----------------------------------

def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention, bidirectional or causal. (B, T, D) -> (B, T, D)
    Bidirectional: no biases on q, k, v, dropout on the output. Causal: biases, dropout on the
    probabilities; the released model joins two code bases.
    mask (T, T): True where a row sees a column."""

    def __init__(self, dim: int, heads: int, causal: bool, dropout: float):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        linear = partial(nn.Linear, dim, dim, bias=causal)
        self.q, self.k, self.v = linear(), linear(), linear()
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training and torch.is_grad_enabled() else 0.0
        q = split_heads(self.q(x), self.heads)  # (B, heads, T, d)
        k = split_heads(self.k(x), self.heads)
        v = split_heads(self.v(x), self.heads)
        # is_causal instead of a mask allows fast kernels
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None,
            dropout_p=dropout if self.causal else 0.0)
        x = self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)
        return x if self.causal else F.dropout(x, dropout)


class SwiGLU(nn.Module):
    """w3(silu(u) * v) with u, v the halves of w12(x). (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (8 * dim // 3 + 7) // 8 * 8  # 8/3 of dim, rounded up
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(u) * v)


class Layer(nn.Module):
    """Attention and feed-forward, each pre-norm with a residual. (B, T, D) -> (B, T, D)"""

    def __init__(self, cfg: TokenizerConfig, causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.latent_dim)
        self.attn = Attention(cfg.latent_dim, cfg.heads, causal, cfg.dropout)
        self.norm2 = nn.LayerNorm(cfg.latent_dim)
        self.ffn = SwiGLU(cfg.latent_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


def learned(length: int, dim: int) -> nn.Parameter:
    """A learned table (1, length, dim), of queries or of positions."""
    return nn.Parameter(torch.randn(1, length, dim) * dim ** -0.5)


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """Positions (1, G*G, D) of a G x G grid -> (1, h*w, D), bicubic if the grid differs."""
    side = math.isqrt(positions.shape[1])
    if (h, w) == (side, side):
        return positions
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, G, G)
    # the 0.1 shifts the sampling step a little, as in DINO and the released model
    scale = (h + 0.1) / side, (w + 0.1) / side
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")  # (1, D, h, w)
    return row_by_row(grid)  # (1, h*w, D)


# ---- Causal query extractor: M learnable queries gather what is global -------

class QueryExtractor(nn.Module):
    """Patches (B, D, h, w), DINOv2 tokens -> queries (B, M, D), patches (B, N, D).
    Stage 1 is bidirectional: to summarise the picture, the queries look at everything.
    Stage 2 is causal over [queries; patches]: a query sees only those before it, as the Llama
    will when it predicts them. Only patches get positions: queries are learned."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D = cfg.latent_dim
        self.queries = learned(cfg.num_global, D)
        self.positions = learned(cfg.grid ** 2, D)
        if cfg.uses_dino:
            self.dino_proj = nn.Sequential(
                nn.Linear(cfg.dino_dim, D, bias=False), nn.LayerNorm(D), nn.ReLU(),
                nn.Linear(D, D, bias=False), nn.LayerNorm(D))
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.bidirectional = nn.Sequential(*[Layer(cfg, causal=False) for _ in range(cfg.layers)])
        self.causal = nn.Sequential(*[Layer(cfg, causal=True) for _ in range(cfg.layers)])

    def forward(self, patches: Tensor, dino_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        B, _, h, w = patches.shape
        M, N = self.queries.shape[1], h * w
        queries = self.queries.expand(B, -1, -1)  # (B, M, D)
        patches = row_by_row(patches) + resize_positions(self.positions, h, w)  # (B, N, D)

        # stage 1: everything sees everything
        parts = [queries, patches]
        if dino_tokens is not None:
            parts.insert(1, self.dino_proj(dino_tokens))
        x = torch.cat(parts, dim=1)  # (B, M + 257 + N, D)
        x = self.bidirectional(self.norm1(x))

        # stage 2: the DINOv2 tokens have done their work
        x = torch.cat([x[:, :M], x[:, -N:]], dim=1)  # (B, M + N, D)
        x = self.causal(self.norm2(x))
        return x[:, :M], x[:, M:]  # (B, M, D), (B, N, D)


# ---- The quantizer, used twice: for global and for patch tokens --------------

class VectorQuantizer(nn.Module):
    """The nearest of V codes on the unit sphere (VQ-VAE, van den Oord et al. 2017; ViT-VQGAN).
    To use another (FSQ, LFQ, ...), name in HitaTokenizer.__init__ a class that offers
    __init__(size, dim, beta): ids are below size, codes have dim channels, beta may be ignored;
    forward: z (B, T, C) -> codes (B, T, C) with a gradient to z, ids (B, T), a loss, perhaps 0;
    lookup: ids (B, T) -> the same codes. Both in float32, also under autocast.
    Train with --no-revive-codes, or the demo takes RevivingQuantizer."""

    def __init__(self, size: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        codebook = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        self.codebook = nn.Parameter(F.normalize(codebook, dim=-1))  # (V, C)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # float32 even under autocast: in bfloat16 one id in twenty would be another.
        # encode is in float32 throughout; training may have computed z in bfloat16
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)  # (B, T, C)
            codebook = F.normalize(self.codebook.float(), dim=-1)  # (V, C)
            # on the sphere the nearest code is the one with the largest cosine
            ids = (z @ codebook.T).argmax(dim=-1)  # (B, T)
            codes = codebook[ids]  # (B, T, C)
            # moves the codes to the encoder's outputs
            loss = F.mse_loss(codes, z.detach())
            # the commitment keeps these near their codes
            loss = loss + self.beta * F.mse_loss(z, codes.detach())
            # straight through: the values of the codes with the gradient of z
            return z + (codes - z).detach(), ids, loss

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> normalised codes (B, T, C)"""
        return F.normalize(self.codebook.float(), dim=-1)[ids]


# ---- Not in the paper: centring and revival, for short trainings on small data --

class Centring(nn.Module):
    """BatchNorm1d without learned scale, over all processes: (B, T, C) -> (B, T, C) in float32.
    Off in the released models. At first a query is much the same in all pictures:
    its nearest code would be constant, and the decoder ignore it.
    positions: T for statistics of each, 1 for common ones. HitaError for a batch of one."""

    def __init__(self, positions: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(positions, dim))
        self.register_buffer("var", torch.ones(positions, dim))

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z, mean, var = z.float(), self.mean.float(), self.var.float()
            # evaluation and encode use what training has seen and add nothing
            if self.training and torch.is_grad_enabled():
                check(len(z) * world() > 1, "centring needs two pictures: raise --batch-size")
                # over the batch and, for common statistics, over positions
                dims = (0,) if len(mean) > 1 else (0, 1)
                # and processes; gradients flow through both, or the mean runs away
                mean = AllMean.apply(z.mean(dims, keepdim=True))[0]  # (positions, C)
                var = AllMean.apply((z - mean).square().mean(dims, keepdim=True))[0]
                n = world() * z[..., 0].numel() // len(mean)  # values behind each statistic
                self.mean.lerp_(mean.detach(), 0.01)
                self.var.lerp_(var.detach() * n / (n - 1), 0.01)
            return (z - mean) * (var + 1e-5).rsqrt()


class RevivingQuantizer(VectorQuantizer):
    """Training moves codes that are hardly ever nearest, at first all, onto some of z."""

    def __init__(self, size: int, dim: int, beta: float = 0.25):
        super().__init__(size, dim, beta)
        self.register_buffer("hits", torch.zeros(size))  # decaying count of uses, (V,)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        learns = self.training and torch.is_grad_enabled()  # encode moves nothing
        if learns:
            self.revive(F.normalize(z.detach().float(), dim=-1).flatten(0, 1))
        codes, ids, loss = super().forward(z)
        if learns:
            self.hits += all_sum(count_ids(ids, len(self.hits)).sum(dim=0))
        return codes, ids, loss

    @torch.no_grad()
    def revive(self, z: Tensor) -> None:
        """Put codes with fewer than 0.1 remembered uses onto some of z (B*T, C)."""
        self.hits *= 0.9  # a use is forgotten after 22 steps
        dead = self.hits < 0.1
        # the first process chooses from the outputs of all: codebooks stay the same
        every = z.new_zeros(world(), *z.shape)
        every[rank()] = z
        z = all_sum(every).flatten(0, 1)  # (world * B*T, C)
        choice = torch.randint(len(z), dead.shape, device=z.device)
        choice = all_sum(choice * (rank() == 0))
        self.codebook.copy_(torch.where(dead[:, None], z[choice], self.codebook))
        self.hits.masked_fill_(dead, 1.0)


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each id stands at each position: (B, T) -> (T, size)."""
    counts = torch.zeros(ids.shape[1], size, device=ids.device)
    return counts.scatter_add_(1, ids.T, torch.ones_like(ids.T, dtype=counts.dtype))


# ---- Fusion with k-replacement -----------------------------------------------

class Fusion(nn.Module):
    """Quantized globals (B, M, D), patches (B, N, D) -> a state for each cell (B, N, D).
    Causal layers read [global; patch]. Cell i is the state at M - k + i, k before its patch:

        position   0 ... M-k  ...  M-1 | M   M+1 ... M+N-1-k | M+N-k ... M+N-1
        token      globals             | patches 0, 1, ...   | the last k patches
        cell             0    ...  k-1 | k   k+1 ... N-1     | -

    The first k cells see globals alone (cell k-1 is the first to see all M), later ones
    also the patches up to i - k. With k > 0 none sees its own: the globals must help.
    The last k patches reach no cell; the Llama still predicts them."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        D = cfg.latent_dim
        self.k = cfg.k
        self.global_positions = learned(cfg.num_global, D)
        self.positions = learned(cfg.grid ** 2, D)
        self.norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(Layer(cfg, causal=True) for _ in range(cfg.layers))
        if cfg.vfm_recon:
            self.mask_token = learned(1, D)
            self.vfm_norm, self.vfm_proj = nn.LayerNorm(D), nn.Linear(D, cfg.dino_dim)
        for m in self.modules():  # as released; the extractor keeps torch's defaults
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, globals_: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        M, N = globals_.shape[1], patches.shape[1]
        globals_ = globals_ + self.global_positions  # (B, M, D)
        patches = patches + resize_positions(self.positions, *grid)  # (B, N, D)
        x = self.norm(torch.cat([globals_, patches], dim=1))  # (B, M + N, D)
        for layer in self.layers:
            x = layer(x)
        # the N states that start k positions before the first patch
        first = M - self.k
        return x[:, first:first + N]  # (B, N, D)

    def reconstruct_features(self, globals_: Tensor, side: int) -> Tensor:
        """Hita-U: global codes (B, M, D) -> DINOv2 patch features (B, side^2, dino_dim).
        The same layers read [global; mask tokens]. Globals are causal and do not see the mask
        tokens, which see everything; as released, globals have no positions here."""
        B, M, _ = globals_.shape
        positions = resize_positions(self.positions, side, side)  # (1, side^2, D)
        masks = (self.mask_token + positions).expand(B, -1, -1)  # (B, side^2, D)
        T = M + side ** 2
        # row by row which keys a query sees
        sees = torch.ones(T, T, dtype=torch.bool, device=globals_.device).tril()
        sees[M:] = True
        x = self.vfm_norm(torch.cat([globals_, masks], dim=1))  # (B, M + side^2, D)
        for layer in self.layers:
            x = layer(x, sees)
        return self.vfm_proj(x[:, M:])  # (B, side^2, dino_dim)


# ---- The tokenizer -----------------------------------------------------------

@dataclass
class TokenizerOutput:
    """What forward returns; the losses are differentiable scalars."""
    recon: Tensor                # (B, 3, H, W)
    codebook_loss: Tensor        # codebook and commitment terms of both quantizers
    feature_loss: Tensor | None  # Hita-U while training: 1 - cosine to DINOv2
    global_ids: Tensor           # (B, M)
    patch_ids: Tensor            # (B, N)


class HitaTokenizer(nn.Module):
    """Images <-> M global and N patch token ids. With num_global = 0 it is a plain VQGAN.
    Encoding needs the DINOv2 of the configuration, if any: `attach_dino`."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        self.attach_dino(None)
        D, M = cfg.latent_dim, cfg.num_global
        centring = Centring if cfg.centre else nn.Identity  # which ignores its arguments
        Quantizer = RevivingQuantizer if cfg.revive_codes else VectorQuantizer
        quantizer = partial(Quantizer, beta=cfg.beta)
        self.encoder = Encoder(cfg)
        self.patch_down = nn.Linear(D, cfg.patch_code_dim)
        self.patch_centring = centring(1, cfg.patch_code_dim)
        self.patch_quantizer = quantizer(cfg.patch_codebook_size, cfg.patch_code_dim)
        self.patch_up = nn.Linear(cfg.patch_code_dim, D)
        # without global tokens there is no transformer
        if M:
            self.extractor = QueryExtractor(cfg)
            self.global_down = nn.Linear(D, cfg.global_code_dim)
            self.global_centring = centring(M, cfg.global_code_dim)
            self.global_quantizer = quantizer(cfg.global_codebook_size, cfg.global_code_dim)
            self.global_up = nn.Linear(cfg.global_code_dim, D)
            self.fusion = Fusion(cfg)
        self.decoder = Decoder(cfg)

    def attach_dino(self, dino: DINOv2 | None) -> None:
        """Set the frozen DINOv2. HitaError if it has another width."""
        ours = self.cfg.dino_dim
        width = ours if dino is None else dino.vit.embed_dim
        check(width == ours, f"dino_dim is {ours}, this has {width}")
        # not a submodule: no optimizer, EMA, DDP or checkpoint may see it
        self.__dict__["dino"] = dino

    def dino_tokens(self, images: Tensor) -> Tensor | None:
        """Frozen features (B, 257, dino_dim), None in a model without. HitaError if missing."""
        if not self.cfg.uses_dino:
            return None
        check(self.dino is not None, f"encoding needs {self.cfg.dino}: add_dino(tokenizer, file)")
        return self.dino.to(images.device)(images).type_as(images)

    def embed(self, images: Tensor, dino_tokens: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Images (B, 3, H, W) -> to be quantized: global (B, M, C) or None, patch (B, N, C)."""
        patches = self.encoder(images)  # (B, D, h, w)
        if not self.cfg.num_global:
            return None, self.patch_centring(self.patch_down(row_by_row(patches)))
        queries, patches = self.extractor(patches, dino_tokens)  # (B, M, D), (B, N, D)
        global_z = self.global_centring(self.global_down(queries))  # (B, M, C)
        return global_z, self.patch_centring(self.patch_down(patches))

    def render(self, global_codes: Tensor | None, patch_codes: Tensor, grid: tuple) -> Tensor:
        """Quantized codes (B, M, C), (B, N, C) -> images (B, 3, H, W)."""
        dtype = self.patch_up.weight.dtype  # perhaps half precision; codes are in float32
        x = self.patch_up(patch_codes.to(dtype))  # (B, N, D)
        if self.cfg.num_global:
            x = self.fusion(self.global_up(global_codes.to(dtype)), x, grid)  # (B, N, D)
        return self.decoder(x.transpose(1, 2).unflatten(2, grid))  # (B, 3, H, W)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> global ids (B, M), patch ids (B, N) row by row, int64.
        HitaError for anything else; a warning where values look like [0, 1]."""
        check_images(images, self.cfg.stride, self.patch_up.weight.dtype)
        with torch.autocast(images.device.type, enabled=False):  # whatever the caller has on
            global_z, patch_z = self.embed(images, self.dino_tokens(images))
        patch_ids = self.patch_quantizer(patch_z)[1]
        if global_z is None:
            return patch_ids[:, :0], patch_ids  # (B, 0)
        return self.global_quantizer(global_z)[1], patch_ids

    @torch.no_grad()
    def decode(self, global_ids: Tensor, patch_ids: Tensor, grid: tuple | None = None) -> Tensor:
        """Global ids (B, M), patch ids (B, N) -> images (B, 3, H, W) in about [-1, 1].
        grid: patch rows and columns, else square. HitaError where the ids do not fit."""
        check_ids("patch ids", patch_ids, (None, None), self.cfg.patch_codebook_size)
        (B, N), M = patch_ids.shape, self.cfg.num_global
        grid = (math.isqrt(N), math.isqrt(N)) if grid is None else tuple(grid)
        fits = [type(x) for x in grid] == [int, int] and min(grid) > 0 and math.prod(grid) == N
        check(fits, f"{N} patch ids do not fill a grid of {grid}")
        check_ids("global ids", global_ids, (B, M), self.cfg.global_codebook_size)
        # codes are looked up, so neither encoder nor DINOv2 is needed
        global_codes = self.global_quantizer.lookup(global_ids) if M else None
        return self.render(global_codes, self.patch_quantizer.lookup(patch_ids), grid)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Images (B, 3, H, W), for training: gradients pass through the codes."""
        dino_tokens = self.dino_tokens(images)  # (B, 257, dino_dim) or None
        global_z, patch_z = self.embed(images, dino_tokens)
        patch_codes, patch_ids, codebook_loss = self.patch_quantizer(patch_z)
        global_codes, global_ids, feature_loss = None, patch_ids[:, :0], None
        if self.cfg.num_global:
            global_codes, global_ids, global_loss = self.global_quantizer(global_z)
            codebook_loss = codebook_loss + global_loss
        # Hita-U: the global codes alone must tell what DINOv2 saw
        if self.cfg.vfm_recon and self.training:
            target = dino_tokens[:, 1:].float()  # (B, 256, dino_dim)
            side = math.isqrt(target.shape[1])
            globals_ = self.global_up(global_codes)  # (B, M, D)
            features = self.fusion.reconstruct_features(globals_, side).float()
            cosine = F.cosine_similarity(target, features, dim=-1, eps=1e-6)
            feature_loss = 1 - cosine.mean()
        f = self.cfg.stride
        grid = images.shape[2] // f, images.shape[3] // f
        recon = self.render(global_codes, patch_codes, grid)
        return TokenizerOutput(recon, codebook_loss, feature_loss, global_ids, patch_ids)


# ---- Losses: train_tokenizer.py sums rec + LPIPS + 0.5 GAN + codebook (+ feature) --

def reconstruction_loss(images: Tensor, recon: Tensor) -> Tensor:
    """2 MSE: the released L2 term, and the MSE that its trainer always adds."""
    return 2 * F.mse_loss(recon.float(), images)


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) on VGG-16, frozen: images, recon (B, 3, H, W) -> scalar.
    HitaError if the VGG weights cannot be had."""

    def __init__(self, pretrained: bool = True):
        super().__init__()
        import lpips  # slow to import, and needed in training only
        # the package's own takes a root: at 0 its gradient is NaN
        lpips.normalize_tensor = lambda x: x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt()
        warnings.filterwarnings("ignore", module="torchvision")  # lpips uses an old call
        try:
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
        except Exception as e:  # many kinds
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
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        # small weights, as in pix2pix
        for m in self.main:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017) of the logits for real and reconstructed images."""
    # pushes real logits above 1, fake ones below -1, no further
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adversarial_loss(fake: Tensor) -> Tensor:
    """Non-saturating -log sigmoid(D(recon)): what the generator minimises."""
    return F.softplus(-fake.float()).mean()


# ---- The generator: a Llama (Touvron et al. 2023; for images Sun et al. 2024) -

def position_rotations(num_global: int, grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (M + N, head_dim / 2) by which channel pairs of q and k turn at each input.
    Inputs 0 .. M-1 do not turn, they have a learned shift.
    M + 1 + i (patch i): 2-D RoPE, half the pairs turn with the row, half with the column.
    M, the last global (the class if M = 0): cos = sin = 0, its attention is uniform over 0 .. M,
    its key's logit 0 for later queries. An accident, which the released weights need."""
    pairs = head_dim // 2
    theta = 10000.0 ** (-2 * torch.arange(pairs // 2) / pairs)  # (pairs/2,)
    angle = torch.arange(grid)[:, None] * theta  # (grid, pairs/2)
    rows, columns = angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)
    cells = torch.cat([rows, columns], dim=1)  # (N, pairs)
    # 0 for inputs 0 .. M; the last patch, which is never an input, is cut off
    angles = F.pad(cells, (0, 0, num_global + 1, -1))  # (M + N, pairs)
    cos, sin = angles.cos(), angles.sin()
    cos[num_global] = 0.0  # the accident
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, heads, T, d) by the angles of cos, sin (T, d/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)  # (B, heads, T, d/2) each
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).type_as(x)


class LlamaBlock(nn.Module):
    """Causal attention and SwiGLU, each pre-norm with a residual. (B, T, dim) -> (B, T, dim)"""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        dim = cfg.dim
        hidden = (8 * dim // 3 + 255) // 256 * 256  # 8/3 of dim, rounded up
        norm, linear = partial(nn.RMSNorm, eps=1e-5), partial(nn.Linear, bias=False)
        self.heads, self.dropout = cfg.heads, nn.Dropout(cfg.dropout)
        self.norm1, self.qkv, self.out = norm(dim), linear(dim, 3 * dim), linear(dim, dim)
        self.norm2 = norm(dim)
        self.w1, self.w3 = linear(dim, hidden), linear(dim, hidden)
        self.w2 = linear(hidden, dim)

    def forward(self, x: Tensor, shift: Tensor, cos: Tensor, sin: Tensor, index: Tensor,
                cache: tuple[Tensor, Tensor] | None, visible: Tensor | None) -> Tensor:
        """x: inputs at positions `index` (T,) that have shift (T, dim) and cos, sin (T, d/2).
        With a cache x attends to what `visible` (T, M + N) shows of it."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)  # (B, T, dim) each
        # Positions act on queries and keys only, not on the residual stream, in every block:
        # a learned shift for inputs 0 .. M-1, a rotation for the patches.
        q = rotate(split_heads(q + shift, self.heads), cos, sin)  # (B, heads, T, d)
        k = rotate(split_heads(k + shift, self.heads), cos, sin)
        v = split_heads(v, self.heads)

        # fast kernels want multiples of 8 channels; size 2B has 60 in a head
        d = q.shape[-1]
        if d % 8:
            pad = 0, -d % 8
            q, k, v = F.pad(q, pad), F.pad(k, pad), F.pad(v, pad)
        # in sampling, the cache holds keys and values of the inputs before
        if cache is not None:
            keys, values = cache  # (B, heads, M + N, d) both
            keys[:, :, index], values[:, :, index] = k.type_as(keys), v.type_as(values)
            k, v = keys, values
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=cache is None, scale=d ** -0.5)
        y = self.out(y[..., :d].transpose(1, 2).flatten(2))  # (B, T, dim)
        x = x + self.dropout(y)

        # the feed-forward net, a SwiGLU
        y = self.norm2(x)
        y = F.silu(self.w1(y)) * self.w3(y)  # (B, T, hidden)
        return x + self.dropout(self.w2(y))


class Llama(nn.Module):
    """Predicts the M global ids, then the N patch ids of a class. With M = 0: a plain LlamaGen.
    Inputs are class, global_0 .. global_M-1, patch_0 .. patch_N-2;
    position p predicts token p of global_0 .. patch_N-1.
    Each kind of token has its own embeddings and head. A loaded model names its `classes`."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.cfg = cfg
        M, dim = cfg.num_global, cfg.dim
        # one row more than classes: the last means "no class"
        self.class_embedding = nn.Embedding(cfg.num_classes + 1, dim)
        self.patch_embedding = nn.Embedding(cfg.patch_codebook_size, dim)
        self.patch_head = nn.Linear(dim, cfg.patch_codebook_size, bias=False)
        if M:
            self.global_embedding = nn.Embedding(cfg.global_codebook_size, dim)
            self.global_head = nn.Linear(dim, cfg.global_codebook_size, bias=False)
            self.global_positions = nn.Embedding(M, dim)  # of inputs 0 .. M-1
        self.token_dropout = nn.Dropout(cfg.token_dropout)
        self.blocks = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        cos, sin = position_rotations(M, cfg.grid, dim // cfg.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                # heads of zero: at first all ids are equally likely
                nn.init.normal_(m.weight, std=0.0 if name.endswith("_head") else 0.02)

    def embed(self, class_ids: Tensor, global_ids: Tensor, patch_ids: Tensor) -> Tensor:
        """Class ids (B,), ids (B, m), (B, n) -> embeddings (B, 1 + m + n, dim)."""
        parts = [self.class_embedding(class_ids)[:, None], self.patch_embedding(patch_ids)]
        if self.cfg.num_global:
            parts.insert(1, self.global_embedding(global_ids))
        return torch.cat(parts, dim=1)

    def backbone(self, x: Tensor, index: Tensor, caches: list[tuple] | None = None,
                 visible: Tensor | None = None) -> Tensor:
        """Embedded inputs (B, T, dim) at positions (T,) -> normalised states (B, T, dim)."""
        M, shift = self.cfg.num_global, x.new_zeros(1, 1)
        if M:
            shift = self.global_positions(index.clamp(max=M - 1))  # (T, dim)
            shift = shift.masked_fill((index >= M)[:, None], 0.0)  # none from position M on
        cos, sin = self.cos[index], self.sin[index]  # (T, d/2)
        for i, block in enumerate(self.blocks):
            x = block(x, shift, cos, sin, index, caches[i] if caches else None, visible)
        return self.norm(x)

    def forward(self, class_ids: Tensor, global_ids: Tensor,
                patch_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Class ids (B,), global ids (B, M), patch ids (B, N) -> logits (B, M, V), (B, N, V).
        M may be 0. Training drops class labels with probability class_dropout."""
        M = self.cfg.num_global
        # guidance needs to know what the model says without the class
        if self.training:
            drop = torch.rand(len(class_ids), device=class_ids.device) < self.cfg.class_dropout
            class_ids = class_ids.masked_fill(drop, self.cfg.num_classes)
        x = self.embed(class_ids, global_ids, patch_ids[:, :-1])  # (B, M + N, dim)
        x = self.backbone(self.token_dropout(x), torch.arange(x.shape[1], device=x.device))
        patch_logits = self.patch_head(x[:, M:])  # (B, N, V)
        global_logits = self.global_head(x[:, :M]) if M else patch_logits[:, :0]
        return global_logits, patch_logits

    @torch.no_grad()
    def generate(self, class_ids: Tensor, cfg_scale: float = 1.0, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, given: Tensor | None = None, seed: int = 0,
                 random: Tensor | None = None, released_sampling: bool = False,
                 progress: bool = False) -> tuple[Tensor, Tensor]:
        """In eval mode: pictures of classes (B,), int64 -> global ids (B, M), patch ids (B, N).
        cfg_scale: strength of classifier-free guidance (Ho & Salimans 2022), 1 is without.
        temperature, top_k, top_p: see filter_logits; top_k=1 is greedy.
        given (B, P): the first P ids. random (B, M + N): as of random_numbers, else of the seed.
        released_sampling: embed the last global as a patch, as the released code does by mistake.
        HitaError for what is out of range."""
        M, total = self.cfg.num_global, len(self.cos)  # M, M + N
        check_range(0, 10**6, cfg_scale=cfg_scale, temperature=temperature)
        check_range(0, 1, top_p=top_p)
        check_range(0, math.inf, whole=True, top_k=top_k, seed=seed)
        ids = self.check_request(class_ids, given, released_sampling)  # (B, P)
        random = random_numbers(class_ids, total, seed) if random is None else random
        shape = len(ids), total
        check(random.shape == shape, f"random is {random.shape}, not {shape}")

        # Guidance predicts with the class and without, in one batch [cond; uncond].
        labels, known = class_ids, ids
        if cfg_scale != 1:
            no_class = torch.full_like(class_ids, self.cfg.num_classes)
            labels, known = torch.cat([class_ids, no_class]), torch.cat([ids, ids])
        caches = self.empty_caches(len(labels), self.norm.weight.dtype, self.norm.weight.device)
        # The class and the given ids are read at once, then one id at a time.
        num_as_global = max(0, M - 1) if released_sampling else M
        x = self.embed(labels, known[:, :num_as_global], known[:, num_as_global:])
        index = torch.arange(x.shape[1], device=x.device)  # (1 + P,)
        for p in tqdm(range(ids.shape[1], total), "tokens", disable=not progress, leave=False):
            token, x = self.step(x, index, caches, random[:, p, None], cfg_scale,
                                 (temperature, top_k, top_p), is_global=p < M,
                                 embed_as_global=p < num_as_global)
            ids = torch.cat([ids, token], dim=1)  # (B, p + 1)
            x, index = x.clone(), index[-1:] + 1  # the next step may reuse x's memory
        return ids[:, :M], ids[:, M:]

    def check_request(self, class_ids: Tensor, given: Tensor | None, released: bool) -> Tensor:
        """Checks arguments of generate -> the given ids (B, P), P = 0 without any."""
        cfg, M, total = self.cfg, self.cfg.num_global, len(self.cos)
        check_ids("class ids", class_ids, (None,), cfg.num_classes)
        check(len(class_ids) > 0, "class ids are none, give at least one")
        sizes = cfg.global_codebook_size, cfg.patch_codebook_size
        check(not (released and M) or sizes[0] == sizes[1],
              f"released_sampling needs codebooks of one size, not {sizes}")
        ids = class_ids.new_empty(len(class_ids), 0) if given is None else given
        check_ids("given ids", ids, (len(class_ids), None), max(sizes))
        check(ids.shape[1] <= total, f"{ids.shape[1]} ids are given, a picture has {total}")
        check_ids("given global ids", ids[:, :M], (None, None), sizes[0])
        check_ids("given patch ids", ids[:, M:], (None, None), sizes[1])
        return ids

    @torch.inference_mode(False)  # kept ones serve calls outside, too
    def empty_caches(self, batch: int, dtype: torch.dtype, device: torch.device,
                     kept: bool = False) -> list[tuple]:
        """Keys and values of each block for all inputs, (batch, heads, M + N, d)."""
        cfg = self.cfg
        d = -(-cfg.dim // cfg.heads // 8) * 8  # channels of a head, padded as in LlamaBlock
        shape = batch, cfg.heads, len(self.cos), d
        # one by one: compiled, a common tensor would be copied at each step
        caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * cfg.layers)]
        for cache in caches if kept else ():  # CUDA graphs: these do not move
            torch._dynamo.mark_static_address(cache, guard=False)
        return list(zip(caches[::2], caches[1::2]))

    def compile_step(self) -> None:
        """CUDA graphs, for one thread: the caches must stay where they are."""
        self.step = torch.compile(self.step, mode="reduce-overhead", fullgraph=True)
        self.empty_caches = lru_cache(None)(partial(self.empty_caches, kept=True))

    def step(self, x: Tensor, index: Tensor, caches: list[tuple], random: Tensor,
             cfg_scale: float, filters: tuple, is_global: bool,
             embed_as_global: bool) -> tuple[Tensor, Tensor]:
        """Inputs (B or 2B, T, dim) at positions (T,) -> next token (B, 1), and embedded.
        Only tensors and the kind of token change between steps: it compiles once a kind."""
        # an input sees itself and those before
        length = caches[0][0].shape[2]  # M + N
        visible = torch.arange(length, device=x.device) <= index[:, None]  # (T, M + N)
        state = self.backbone(x, index, caches, visible)[:, -1]  # (B or 2B, dim)
        logits = (self.global_head if is_global else self.patch_head)(state).float()
        # away from what the model would say without the class
        if cfg_scale != 1:
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (cond - uncond)  # (B, V)
        token = draw(filter_logits(logits, *filters).softmax(dim=-1), random)  # (B, 1)
        table = self.global_embedding if embed_as_global else self.patch_embedding
        return token, table(token).repeat(len(x) // len(token), 1, 1)


def random_numbers(class_ids: Tensor, length: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), one a token, of pictures of classes (B,) -> (B, length).
    Picture j of class c has those of (seed, c, j), whatever is made beside it."""
    rows, count = [], Counter()
    for c in class_ids.tolist():
        generator = np.random.default_rng((seed, c, count[c]))
        rows.append(generator.random(length, dtype=np.float32))
        count[c] += 1
    return torch.from_numpy(np.array(rows)).to(class_ids.device)


def draw(probs: Tensor, random: Tensor) -> Tensor:
    """Probabilities (B, V), uniform numbers (B, 1) -> ids (B, 1), by inversion."""
    # an id of probability 0 stays below every target and is never drawn
    sums = cumulative_sums(probs).masked_fill(probs == 0, 0.0)
    # the largest sum is 1 but for rounding
    target = random * sums.amax(dim=-1, keepdim=True)
    # argmax gives the first that is above
    return (sums > target).int().argmax(dim=-1, keepdim=True)


def cumulative_sums(probs: Tensor) -> Tensor:
    """Cumulative sums (B, V), by blocks: torch 2.11 cannot compile one over 16,384."""
    V = probs.shape[-1]
    blocks = F.pad(probs, (0, -V % 128)).unflatten(1, (-1, 128))  # (B, blocks, 128)
    inner = blocks.cumsum(dim=-1)
    before = F.pad(inner[:, :-1, -1].cumsum(dim=-1), (1, 0))  # (B, blocks)
    return (inner + before[..., None]).flatten(1)[:, :V]


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0,
                  top_p: float = 1.0) -> Tensor:
    """Logits (B, V), divided by the temperature, -inf where filtered out.
    top_k keeps the k largest (and ties), 0 keeps all.
    top_p then keeps the largest until their probability exceeds p.
    A temperature below 1e-6 counts as 1e-6, which is greedy."""
    logits = logits / max(temperature, 1e-6)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        # those that come after p has been exceeded; the one that exceeds it stays
        beyond = cumulative_sums(probs) - probs > top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logits


def llama_losses(global_logits: Tensor, patch_logits: Tensor, global_ids: Tensor,
                 patch_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of global tokens, 0 if there are none, and of patch tokens.
    Their sum is trained: in the released model a global token weighs N / M = 3.4 patch tokens.
    With global_weight M / N in train_ar.py all tokens weigh the same."""
    patch_loss = F.cross_entropy(patch_logits.flatten(0, 1).float(), patch_ids.flatten())
    if global_ids.shape[1] == 0:
        return torch.zeros_like(patch_loss), patch_loss
    global_loss = F.cross_entropy(global_logits.flatten(0, 1).float(), global_ids.flatten())
    return global_loss, patch_loss


# ==== PART 2: WHAT THE SCRIPTS SHARE: processes, flags, pictures, checkpoints ====

import argparse
import contextlib
import copy
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import huggingface_hub.utils
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps


def usage(name: str, counts: Tensor) -> dict[str, float]:
    """Counts (T, V) -> share of codes in use; bits: mean entropy of an id at a position."""
    counts = counts.cpu().double()  # MPS has no float64
    p = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    bits = torch.special.entr(p).sum(dim=1).mean() / math.log(2)
    return {f"{name}_use": (counts.sum(dim=0) > 0).double().mean().item(),
            f"{name}_bits": bits.item()}


def check_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], size: int) -> None:
    """HitaError unless ids are int64, 0 to size - 1, of this shape; None fits all."""
    found = (ids.dtype, *ids.shape) if isinstance(ids, Tensor) else (type(ids),)
    wanted = torch.int64, *shape
    fits = len(found) == len(wanted) and all(b in (None, a) for a, b in zip(found, wanted))
    check(fits, f"{name} are {found}, not {wanted}")
    wrong = ids[(ids < 0) | (ids >= size)].tolist()
    check(not wrong, f"{name} must be 0 to {size - 1}, not {wrong[:3]}")


def check_range(low: float, high: float, *, whole: bool = False, **values) -> None:
    """HitaError unless these are (whole) numbers from low to high."""
    kind = (int, np.integer) if whole else (int, float, np.number)
    for name, x in values.items():
        fits = isinstance(x, kind) and low <= x <= high
        check(fits, f"{name} is {x}, it must be a number from {low} to {high}")


def check_images(images: Tensor, stride: int, dtype: torch.dtype) -> None:
    """HitaError unless (B, 3, H, W) in [-1, 1]; a warning where it looks like [0, 1]."""
    found = images.dtype if isinstance(images, Tensor) else type(images)
    check(found == dtype, f"images are {found}, not {dtype} in [-1, 1]: load_picture makes such, "
                          "or x / 127.5 - 1 of bytes")
    shape = tuple(images.shape)
    fits = len(shape) == 4 and shape[1] == 3 and not any(x % stride for x in shape[2:])
    check(fits and min(shape) > 0, f"images are {shape}, not (B, 3, H, W), H and W n x {stride}")
    low, high = images.min(), images.max()
    check(low > -2 and high < 2, f"pixels are {low:.3g} to {high:.3g}, not in [-1, 1]")
    if 0 <= low < high:
        warnings.warn("no pixel is below 0: of pictures in [0, 1] encode 2 * x - 1", stacklevel=3)


def psnr(images: Tensor, recon: Tensor) -> Tensor:
    """PSNR in dB: (B, 3, H, W) in [-1, 1], twice -> (B,)"""
    mse = (images - recon.clamp(-1, 1)).float().square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))  # the values span 2


# ---- Processes: torchrun, signals, errors ------------------------------------

def rank() -> int:
    """Index of this process, 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def say(text: str) -> None:
    """Print a line, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


# N processes compute what one does: each takes its share of a batch (batch); DDP averages
# gradients (distribute), AllMean the statistics of centring, Log its figures;
# the first chooses the revived codes; all stop after the same step (Stop.asked).
# But dropout differs (seed_step), and the discriminator's BatchNorm sees its share.

def world() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


class AllMean(torch.autograd.Function):
    """Mean over all processes, with a gradient; torch's own has none, or warns."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_sum(x.clone()) / world()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The mean again: the losses of all processes depend on this x."""
        return all_sum(grad.clone()) / world()


def barrier() -> None:
    """Wait until every process is here."""
    all_sum(torch.zeros(1))


def set_up_device(name: str | None) -> torch.device:
    """That device, or the best there is; joins the processes of torchrun."""
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        check(device.type in ("cuda", "mps", "cpu"), "it is not cuda, mps or cpu")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, AssertionError, ValueError) as e:
        raise HitaError(f"no device {name} here ({first_line(e)}): try --device cpu") from e
    torch.backends.cudnn.allow_tf32 = False  # with TF32 some ids would be others
    if device.type == "cuda" and not has_bfloat16(device):
        say("this GPU only emulates bfloat16: all is computed in float32")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16; those before Ampere only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def distribute(model: nn.Module) -> nn.Module:
    """The model, wrapped where there are several processes."""
    if world() == 1:
        return model
    torch._dynamo.config.optimize_ddp = False  # fails when recomputing in torch 2.6
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    model.broadcast_buffers = False  # the argument of this name warns on new versions
    return model


def use_compile(asked: bool | None, preset: str, device: torch.device) -> bool:
    """Whether to compile: as asked, else on CUDA all but the small models."""
    if asked is not None:
        return asked
    return device.type == "cuda" and preset not in ("emoji", "prints")


def norm_by_channel(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x), (B, c, H, W), from moments of the channels, then of the groups. Compiled for
    a GPU, torch's own copies to another layout than the convolutions' and back."""
    each = x.shape[1] // norm.num_groups
    moments = x.float().mean((2, 3)), x.float().square().mean((2, 3))  # (B, c) both
    of_groups = (m.unflatten(1, (-1, each)).mean(2, keepdim=True) for m in moments)
    # (B, groups, 1) -> (B, c), the same for all channels of a group
    mean, square = (m.expand(-1, -1, each).flatten(1) for m in of_groups)
    scale = norm.weight * (square - mean.square() + norm.eps).rsqrt()  # (B, c)
    shift = norm.bias - mean * scale
    y = x.float() * scale[..., None, None] + shift[..., None, None]
    return y.type_as(norm.weight)


def seed_step(seed: int, step: int) -> None:
    """Seed torch from (seed, step, process): no random state has to be saved."""
    torch.manual_seed(np.random.SeedSequence((seed, step, rank())).generate_state(1).item())


class Stop:
    """SIGTERM, Ctrl-C: the step ends, the run is saved; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signalled = torch.zeros(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        """A signal has come."""
        self.signalled += 1
        os.write(2, b"stopping after this step\n")
        if world() == 1:  # with torchrun it always comes twice
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self) -> bool:
        """Whether any process was told to stop; the same answer in all."""
        return all_sum(self.signalled.clone()).item() > 0


def ignore_signals(worker: int) -> None:
    """For loaders: the last step may need their batches; run_script ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explanation(error: Exception, memory: str) -> str | None:
    """One line for what a user can mend, None for mistakes in the code."""
    if isinstance(error, HitaError):  # one of a loader's process ends a traceback
        return str(error).rpartition("hita.HitaError: ")[2].strip()
    if isinstance(error, torch.OutOfMemoryError):
        return f"{first_line(error)} What helps: {memory}"
    file = error.filename if isinstance(error, OSError) else None
    words = [*(word.rpartition("=")[2] for word in sys.argv[1:]), "out", EMOJI.parent]
    named = [word for word in words if isinstance(file, (str, Path))
             and Path(os.path.abspath(file)).is_relative_to(os.path.abspath(word))]
    full = errno.errorcode.get(getattr(error, "errno", None)) in ("ENOSPC", "EDQUOT", "EFBIG")
    return f"{first_line(error)}; choose another place" if named or full else None


def run_script(main, memory: str) -> None:
    """Call a script's main. What a user can mend ends in one line and status 2, a mistake
    in the code in its traceback, and all processes end. memory: what helps if a GPU is full."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")  # for odd file names
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except Exception as e:
        text, status = explanation(e, memory), 2
        if text:
            print("error:", text, file=sys.stderr, flush=True)
        elif world() == 1:
            raise
        else:
            sys.excepthook(*sys.exc_info())
    finally:
        # Python would wait for loaders for ever, torch raise an error if one ends
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for loader in torch.multiprocessing.active_children():
            loader.kill()
            loader.join()
    sys.stdout.flush()
    if status:
        os._exit(status) if world() > 1 else sys.exit(status)  # without waiting for the others
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- Flags ------------------------------------------------------------------

POSITIVE = set(
    "channels channel_mult res_blocks latent_dim layers dim global_codebook_size steps batch_size "
    "patch_codebook_size global_code_dim patch_code_dim dino_dim accumulate lr clip gan_width "
    "crop_range copies log_every eval_every".split())
NOT_NEGATIVE = set(
    "num_global k beta lr_final warmup weight_decay lpips_weight gan_weight gan_start "
    "global_weight sample_cfg keep_every workers seed".split())
SHARES = {"dropout", "token_dropout", "class_dropout", "ema"}


def check_numbers(settings):
    """The settings. HitaError if a number in a list is out of range."""
    for name, value in vars(settings).items():
        text = f"{name} is {value}, it must be"
        for x in value if isinstance(value, tuple) else (value,):
            check(name not in POSITIVE or 0 < x < math.inf, f"{text} positive")
            check(name not in NOT_NEGATIVE or 0 <= x < math.inf, f"{text} 0 or more")
            check(name not in SHARES or 0 <= x < 1, f"{text} 0 or more and below 1")
    return settings


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        """The command line is wrong."""
        raise HitaError(f"{message}; see --help")

    def parse_args(self) -> argparse.Namespace:
        """The command line. HitaError for an empty value, as of "$UNSET"."""
        for before, word in zip(sys.argv, sys.argv[1:]):
            empty = not word or re.fullmatch("--[a-z-]+=", word)
            check(not empty, f"{word or before} is empty: leave it out")
        if any(EMOJI.stem in word for word in sys.argv):
            embedded_data()  # or a path in it would not be there
        return super().parse_args()

    def add_run(self, presets: list[str]) -> None:
        """The flags that both training scripts have."""
        add = self.add_argument
        add("--preset", choices=presets, help="settings to start from [emoji]")
        add("--data", help="folder with train/<class>/, val/<class>/ [embedded]")
        add("--out", default="out", help="run directory [out]")
        add("--export", metavar="FILE", help="write the weights alone and stop")
        add("--resume", nargs="?", const="", metavar="FILE",
            help="go on from this checkpoint [the one in the run directory]")
        add("--init-from", metavar="FILE", help="start from weights: file or released name")
        add("--dino-file", metavar="FILE", help="DINOv2 weights [the Hub's]")
        add("--device", help="cuda, mps or cpu [the best there is]")
        add("--compile", action=argparse.BooleanOptionalAction,
            help="torch.compile, takes minutes [on CUDA, but for the demo]")

    def add_settings(self, settings, skip: tuple[str, ...] = ()) -> None:
        """A flag for each field of a dataclass, with its comment as help."""
        source = inspect.getsource(type(settings))
        comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE))
        group = self.add_argument_group(type(settings).__name__)
        for name, value in vars(settings).items():
            if name in skip:
                continue
            how = {"type": integers if isinstance(value, tuple) else type(value), "metavar": "X"}
            if isinstance(value, bool):
                how = {"action": argparse.BooleanOptionalAction}
            flag = "--" + name.replace("_", "-")
            text = f"{comments.get(name, '')} [{value}]".replace("%", "%%")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def integers(text: str) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4)"""
    return tuple(map(int, text.split(",")))


def override(settings, args: argparse.Namespace):
    """A copy of the settings with the flags that were given."""
    given = {name: x for name, x in vars(args).items() if hasattr(settings, name)}
    return check_numbers(replace(settings, **given))


# ---- Pictures ----------------------------------------------------------------

EMOJI = Path(__file__).parent / "data" / "prints64.zip"
PICTURES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif", ".jp2")
NOT_DATA = {"__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin"}
warnings.filterwarnings("ignore", module="PIL")  # of files with faults that do no harm


def embedded_data() -> Path:
    """The embedded pictures, unpacked beside the zip at first use."""
    folder = EMOJI.with_suffix("")
    if rank() == 0 and not folder.is_dir():
        check(EMOJI.is_file(), f"{EMOJI} is missing: clone the repository again")
        temporary = folder.with_suffix(f".{os.getpid()}.tmp")
        shutil.unpack_archive(EMOJI, temporary)
        with contextlib.suppress(OSError):  # another run may have been faster
            os.replace(temporary, folder)
    barrier()
    return folder


def data_entries(folder: str | Path) -> list[os.DirEntry]:
    """What is in a folder by name, but for hidden and foreign things."""
    entries = sorted(os.scandir(folder), key=lambda x: x.name)
    return [x for x in entries if x.name[0] != "." and x.name.lower() not in NOT_DATA]


def picture_files(folder: str | Path | os.DirEntry):
    """Picture files below a folder, links to them too; links to folders may be circles."""
    for entry in data_entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from picture_files(entry)
        elif entry.name.lower().endswith(PICTURES):
            yield entry.path


def on_white(image: Image.Image) -> Image.Image:
    """A picture of 8 bits as RGB, upright by its EXIF data, on white where transparent."""
    check(image.mode[0] not in "IF", f"pixels are {image.mode}: save it with 8 bits")
    image = image.copy()  # loads it, too: PNG files may have all this at their end
    with contextlib.suppress(Exception):  # damaged EXIF blocks raise nearly everything
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(picture) -> Image.Image:
    """A file (name or open) or a PIL picture as on_white gives it. HitaError if damaged."""
    try:
        if isinstance(picture, Image.Image):
            return on_white(picture)
        with Image.open(picture) as image:
            return on_white(image)
    except Exception as e:  # damaged files raise nearly everything, in Pillow
        own = traceback.extract_tb(e.__traceback__)[-1].filename == __file__
        if own and not isinstance(e, HitaError):
            raise  # a mistake in this code, not in the file
        name = picture if isinstance(picture, (str, Path)) else type(picture)
        raise HitaError(f"the picture {name} cannot be read: {first_line(e)}") from e


def crop_square(image: Image.Image, size: int, rng: np.random.Generator | None = None,
                crop_range: float = 1.0) -> Tensor:
    """A picture -> (3, size, size) in [-1, 1]: the centre, as in ADM's evaluation, or with rng
    a random part, between crop_range of the smaller side and all of it."""
    side = size if rng is None else rng.integers(size, math.ceil(size / crop_range) + 1)
    while min(image.size) >= 2 * side:  # halving first avoids aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = ImageOps.scale(image, side / min(image.size), Image.Resampling.BICUBIC)
    spare = image.width - size, image.height - size
    x, y = (n // 2 if rng is None else int(rng.integers(n + 1)) for n in spare)
    image = image.crop((x, y, x + size, y + size))
    return TF.pil_to_tensor(image).float() / 127.5 - 1  # (3, size, size)


def load_picture(picture, size: int) -> Tensor:
    """A file or PIL picture -> centre (1, 3, size, size) in [-1, 1]. HitaError if damaged."""
    return crop_square(read_picture(picture), size)[None]


def to_uint8(images: Tensor) -> Tensor:
    """Images in about [-1, 1] -> the nearest pixel values 0 .. 255."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def picture_grid(images: Tensor, columns: int = 8) -> Image.Image:
    """Images (B, 3, H, W), uint8 or in about [-1, 1] -> a grid as a PIL picture."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    grid = torchvision.utils.make_grid(pixels.cpu(), columns, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


class Pictures(torch.utils.data.Dataset):
    """DIR/<split>/<class>/<picture>: items (epoch, index) -> image (3, size, size), class.
    Classes are the folders in DIR/train that hold pictures.
    augment: crop and flip follow from (seed, epoch, index); without it epoch 0 is the plain
    picture, 1 its mirror image, later ones are augmented.
    A picture that cannot be read is named, and the next one stands in.
    HitaError if there are no pictures, or 20 in a row cannot be read."""

    def __init__(self, root: str | Path, split: str, size: int, augment: bool = False,
                 crop_range: float = 1.0, seed: int = 0):
        check(crop_range <= 1, f"crop_range is {crop_range}, it must be at most 1")
        self.root, self.split = Path(root) / split, split
        self.size, self.augment = size, augment
        self.crop_range, self.seed = crop_range, seed
        folder = Path(root) / "train"
        check(folder.is_dir(), f"no folder {folder}: put pictures in {folder}/<class>/")
        self.classes = [entry.name for entry in data_entries(folder)
                        if entry.is_dir() and next(picture_files(entry), None)]
        self.samples = [(path, label) for label, name in enumerate(self.classes)
                        if (self.root / name).is_dir()
                        for path in picture_files(self.root / name)]
        check(len(self) > 0, f"no pictures in {self.root}/<class>/, classes of {folder}")
        others = [x.name for x in data_entries(self.root) if x.name not in self.classes]
        if others:
            say(f"left out in {self.root}, no classes of {folder}: {', '.join(others[:5])}")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture, or the next that can be read, and its class."""
        errors = []
        while len(errors) < min(20, len(self)):
            path, label = self.samples[(index + len(errors)) % len(self)]
            try:
                return read_picture(path), label
            except HitaError as e:
                errors.append(e)
                print("skipped:", e, file=sys.stderr, flush=True)
        raise HitaError(f"none of {len(errors)} pictures in a row can be read; {errors[0]}")

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        image, label = self.read(index)
        # augmentation depends on nothing but these three numbers
        random = self.augment or epoch > 1
        rng = np.random.default_rng((self.seed, epoch, index)) if random else None
        image = crop_square(image, self.size, rng, self.crop_range)
        flip = rng.random() < 0.5 if random else epoch == 1
        return image.flip(-1) if flip else image, label

    def signature(self) -> list:
        """What a cache of these pictures depends on: names, sizes, dates."""
        files = []
        for path, label in self.samples:
            stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
            name = os.path.relpath(path, self.root)
            files.append([name, label, stat.st_size, stat.st_mtime_ns])
        return [files, self.size, self.crop_range, self.seed]


def validation_pictures(train: Pictures) -> Pictures:
    """Those in val; where there is no val, about 1,000 of train, plain."""
    root = train.root.parent
    if (root / "val").is_dir():
        return Pictures(root, "val", train.size)
    say(f"{root} has no val: figures called train_... are of training pictures")
    some = copy.copy(train)
    some.augment, some.samples = False, train.samples[::max(1, len(train) // 1000)]
    return some


@lru_cache(2)
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the data in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def batch(step: int, length: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index) of this process's share of a step."""
    share, rest = divmod(batch_size, world())
    check(rest == 0, f"batch_size {batch_size} is no multiple of {world()} processes")
    first = (step - 1) * batch_size + rank() * share
    places = (divmod(i, length) for i in range(first, first + share))
    return [(epoch, epoch_order(length, seed, epoch)[i].item()) for epoch, i in places]


def new_array(path: Path, dtype: type, shape: tuple[int, ...], copies: int = 1) -> None:
    """Zeros as a .npy file. HitaError without room: a full disk would kill who maps it."""
    needed = copies * math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(path.parent).free
    check(needed < free, f"{path} takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
    write_file(path, lambda f: np.save(f, np.zeros(shape, dtype)))  # no file with holes


def picture_array(path: Path, count: int, size: int) -> np.ndarray:
    """Zeros (count, size, size, 3) uint8 on the disk, filled by all processes."""
    raw = path.with_name(f".{path.name}.raw")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        new_array(raw, np.uint8, (count, size, size, 3), copies=2)  # and once more when packed
    barrier()
    return np.lib.format.open_memmap(raw, "r+")


def pack_pictures(path: Path, *labels: np.ndarray) -> None:
    """Pack that array, no longer in use, as .npz: arr_0, as ADM has it, labels arr_1."""
    barrier()
    if rank() == 0:
        raw = path.with_name(f".{path.name}.raw")  # Windows would not remove a mapped file
        write_file(path, lambda f: np.savez(f, np.load(raw, mmap_mode="r"), *labels))
        raw.unlink()
    barrier()


# ---- Training ----------------------------------------------------------------

def learning_rate(step: int, recipe) -> float:
    """Linear warm-up from 1e-7, a cosine from lr to lr_final; step counts from 1."""
    if step <= recipe.warmup:
        return 1e-7 + step * (recipe.lr - 1e-7) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    last = min(recipe.lr, recipe.lr_final)
    return last + (recipe.lr - last) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model of the parameters; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(ema.buffers(), model.buffers()):
        ours.copy_(theirs)


def optimizer_step(optimizer: torch.optim.Optimizer, model: nn.Module, clip: float) -> Tensor:
    """Clip the gradients, take a step -> their norm. HitaError if not finite."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    check(bool(norm.isfinite()), "a gradient is not finite: --resume with a lower --lr")
    optimizer.step()
    return norm


class Log:
    """Lines of figures, printed and added to a JSON file; drops lines after `start`."""

    def __init__(self, path: Path, steps: int, start: int):
        self.path, self.steps = path, steps
        self.values = {}  # (name, is a count): (sum, times)
        self.last, self.since = start, time.time()
        if rank() == 0 and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [x for x in lines if x.endswith("}\n")]  # not what a killed write left
            path.write_text("".join(x for x in whole if json.loads(x)["step"] <= start))

    def add(self, values: dict[str, Tensor]) -> None:
        """Of a step: scalars, which are averaged, and counts of ids (T, V)."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            key = name, value.dim() == 2  # a loss may have the name of a kind of ids
            total, times = self.values.get(key, (0, 0))
            self.values[key] = total + (value if key[1] else value.mean()), times + 1

    def write(self, step: int, batch_size: int) -> None:
        """A line of what was added since the last one, and of the speed."""
        figures = {}
        for (name, is_count), (total, times) in self.values.items():
            total = all_sum(total)  # only here the device is waited for
            figures |= usage(name, total) if is_count else {name: total.item() / times / world()}
        speed = (step - self.last) / (time.time() - self.since)  # steps per second
        figures |= {"images/s": speed * batch_size, "eta_min": (self.steps - step) / speed / 60}
        self.line(step, figures)

    def line(self, step: int, figures: dict[str, float]) -> None:
        """A line of these figures."""
        if rank() == 0:
            text = " ".join(f"{name} {x:.4g}" for name, x in figures.items())
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}", flush=True)
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **figures} | {"step": step}) + "\n")
        self.values, self.last, self.since = {}, step, time.time()


# ---- Checkpoints: plain tensors and values, loaded with weights_only=True ----
#
# kind, step, config, recipe; states of model, ema, optimizer, ...; classes of a Llama;
# made_from: data (None: embedded), pictures, preset, dino_file, tokenizer, tokenizer_hash.

def check_writable(path: Path, folder: bool = False) -> None:
    """HitaError unless a file or folder can be written there; makes nothing."""
    place = next(x for x in path.absolute().parents if os.path.exists(x))
    fits = not os.path.exists(path) or os.path.isdir(path) == folder and os.access(path, os.W_OK)
    check(fits and os.path.isdir(place) and os.access(place, os.W_OK),
          f"{path} cannot be written: choose another place")


def write_file(path: Path, write) -> None:
    """write(file) fills a temporary file, which moves to path. HitaError if it cannot."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise HitaError(f"cannot write {path}, is there room? ({first_line(e)})") from e
    finally:
        temporary.unlink(missing_ok=True)


def save_run(out: Path, kind: str, step: int, cfg, recipe, parts: dict, **facts) -> None:
    """A run as <kind>.pt, at multiples of keep_every also as <kind>-<step>.pt."""
    if rank() == 0:
        data = {"kind": kind, "step": step, "config": vars(cfg), "recipe": vars(recipe), **facts}
        data |= {name: part.state_dict() for name, part in parts.items()}
        if recipe.keep_every and step % recipe.keep_every == 0:
            write_file(out / f"{kind}-{step:06d}.pt", partial(torch.save, data))
        write_file(out / f"{kind}.pt", partial(torch.save, data))
    barrier()


KINDS = {"tokenizer": (TokenizerConfig, HitaTokenizer, "train_tokenizer.py"),
         "llama": (LlamaConfig, Llama, "train_ar.py")}


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """A file or released model; "config" is a dataclass, "ema" has weights under our names.
    HitaError if there is none, or it would run code or holds something else."""
    Config, _, script = KINDS[kind]
    if str(path) in RELEASED:
        path = released_file(str(path), kind)
    remedy = f"make one with python {script}, or see python sample.py --list"
    check(Path(path).is_file(), f"there is no {kind} checkpoint {path}; {remedy}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of released files
            mmap = os.name != "nt"  # Windows cannot replace a mapped file
            data = {**torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)}
    except Exception as e:  # of many kinds
        raise HitaError(f"{path} is no checkpoint that reads safely ({type(e).__name__}); "
                        f"{remedy}") from e
    if "kind" not in data:
        places = data.get("ema"), data.get("model"), data
        data |= from_released(next((x for x in places if isinstance(x, dict) and x), {}))
    found = f"a {data['kind']}" if {"kind", "config", "ema"} <= data.keys() else "no checkpoint"
    check(found == f"a {kind}", f"{path} holds {found}, a {kind} is needed; {remedy}")
    if isinstance(data["config"], dict):
        data["config"] = settings_of(Config, data["config"], path)
    return {"made_from": {}, **data}


def settings_of(Config, values: dict, path: str | Path):
    """Settings of a checkpoint. HitaError for those unknown to this version."""
    usual = vars(Config())
    wrong = {name: x for name, x in values.items()
             if name not in usual or isinstance(x, str) != isinstance(usual[name], str)}
    check(not wrong, f"{path} is of another version: what is {wrong}?")
    return check_numbers(Config(**values))


MAY_CHANGE = "k beta dropout token_dropout class_dropout image_size grid num_classes".split()
FIXED = {"seed", "batch_size", "gan_width", "copies", "pictures"}  # as the model's settings


def as_flag(name: str, value) -> str:
    """As it is typed: '--dim 128', '--channel-mult 1,1,2', '--no-centre'."""
    text = "" if isinstance(value, bool) else str(value).strip("()").replace(", ", ",")
    return f"--{'no-' * (value is False)}{name.replace('_', '-')} {text}".strip()


def check_start(path: str, theirs, ours, presets: dict) -> None:
    """HitaError if weights made with `theirs` do not go on as `ours`; names what fits."""
    differ = lambda cfg: [as_flag(name, x) for name, x in vars(theirs).items()
                          if name not in MAY_CHANGE and x != getattr(cfg, name)]
    fits = [f", or --preset {name}" for name, preset in presets.items() if not differ(preset)]
    check(not differ(ours), f"{path} needs {' '.join(differ(ours))}{''.join(fits)}")


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Put weights into a model. HitaError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as e:
        last = str(e).strip().splitlines()[-1].strip()
        raise HitaError(f"{path} does not fit: {last}") from e


def load_model(path: str | Path, kind: str) -> HitaTokenizer | Llama:
    """EMA weights, in eval mode on the CPU; `made_from` says of what."""
    data = read_checkpoint(path, kind)
    model = KINDS[kind][1](data["config"])
    load_weights(model, data["ema"], path)
    model.made_from, model.classes = data["made_from"], data.get("classes")
    return model.eval()


def load_tokenizer(path: str | Path, dino: str | None = None) -> HitaTokenizer:
    """A tokenizer of a file, or prints, hita-v, hita-u: EMA weights, eval mode, on the CPU.
    dino: file of the DINOv2 that encoding needs; add_dino fetches the Hub's.
    HitaError if a file is missing or does not fit."""
    tokenizer = load_model(path, "tokenizer")
    return add_dino(tokenizer, dino) if dino else tokenizer


def load_llama(path: str | Path) -> Llama:
    """A Llama of a file, or a name in RELEASED: as load_tokenizer."""
    llama = load_model(path, "llama")
    llama.classes = llama.classes or IMAGENET  # the authors' files do not name them
    if str(path) in RELEASED:
        llama.made_from = {"tokenizer": str(path)[:6]}  # hita-v, hita-u or prints
    return llama


def add_dino(tokenizer: HitaTokenizer, file: str | Path | None = None) -> HitaTokenizer:
    """The tokenizer with the DINOv2 it needs: of a file, or the Hub."""
    if tokenizer.cfg.uses_dino:
        tokenizer.attach_dino(DINOv2(tokenizer.cfg.dino, file))
    return tokenizer


def fingerprint(*parts) -> str:
    """A short hash of modules' weights and of plain values."""
    digest = hashlib.sha256()
    for part in parts:
        is_model = isinstance(part, nn.Module)
        for name, x in part.state_dict().items() if is_model else ():
            x = x.half() if x.dim() > 1 else x  # the same after --export
            digest.update(name.encode() + x.cpu().contiguous().numpy().tobytes())
        digest.update(b"" if is_model else json.dumps(part).encode())
    return digest.hexdigest()[:16]


def find_tokenizer(made_from: dict, flag: str | None, beside: Path) -> tuple[str, HitaTokenizer]:
    """Path and tokenizer of a Llama: the flag's, else the recorded one, or that beside it.
    HitaError if the weights do not have the recorded hash."""
    wanted, recorded = made_from.get("tokenizer_hash"), made_from.get("tokenizer")
    both_released = flag in RELEASED and recorded in RELEASED
    check(flag == recorded or not both_released,
          f"this Llama goes with {recorded}, not with {flag}")
    places = [flag] if flag else [x for x in (recorded, str(beside)) if x]
    for path in places:
        if not wanted or path in RELEASED or Path(path).is_file():
            tokenizer = load_tokenizer(path)
            if wanted in (None, fingerprint(tokenizer)):
                return path, tokenizer
    raise HitaError(f"{places[0]} is not there, or not (any more) this Llama's: name the right "
                    "--tokenizer, or train anew: python train_ar.py --tokenizer FILE --out NEW_DIR")


def find_run(args: argparse.Namespace, kind: str, Recipe) -> dict | None:
    """What --resume continues, None for a new run. HitaError for a taken place."""
    newest = Path(args.out, f"{kind}.pt")
    log = newest.with_suffix(".jsonl")
    check_writable(log)
    path = Path(args.resume or newest)
    if args.resume is None:
        check(not newest.exists() and not log.exists(),
              f"{args.out} holds a run already: --resume it, or choose another --out")
        return None
    if not args.resume and not newest.exists():
        return say(f"there is nothing to resume in {args.out}: a new run starts")
    check(not newest.exists() or not path.exists() or path.samefile(newest),
          f"{args.out} holds another run, or a later step: choose another --out")
    saved = read_checkpoint(path, kind)
    check("recipe" in saved, f"{path} holds weights only: use --init-from {path}")
    if args.init_from:
        say(f"--init-from {args.init_from} is for new runs: this one has its own")
    return {**saved, "recipe": settings_of(Recipe, saved["recipe"], path), "path": path}


def check_resume(saved: dict, cfg, recipe, pictures: int) -> None:
    """HitaError for a setting that cannot change within a run."""
    old = {**saved["made_from"], **vars(saved["config"]), **vars(saved["recipe"])}
    new = {**vars(cfg), **vars(recipe), "pictures": pictures}
    wrong = ", ".join(f"{name} is {x} and was {old.get(name)}" for name, x in new.items()
                      if x != old.get(name) and name in FIXED | vars(cfg).keys())
    check(not wrong, f"{wrong}: fixed within a run; leave it, or start another with --out")
    done = " (all done: raise --steps)" if saved["step"] >= recipe.steps else ""
    say(f"resuming {saved['path']} after step {saved['step']}{done}")


def sources(args: argparse.Namespace, earlier: dict) -> tuple[dict, Path]:
    """Paths by flags or a checkpoint -> those to record, the pictures' path."""
    paths = {name: getattr(args, name) or earlier.get(name) for name in ("data", "dino_file")}
    paths = {name: x and os.path.abspath(x) for name, x in paths.items()}
    root = paths["data"]
    check(args.data or not root or Path(root).is_dir(),
          f"the checkpoint was made from {root}, not there now: give --data")
    return paths, Path(root) if root else embedded_data()


def export(args: argparse.Namespace, kind: str) -> None:
    """--export: weights in half precision, and no paths of this machine."""
    path = Path(args.export)
    check(not path.exists(), f"{path} exists already")
    check_writable(path)
    data = read_checkpoint(args.resume or f"{args.out}/{kind}.pt", kind)
    facts = {name: data[name] for name in ("kind", "step", "classes") if name in data}
    facts["ema"] = {name: x.half() if x.dim() > 1 else x for name, x in data["ema"].items()}
    facts["config"] = vars(data["config"])
    made = {**data["made_from"], "dino_file": None}
    made["data"] = "/elsewhere" if made.get("data") else None
    tokenizer = made.get("tokenizer")
    made["tokenizer"] = tokenizer if tokenizer in RELEASED else None
    write_file(path, partial(torch.save, {**facts, "made_from": made}))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def restore(saved: dict | None, parts: dict) -> int:
    """States of a checkpoint, if any, into the parts of a run -> steps done."""
    for name, part in parts.items() if saved else ():
        state = saved[name]
        # of an optimizer the moments; its learning rate etc. are today's
        if isinstance(part, torch.optim.Optimizer):
            state = {**part.state_dict(), "state": state["state"]}
        part.load_state_dict(state)
    return saved["step"] if saved else 0


# ---- The released models, on the Hub -----------------------------------------

IMAGENET = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
HUB = "yexiguafu/hita-gen"
huggingface_hub.utils.logging.set_verbosity_error()  # the library warns of every retry
RELEASED = {"hita-v": "vanilla/tokenizer/hita-tok.pt", "hita-u": "ultra/tokenizer/hita-ultra.pt"}
RELEASED |= {  # as hita-u-b-250e: ultra/GPT-B/GPT-B-250e.pt
    f"{tokenizer}-{model.lower()}e": f"{folder}/GPT-{model.split('-')[0]}/GPT-{model}e.pt"
    for tokenizer, folder, models in (
        ("hita-v", "vanilla", "B-50 B-300 L-50 L-300 XL-50 XXL-50 2B-50"),
        ("hita-u", "ultra", "B-50 B-250 L-50 L-250 XL-50 XL-100 XXL-50 XXL-100 2B-50 2B-100"))
    for model in models.split()}
RELEASED["prints"] = "data/prints-*.pt"  # ours, beside the code


def released_file(name: str, kind: str) -> str:
    """The file of a released model, downloaded at first use."""
    if name == "prints":  # no download: it is a part of the repository
        return str(EMOJI.with_name(f"prints-{kind}.pt"))
    try:
        return huggingface_hub.hf_hub_download(HUB, RELEASED[name])
    except Exception as e:  # of many kinds
        url = huggingface_hub.hf_hub_url(HUB, RELEASED[name])
        raise HitaError(f"cannot fetch {name} from the Hub ({type(e).__name__}): download {url} "
                        "elsewhere, name it by --tokenizer or --llama") from e


RELEASED_TOKENIZER = {  # part of their name -> part of ours; order matters
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


def from_released(weights: dict[str, Tensor]) -> dict:
    """A released file's tensors as our checkpoint; empty for another file."""
    weights = {str(name): x for name, x in weights.items() if isinstance(x, Tensor)}
    is_llama, ours = "output.weight" in weights, {}
    names = RELEASED_LLAMA if is_llama else RELEASED_TOKENIZER
    for key, tensor in weights.items():
        if "backbone" in key or "codebook_used" in key:  # DINOv2, and statistics of use
            continue
        for theirs, our in names.items():
            key = key.replace(theirs, our)
        was_conv = key in ("patch_down.weight", "patch_up.weight")  # of 1x1
        ours[key] = tensor.flatten(1) if was_conv else tensor
    if is_llama:
        output = ours.pop("output.weight")  # (2V, dim), both heads
        ours["global_head.weight"], ours["patch_head.weight"] = output.chunk(2)
        size = next((s for s in LLAMA_SIZES.values() if s["dim"] == output.shape[1]), {})
        return {"kind": "llama", "config": LlamaConfig(**size), "ema": ours}
    cfg = TOKENIZERS["hita-u" if "fusion.mask_token" in ours else "hita-v"]
    known = "patch_down.weight" in ours
    return {"kind": "tokenizer", "config": cfg, "ema": ours} if known else {}
