"""Tests of hita.py and the scripts: `pytest`, no network, three minutes on two CPU cores.

-k shapes is the place to start: a table of what goes into each part and what comes out. Then
-k encoder, extractor, quantizer, fusion, tokenizer, dino, losses, llama pick what one expects,
-k sees the tests of which token sees which, -k golden the numbers that must not drift.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import lpips
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx
from torch import nn

import hita
import sample
import train_ar
import train_tokenizer
from data import judge

ROOT = Path(__file__).parent
TINY = hita.TokenizerConfig(  # M = 6, N = 16, V = 32, D = 16
    image_size=16, channels=8, channel_mult=(1, 1, 2), res_blocks=1, latent_dim=16, layers=1,
    heads=2, num_global=6, global_codebook_size=32, patch_codebook_size=32, k=2, dino="none")
TINY_U = dataclasses.replace(TINY, vfm_recon=True, dino="some-vit", dino_dim=8)
TINY_LLAMA = hita.LlamaConfig(
    layers=2, heads=2, dim=16, num_classes=5, num_global=6, grid=4, global_codebook_size=32,
    patch_codebook_size=32)
VIT = "vit_small_patch14_reg4_dinov2.lvd142m"
torch.set_num_threads(1)  # these tensors are too small to share
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def same_seed_and_cpu(request, monkeypatch):
    """Tests in this process run on the CPU, but for those of CUDA."""
    torch.manual_seed(0)
    if CUDA.mark not in request.node.own_markers:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory):
    """Random weights of a small DINOv2 in timm's format."""
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    safetensors.torch.save_file(timm.create_model(VIT, num_classes=0).state_dict(), path)
    return path


@pytest.fixture
def small_dino(monkeypatch):
    """A ViT-S that sees 56 px: 4 x 4 patches."""
    monkeypatch.setattr(hita.DINOv2, "SIZE", 56)
    return hita.DINOv2(VIT, pretrained=False)


no_network = Mock(side_effect=OSError("no network"))


def refused(message: str, call, *args, **how) -> str:
    """A call is refused with such a message -> the whole of it."""
    with pytest.raises(hita.HitaError, match=message) as error:
        call(*args, **how)
    return str(error.value)


def tiny(**changes) -> hita.HitaTokenizer:
    return hita.HitaTokenizer(dataclasses.replace(TINY, **changes)).eval()


def heads(llama: hita.Llama) -> list[nn.Module]:
    return [module for name, module in llama.named_modules() if name.endswith("_head")]


def tiny_llama(**changes) -> hita.Llama:
    """With weights in its heads, so that the logits say something."""
    llama = hita.Llama(dataclasses.replace(TINY_LLAMA, **changes)).eval()
    for head in heads(llama):
        nn.init.normal_(head.weight)
    return llama


def tiny_ids(batch: int = 2) -> tuple:
    return torch.arange(batch) % 5, torch.randint(32, (batch, 6)), torch.randint(32, (batch, 16))


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


# ---- shapes: B = 2, M = 6 global and N = 4 x 4 patch tokens, D = 16, V = 32 ----

SHAPES = {  # part: (how to build it, inputs, outputs)
    "encoder": (lambda: hita.Encoder(TINY), [(2, 3, 16, 16)], [(2, 16, 4, 4)]),
    "decoder": (lambda: hita.Decoder(TINY), [(2, 16, 4, 4)], [(2, 3, 16, 16)]),
    "dino": (lambda: hita.DINOv2(VIT, pretrained=False), [(2, 3, 32, 32)], [(2, 1 + 16, 384)]),
    "attention": (lambda: hita.Attention(16, 2, True, 0.0), [(2, 9, 16)], [(2, 9, 16)]),
    "extractor": (
        lambda: hita.QueryExtractor(TINY), [(2, 16, 4, 4), None], [(2, 6, 16), (2, 16, 16)]),
    "extractor with DINOv2": (lambda: hita.QueryExtractor(TINY_U),
                              [(2, 16, 4, 4), (2, 257, 8)], [(2, 6, 16), (2, 16, 16)]),
    "centring": (lambda: hita.Centring(6, 12), [(2, 6, 12)], [(2, 6, 12)]),
    "quantizer": (lambda: hita.VectorQuantizer(32, 8), [(2, 9, 8)], [(2, 9, 8), (2, 9), ()]),
    "quantizer that revives": (
        lambda: hita.RevivingQuantizer(32, 8), [(2, 9, 8)], [(2, 9, 8), (2, 9), ()]),
    "fusion": (lambda: hita.Fusion(TINY), [(2, 6, 16), (2, 16, 16), (4, 4)], [(2, 16, 16)]),
    "tokenizer": (tiny, [(2, 3, 16, 16)], [(2, 3, 16, 16), (), (2, 6), (2, 16)]),
    "tokenizer encodes": (lambda: tiny().encode, [(2, 3, 16, 16)], [(2, 6), (2, 16)]),
    "tokenizer decodes": (lambda: tiny().decode, [ids(2, 6), ids(2, 16)], [(2, 3, 16, 16)]),
    "tokenizer without globals": (lambda: tiny(num_global=0, k=0), [(2, 3, 16, 16)],
                                  [(2, 3, 16, 16), (), (2, 0), (2, 16)]),
    "discriminator": (hita.PatchDiscriminator, [(1, 3, 336, 336)], [(1, 1, 40, 40)]),
    "llama": (tiny_llama, [ids(2), ids(2, 6), ids(2, 16)], [(2, 6, 32), (2, 16, 32)]),
    "llama without globals": (lambda: tiny_llama(num_global=0), [ids(2), ids(2, 0), ids(2, 16)],
                              [(2, 0, 32), (2, 16, 32)]),
    "llama with 64 global codes": (lambda: tiny_llama(global_codebook_size=64),
                                   [ids(2), ids(2, 6), ids(2, 16)], [(2, 6, 64), (2, 16, 32)]),
    "llama generates": (lambda: tiny_llama().generate, [ids(2)], [(2, 6), (2, 16)]),
}


@pytest.mark.parametrize("part", SHAPES)
def test_shapes(part, small_dino):
    build, inputs, outputs = SHAPES[part]
    tensors = [torch.randn(x).clamp(-1, 1) if isinstance(x, tuple) and len(x) > 2 else x
               for x in inputs]
    out = build()(*tensors)
    out = vars(out).values() if isinstance(out, hita.TokenizerOutput) else out
    out = [out] if isinstance(out, torch.Tensor) else [x for x in out if x is not None]
    assert [tuple(x.shape) for x in out] == outputs


@pytest.mark.parametrize("preset, parameters, tensors, digest", [
    ("hita-v", 104_240_839, 501, "89dbac22da0e39dd"),
    ("hita-u", 104_767_687, 506, "bf2318fc5a65851c"),
    ("B", 136_152_576, 90, "d6f0e60fc65fb109"), ("L", 376_596_480, 174, ""),
    ("XL", 816_806_400, 258, ""), ("XXL", 1_461_500_928, 342, ""), ("2B", 2_251_549_440, 342, "")])
def test_shapes_and_names_of_the_released_models(preset, parameters, tensors, digest):
    """The digest is of the names in the authors' files."""
    with torch.device("meta"):
        if preset in hita.TOKENIZERS:
            model = hita.HitaTokenizer(hita.TOKENIZERS[preset])
            out = model.extractor(torch.empty(2, 512, 21, 21), torch.empty(2, 257, 1024))
            assert [x.shape for x in out] == [(2, 128, 512), (2, 441, 512)]
        else:
            model = hita.Llama(hita.LlamaConfig(**hita.LLAMA_SIZES[preset]))
            x = model.backbone(torch.empty(1, 569, model.cfg.dim), torch.arange(569))
            assert x.shape == (1, 569, model.cfg.dim)
        weights = released_layout(model)
        data = hita.from_released(weights)
    assert sum(p.numel() for p in model.parameters()) == parameters
    names = "\n".join(sorted(weights)).encode()
    assert len(weights) == tensors and hashlib.sha256(names).hexdigest().startswith(digest)
    assert data["config"] == model.cfg
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in data["ema"].items()} == own


# ---- settings ----------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    dict(k=7), dict(image_size=18), dict(num_global=0, k=2), dict(heads=3), dict(channels=6),
    dict(vfm_recon=True), dict(patch_codebook_size=0), dict(k=-1), dict(beta=-1.0), dict(layers=-1),
    dict(dropout=1.0), dict(beta=float("nan")), dict(channel_mult=(1, 0))])
def test_settings_that_contradict_or_are_out_of_range_are_refused(changes):
    make = lambda: hita.check_numbers(dataclasses.replace(TINY, **changes))
    refused(next(iter(changes)), make)


def test_every_setting_is_read_and_a_new_one_just_works(monkeypatch):
    limited = hita.POSITIVE | hita.NOT_NEGATIVE | hita.SHARES
    for config, script in ((hita.TokenizerConfig, "hita.py"), (hita.LlamaConfig, "hita.py"),
                           (train_tokenizer.Training, "train_tokenizer.py"),
                           (train_ar.Training, "train_ar.py")):
        text = (ROOT / "hita.py").read_text() + (ROOT / script).read_text()
        for name in vars(config()):
            assert re.search(rf"\b(cfg|recipe|self)\.{name}\b", text), name
        limited -= vars(config()).keys()
    assert not limited  # all are for a setting that there is

    @dataclasses.dataclass
    class Changed(train_ar.Training):  # may be negative, and needs no comment
        shift: float = 0.0
        floor: float = -1.0

    monkeypatch.setattr(sys, "argv", ["x", "--floor", "-2", "--shift", "0"])
    parser = hita.Parser("")
    parser.add_settings(Changed())
    assert hita.override(Changed(shift=1.0), parser.parse_args()) == Changed(floor=-2.0)


def test_encoder_norms_have_32_groups_or_one_and_are_the_same_by_channel():
    found = [hita.group_norm(c).num_groups for c in (8, 16, 64, 128, 132, 512)]
    assert found == [1, 1, 1, 32, 1, 32]  # 132 is 4 * 33, and 32 and 33 share no divisor
    norm, x = fill(hita.group_norm(128)), 5 + torch.randn(2, 128, 6, 7)
    grads = []
    for call in (norm, lambda x: hita.norm_by_channel(norm, x)):
        x = x.detach().requires_grad_()
        y = call(x)
        (y * wave(*y.shape)).sum().backward()
        grads.append((y, x.grad))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))


# ---- centring and quantizer --------------------------------------------------

@pytest.mark.parametrize("positions", [6, 1])
def test_centring_is_batch_norm_of_each_position_or_of_all(positions):
    norm, centring = nn.BatchNorm1d(positions * 3, 1e-5, 0.01, False), hita.Centring(positions, 3)
    flat = lambda z: z.reshape(-1, positions * 3)
    for _ in range(3):
        z, weight = 3 * torch.randn(4, 6, 3) + torch.randn(6, 3), torch.randn(4, 6, 3)
        z, reference = z.clone().requires_grad_(), z.clone().requires_grad_()
        found, expected = centring(z), norm(flat(reference))
        assert torch.allclose(flat(found), expected, atol=1e-5)
        (found * weight).sum().backward()
        (expected * flat(weight)).sum().backward()
        assert torch.allclose(z.grad, reference.grad, atol=1e-5)
    assert torch.allclose(centring.mean.flatten(), norm.running_mean, atol=1e-6)
    assert torch.allclose(centring.var.flatten(), norm.running_var, atol=1e-6)
    state = copy.deepcopy(centring.state_dict())
    with torch.no_grad():  # encode, in training mode, too, moves nothing
        assert torch.allclose(flat(centring(z)), norm.eval()(flat(z)), atol=1e-5)
    assert torch.allclose(flat(centring.eval()(z)), norm(flat(z)), atol=1e-5)
    assert all(map(torch.equal, state.values(), centring.state_dict().values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert centring(z.bfloat16()).dtype == torch.float32
    refused("two pictures", centring.train(), z[:1])


def test_quantizer_takes_the_nearest_code_and_weighs_the_encoder_with_beta():
    vq, z = hita.VectorQuantizer(32, 4), torch.randn(2, 5, 4, requires_grad=True)
    codes, found, _ = vq(z)
    sphere = F.normalize(z, dim=-1)
    book = F.normalize(vq.codebook.detach(), dim=-1)
    assert torch.equal(found, torch.cdist(sphere, book[None]).argmin(-1))
    assert torch.allclose(codes, book[found], atol=1e-6)
    assert torch.allclose(vq.lookup(found), codes, atol=1e-6)
    weight = torch.randn_like(codes)
    expected, = torch.autograd.grad((sphere * weight).sum(), z)
    (codes * weight).sum().backward()
    assert torch.allclose(z.grad, expected, atol=1e-6) and vq.codebook.grad is None
    grads = []
    for beta in (0.25, 0.5):
        other = hita.VectorQuantizer(32, 4, beta)
        other.load_state_dict(vq.state_dict())
        grads.append(torch.autograd.grad(other(z)[2], (z, other.codebook)))
    (of_z, of_codes), (of_z2, of_codes2) = grads
    assert torch.allclose(2 * of_z, of_z2)  # encoder: proportional to beta
    assert torch.allclose(of_codes, of_codes2) and of_codes.abs().sum() > 0  # codes: without
    vq, z = hita.VectorQuantizer(4096, 8), torch.randn(1, 256, 8)
    with torch.autocast("cpu", torch.bfloat16):  # in float32 nevertheless
        codes, found, loss = vq(z)
    assert torch.equal(found, vq(z)[1]) and codes.dtype == loss.dtype == torch.float32


def test_quantizer_revives_unused_codes_and_counts_hits_over_all_processes(monkeypatch):
    vq = hita.RevivingQuantizer(64, 4)
    cone = torch.randn(8, 32, 4) + torch.tensor([5.0, 0, 0, 0])  # few codes are near it
    before = len(vq.eval()(cone)[1].unique())
    for _ in range(3):
        vq.train()(cone)
    frozen = vq.codebook.clone()
    assert before < 32 and len(vq.eval()(cone)[1].unique()) > 50
    assert torch.equal(frozen, vq.codebook)  # eval mode moves nothing
    vq.train().hits.fill_(1.0)
    monkeypatch.setattr(vq, "revive", lambda z: None)
    monkeypatch.setattr(hita, "all_sum", lambda x: 2 * x)  # as if of two processes
    vq(torch.randn(1, 10, 4))
    assert vq.hits.sum().item() == 64 + 20


def test_another_quantizer_needs_two_methods_only(monkeypatch):
    class Signs(nn.Module):  # FSQ with two levels: a code is the signs of z
        def __init__(self, size, dim, beta):
            super().__init__()
            self.register_buffer("powers", 2 ** torch.arange(dim))

        def forward(self, z):
            ids = ((z > 0) * self.powers).sum(-1)
            return z + (self.lookup(ids) - z).detach(), ids, z.new_zeros(())

        def lookup(self, ids):
            return 2.0 * (ids[..., None] // self.powers % 2) - 1

    monkeypatch.setattr(hita, "VectorQuantizer", Signs)
    tokenizer, images = tiny(patch_code_dim=5, global_code_dim=5), torch.randn(2, 3, 16, 16) / 4
    out = tokenizer(images)
    (out.recon.sum() + out.codebook_loss).backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert torch.allclose(tokenizer.decode(*tokenizer.encode(images)), out.recon, atol=1e-5)


# ---- what sees what ----------------------------------------------------------

@pytest.mark.parametrize("k", [0, 1, 2, 6])
def test_fusion_decides_which_tokens_a_cell_sees(k):
    fusion, M, N = tiny(k=k).fusion, 6, 16
    tokens = torch.randn(1, M + N, 16, requires_grad=True)
    states = fusion(tokens[:, :M], tokens[:, M:], (4, 4))  # (1, N, D)
    for i in range(N):
        grad, = torch.autograd.grad(states[0, i].sum(), tokens, retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0  # (M + N,)
        # cell i is the state at position M - k + i: the table in the docstring of Fusion
        assert torch.equal(seen, torch.arange(M + N) <= M - k + i)


def test_extractor_sees_all_patches_and_dino_then_is_causal_without_it():
    extractor, inside = hita.QueryExtractor(TINY_U).eval(), []
    extractor.causal.register_forward_hook(lambda module, args, out: inside.append(args[0]))
    x, tokens = torch.randn(1, 16, 4, 4), torch.randn(1, 257, 8)
    changed = x.clone()
    changed[..., -1, -1] = torch.randn(16)  # the last patch only
    for other in ((changed, tokens), (x, tokens + torch.randn(1, 257, 8))):
        for before, after in zip(extractor(x, tokens), extractor(*other)):
            assert ((before - after).abs().amax(-1) > 1e-5).all()  # all of both
    assert inside[0].shape == (1, 6 + 16, 16)
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, 4] = torch.randn(16)
    moved = (extractor.causal(x) - extractor.causal(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 6


def test_fusion_mask_token_sees_everything_and_globals_not_it():
    fusion, inside = hita.Fusion(TINY_U).eval(), []
    globals_ = torch.randn(1, 6, 16, requires_grad=True)
    fusion.layers[0].register_forward_hook(lambda module, args, out: inside.append(out))
    features = fusion.reconstruct_features(globals_, 16)
    assert features.shape == (1, 256, 8)
    inputs = globals_, fusion.positions
    for grad in torch.autograd.grad(features[0, 0].sum(), inputs, retain_graph=True):
        assert (grad.abs().sum(-1) > 0).all()  # the first mask token sees all
    grads = torch.autograd.grad(inside[0][0, 2].sum(), inputs, allow_unused=True)
    assert (grads[0].abs().sum(-1) > 0)[0].tolist() == [True] * 3 + [False] * 3
    assert grads[1].abs().sum() == 0


def test_llama_sees_what_comes_before_and_knows_rows_and_columns():
    llama = tiny_llama()
    class_ids, g, p = tiny_ids()
    logits = torch.cat(llama(class_ids, g, p), dim=1)
    for position in (0, 5, 6, 7, 20):  # that token is the next input
        g2, p2 = g.clone(), p.clone()
        (g2 if position < 6 else p2)[:, position if position < 6 else position - 6] += 1
        moved = (torch.cat(llama(class_ids, g2 % 32, p2 % 32), dim=1) - logits).abs().amax(-1)[0]
        assert (moved > 1e-6).tolist() == [i > position for i in range(22)]
    other = torch.cat(llama(class_ids + 1, g, p), dim=1)
    assert ((other - logits).abs().amax(-1) > 1e-6).all()
    cos, sin = hita.position_rotations(6, 4, 8)
    assert cos.shape == sin.shape == (22, 4)
    assert (cos[:6] == 1).all() and not cos[6].any() and not sin[:7].any()  # 6: looks at all
    cell = 7 + 2 * 4 + 3  # patch at row 2, column 3
    expected = torch.tensor([2.0, 2 * 0.01, 3.0, 3 * 0.01])
    assert torch.allclose(torch.atan2(sin, cos)[cell], expected, atol=1e-5)


# ---- tokenizer ---------------------------------------------------------------

@pytest.mark.parametrize("causal, dropped", [(False, 0.5), (True, 0.0)])
def test_attention_drops_outputs_or_probabilities_if_causal(causal, dropped):
    attention = hita.Attention(16, 2, causal, 0.5)
    x = torch.randn(4, 1, 16).expand(4, 50, 16)  # whatever is attended to: the same output
    y, whole = attention(x), attention.eval()(x)
    assert (y == 0).float().mean().item() == approx(dropped, abs=0.05)
    assert torch.allclose(y, 2 * whole * (y != 0), atol=1e-5) == (not causal)
    assert torch.equal(attention(x), whole) and (attention.q.bias is None) == (not causal)


@pytest.mark.parametrize("changes", [
    {}, dict(num_global=0, k=0), dict(revive_codes=True, centre=True, dropout=0.5)])
def test_tokenizer_encodes_alike_in_all_modes_and_stays_as_it_is(changes):
    tokenizer, images = tiny(**changes), torch.rand(4, 3, 16, 16) * 2 - 1
    state = copy.deepcopy(tokenizer.state_dict())
    found, out = tokenizer.encode(images), tokenizer(images)
    assert found[0].dtype == found[1].dtype == torch.int64
    assert torch.equal(out.global_ids, found[0]) and torch.equal(out.patch_ids, found[1])
    assert torch.allclose(out.recon, tokenizer.decode(*found), atol=1e-5)
    assert all(map(torch.equal, tokenizer.train().encode(images), found))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, tokenizer.encode(images), found))
    assert all(map(torch.equal, tokenizer.state_dict().values(), state.values()))


def overfit(model: nn.Module, lr: float, steps: int, losses) -> list[float]:
    """The first of the losses after each step; their sum is minimised."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr), []
    for _ in range(steps):
        found.append(losses())
        optimizer.zero_grad()
        sum(found[-1]).backward()
        optimizer.step()
    return [terms[0].item() for terms in found]


def test_tokenizer_overfits_two_pictures_with_all_gradients_and_codebooks():
    tokenizer = tiny(dropout=0.0, revive_codes=True).train()
    images = F.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, 16)

    def losses():
        out = tokenizer(images)
        return hita.reconstruction_loss(images, out.recon), out.codebook_loss

    rec = overfit(tokenizer, 3e-3, 120, losses)
    assert rec[-1] < 0.3 * rec[0]
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())
    decode, (_, g, p) = tiny().decode, tiny_ids()
    assert (decode(g, p) - decode(g.flip(0), p)).abs().max() > 0.01
    assert (decode(g, p) - decode(g, p.flip(0))).abs().max() > 0.01


def test_tokenizer_takes_other_sizes_and_says_what_it_cannot_take():
    tokenizer, wide = tiny(), torch.randn(1, 3, 16, 32) / 4
    assert tokenizer(torch.zeros(1, 3, 24, 24)).recon.shape == (1, 3, 24, 24)
    g, p = tokenizer.encode(wide)
    assert torch.allclose(tokenizer.decode(g, p, grid=(4, 8)), tokenizer(wide).recon, atol=1e-5)
    for wrong in ((g, p[:, :-1]), (g[:, 1:], p), (g + 99, p), (g, p - 99), (g.float(), p),
                  (g, p.int()), (g, p[0]), (g.repeat(2, 1), p), (None, p), (g, p.tolist()),
                  (g.tolist(), p), (g, p, (-4, -8)), (g, p, (32,)), (g, p, (4.0, 8.0)),
                  (g, p[:, :0], (0, 0))):
        refused("ids", tokenizer.decode, *wrong[:2], grid=(wrong + ((4, 8),))[2])
    for images, message in (
            (Image.new("RGB", (16, 16)), "load_picture"), ("cat.jpg", "load_picture"),
            (ids(1, 3, 16, 16).byte(), "127.5"), (torch.full((1, 3, 16, 16), 200.0), "200"),
            (torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
            (torch.zeros(1, 3, 16, 18), "n x 4"), (torch.zeros(0, 3, 16, 16), "n x 4"),
            (torch.zeros(1, 3, 16, 16).double(), "float64.*float32")):
        refused(message, tokenizer.encode, images)
    with pytest.warns(UserWarning, match="2 \\* x - 1"):
        tokenizer.encode(torch.rand(1, 3, 16, 16))
    positions = torch.arange(16.0).reshape(1, 16, 1)  # are read row by row
    assert hita.resize_positions(positions, 4, 4) is positions
    wide = hita.resize_positions(positions, 4, 8).reshape(4, 8)
    assert (wide.diff(dim=1) > 0).all() and wide.diff(dim=0).mean() == approx(4, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokenizer_works_in_half_precision(dtype, small_dino):
    """Codes are always chosen in float32, what leads to them and back is not."""
    tokenizer, images = tiny(dino=VIT, dino_dim=384), torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer.attach_dino(small_dino)
    found = tokenizer.encode(images)
    expected = tokenizer.decode(*found)
    tokenizer.to(dtype)
    assert all((a == b).float().mean() > 0.5
               for a, b in zip(tokenizer.encode(images.to(dtype)), found))
    recon = tokenizer.decode(*found)
    assert recon.dtype == dtype and (recon - expected).abs().max() < 0.1 * expected.std()
    refused("float32.*float16", tokenizer.encode, images)


# ---- DINOv2 and losses -------------------------------------------------------

def test_dino_is_frozen_in_no_checkpoint_and_shown_blurred_pictures(small_dino):
    tokenizer = tiny(dino=VIT, dino_dim=384, vfm_recon=True, dropout=0.0)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    refused("add_dino", tokenizer.encode, images)
    plain = len(list(tokenizer.parameters())), set(tokenizer.state_dict())
    tokenizer.attach_dino(small_dino)
    assert (len(list(tokenizer.parameters())), set(tokenizer.state_dict())) == plain
    out = tokenizer.train()(images)
    (out.recon.sum() + out.feature_loss).backward()
    assert not small_dino.training and all(p.grad is None for p in small_dino.parameters())
    assert tokenizer.extractor.dino_proj[0].weight.grad.abs().sum() > 0
    codes = tokenizer.global_quantizer.lookup(out.global_ids)
    features = tokenizer.fusion.reconstruct_features(tokenizer.global_up(codes), 4)
    tokens = small_dino(images)
    cosine = F.cosine_similarity(tokens[:, 1:], features, dim=-1)
    assert out.feature_loss.item() == approx(1 - cosine.mean().item(), abs=1e-5)
    full = small_dino.vit.forward_features(small_dino.preprocess(images))
    assert torch.equal(tokens[:, 0], full[:, 0]) and torch.equal(tokens[:, 1:], full[:, 5:])
    refused("384", tiny(dino=VIT, dino_dim=8).attach_dino, small_dino)
    x = torch.linspace(-1, 1, 8)[None, None, :, None].expand(1, 3, 8, 8)
    y = small_dino.preprocess(x)  # a ramp stays a ramp: the corners are aligned
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    assert torch.allclose(y[0, :, 0, 0], (0 - mean) / std, atol=1e-4)
    assert torch.allclose(y[0, :, -1, 0], (1 - mean) / std, atol=1e-4)
    assert y[0, 0, 3, 0] > y[0, 0, 0, 0] + 0.15  # at once: no border of half a pixel
    noise = torch.randn(1, 3, 168, 168).clamp(-1, 1)
    blurred, plain = small_dino.preprocess(noise), small_dino.preprocess(noise[..., :56, :56])
    assert blurred.std() < 0.5 * plain.std()  # a blur precedes shrinking
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small_dino.preprocess(noise), blurred)


def test_dino_is_the_same_from_the_original_file_and_from_timms(vit_file, tmp_path):
    """The original has a position for the cls token, too, which timm has added already."""
    weights = safetensors.torch.load_file(vit_file)
    cls_position = torch.randn(1, 1, 384)
    positions = torch.cat([cls_position, weights["pos_embed"]], dim=1)
    original = {k: v for k, v in weights.items() if k != "reg_token"} | {
        "mask_token": torch.zeros(1, 384), "register_tokens": weights["reg_token"],
        "cls_token": weights["cls_token"] - cls_position, "pos_embed": positions}
    torch.save(original, tmp_path / "original.pth")
    dinos = [hita.DINOv2(VIT, file) for file in (vit_file, tmp_path / "original.pth")]
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(dinos[0](x), dinos[1](x), atol=1e-3)
    table = weights["pos_embed"].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    table = F.interpolate(table, (16, 16), mode="bicubic", antialias=True)  # as DINOv2 does
    assert torch.allclose(dinos[1].vit.pos_embed, table.flatten(2).transpose(1, 2), atol=1e-5)
    refused("--dino-file", hita.DINOv2, VIT, ROOT / "hita.py")


def test_losses_have_their_values_and_the_perceptual_one_a_gradient():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hita.discriminator_loss(real, fake).item() == approx(0.5 * (0.5 + 1.0))
    expected = (np.log(2) + np.log1p(np.exp(-5))) / 2
    assert hita.adversarial_loss(torch.tensor([0.0, 5.0])).item() == approx(expected)
    x = torch.zeros(2, 3, 4, 4)
    assert hita.reconstruction_loss(x, x + 0.5).item() == approx(0.5)  # 2 * 0.25
    assert hita.psnr(x, x + 0.2).tolist() == approx([20.0, 20.0])  # 10 log10(4 / 0.04)
    recipe, zero = train_tokenizer.Training(gan_weight=0.1, lpips_weight=0.2), torch.zeros(())
    out = hita.TokenizerOutput(x + 0.5, zero, None, ids(2, 6), ids(2, 16))
    terms = train_tokenizer.generator_losses(x, out, recipe, lambda x, y: zero + 1, lambda x: zero)
    assert {name: term.item() for name, term in terms.items()} == approx(
        {"rec": 0.5, "codebook": 0.0, "lpips": 0.2, "adv": 0.1 * np.log(2)})
    loss = hita.PerceptualLoss(pretrained=False)
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    first = loss(x, y)
    first.backward()
    assert torch.equal(first, loss(x, y)) and y.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())
    flat = torch.zeros(1, 4, 2, 2, requires_grad=True)  # features may all be 0
    lpips.normalize_tensor(flat).sum().backward()
    assert flat.grad.isfinite().all()


# ---- Llama -------------------------------------------------------------------

def logits_of_steps(llama: hita.Llama, *args, **how) -> tuple:
    """generate(*args, **how) -> the logits of all its steps (B, M + N, V), ids (B, M + N)."""
    seen = []
    for head in heads(llama):
        head.register_forward_hook(lambda module, args, out: seen.append(out))
    found = torch.cat(llama.generate(*args, **how), dim=1)
    return torch.stack(seen, dim=1).float(), found


@pytest.mark.parametrize("changes", [
    {}, dict(num_global=0), dict(dim=24), dict(grid=12)])  # 12 channels a head; 150 tokens
def test_llama_cached_steps_equal_the_full_forward(changes):
    """Also at M - 1, M and M + 1, where table, head and positions change."""
    llama, class_ids = tiny_llama(**changes), torch.tensor([1, 4])
    cached, found = logits_of_steps(llama, class_ids, top_k=1)
    kinds = found.split([llama.cfg.num_global, llama.cfg.grid ** 2], dim=1)
    full = torch.cat(llama(class_ids, *kinds), dim=1)
    assert torch.allclose(cached, full, atol=1e-4) and torch.equal(full.argmax(-1), found)


@pytest.mark.parametrize("changes", [{}, dict(num_global=0)])
@pytest.mark.parametrize("released", [False, True])
def test_llama_reads_given_tokens_at_once(changes, released):
    llama, class_ids = tiny_llama(**changes), torch.arange(5)
    draw = lambda given: torch.cat(llama.generate(
        class_ids, 2.0, top_k=1, given=given, released_sampling=released), dim=1)
    found = draw(None)
    for length in (0, 1, 5, 6, 7, found.shape[1] - 1, found.shape[1]):
        assert torch.equal(draw(found[:, :length]), found)
    for given in (found.float(), found[:4], found[0], found.repeat(1, 2), found + 99, -found - 1,
                  found.tolist()):
        refused("given", draw, given)
    for wrong in (207, ["flag"], ids(1) + 5, ids(1) - 1, ids(1) + 0.5, ids() + 1, ids(0)):
        refused("class ids", llama.generate, wrong)
    for name, values in dict(seed=(-1, None), top_k=(None, 2.5), top_p=(-0.1, 1.1, "1"),
                             temperature=(-1, float("nan")), cfg_scale=(-1, float("nan"))).items():
        for value in values:
            refused(f"{name} is {value}", llama.generate, class_ids, **{name: value})


def test_llama_compiles_as_a_whole_and_keeps_its_cache_only_then(monkeypatch):
    llama, class_ids = tiny_llama(), torch.arange(5)
    draw = lambda seed: torch.cat(llama.generate(class_ids, 2.0, seed=seed), dim=1)
    expected, step = [draw(seed) for seed in range(8)], llama.step
    llama.step = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(draw(0), expected[0])
    llama.step = step
    with torch.inference_mode():
        assert torch.equal(draw(0), expected[0])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(draw, range(8)), expected))
    llama.empty_caches = made = Mock(wraps=llama.empty_caches)
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)
    llama.compile_step()
    with torch.inference_mode():
        draw(0)
    assert torch.equal(draw(1), expected[1]) and made.call_count == 1


@CUDA
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("V", [32, 16384])
def test_llama_on_cuda_draws_what_the_cpu_draws(V, compiled):
    """Guidance, given tokens, sampling; in float32 the same ids but for near-ties; in bfloat16
    it runs."""
    torch._dynamo.reset()  # what was compiled before counts towards a limit
    llama = tiny_llama(global_codebook_size=V, patch_codebook_size=V)
    class_ids = torch.arange(64) % 5
    draw = lambda model, **how: torch.cat(model.generate(
        class_ids.to(model.norm.weight.device), 2.0, seed=1, **how), dim=1).cpu()
    expected = draw(llama)
    llama.cuda()
    if compiled:
        llama.compile_step()
    for _ in range(2):  # compiled and recorded, then launched only
        same = (draw(llama) == expected).float().mean()  # after a near-tie all goes another way
        assert same > (0.95 if V == 32 else 0.5)
    given = expected[:, :8].cuda()
    assert torch.equal(draw(llama, given=given)[:, :8], expected[:, :8])
    for p in llama.parameters():
        p.data = p.data.bfloat16()
    assert draw(llama, top_k=100, top_p=0.9).max() < V


def test_llama_guides_and_draws_a_picture_alike_whatever_is_made_beside_it():
    llama, class_ids = tiny_llama(), torch.arange(5)
    draw = lambda scale: torch.cat(llama.generate(class_ids, scale, seed=1), 1)
    assert torch.equal(draw(1.0), draw(1.0 + 1e-7)) and not torch.equal(draw(1.0), draw(5.0))
    unconditional = draw(0.0)  # scale 0 forgets the class
    llama.class_embedding.weight.data[:5] += 1
    assert torch.equal(unconditional, draw(0.0))
    logits, found = logits_of_steps(llama, class_ids, 3.0, top_k=1)
    cond, uncond = logits.chunk(2)  # (B, M + N, V) each
    assert torch.equal(found, (3 * cond - 2 * uncond).argmax(-1))
    draw = lambda *classes, seed=3: torch.cat(
        llama.generate(torch.tensor(classes), 2.0, 1.0, 10, 0.9, seed=seed), dim=1)
    many = draw(4, 1, 4, 2, 4, 1)
    assert torch.equal(draw(4, 4, 4), many[[0, 2, 4]]) and torch.equal(draw(1, 1), many[[1, 5]])
    assert torch.equal(draw(2), many[3:4]) and not torch.equal(draw(2, seed=4), many[3:4])
    assert len(draw(4, 4, 4).unique(dim=0)) == 3 and many.min() >= 0 and many.max() < 32


def test_llama_filters_and_draws_but_never_an_id_of_probability_0():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda **how: hita.filter_logits(logits, **how)[0].isfinite().nonzero()[:, 0].tolist()
    assert kept() == [0, 1, 2, 3] and kept(top_k=2) == [0, 1]
    assert [kept(top_p=p) for p in (0.4, 0.5, 0.9)] == [[0], [0, 1], [0, 1, 2]]  # one crosses
    ties = hita.filter_logits(torch.tensor([[1.0, 1.0, 0.0]]), top_k=1)
    assert ties[0].tolist() == [1, 1, -torch.inf]  # ties stay
    assert torch.allclose(hita.filter_logits(logits, temperature=0.5), 2 * logits)
    cold = hita.filter_logits(logits, temperature=1e-45).softmax(-1)
    assert cold[0].tolist() == [1, 0, 0, 0]
    for V in (1, 127, 128, 129, 16384):  # sums are taken in blocks
        probs = torch.rand(3, V).softmax(dim=-1)
        assert torch.allclose(hita.cumulative_sums(probs), probs.cumsum(dim=-1), atol=1e-5)
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    draw = lambda u: hita.draw(probs, torch.tensor([[u]])).item()
    assert [draw(u) for u in (0.0, 0.29, 0.31, 1 - 2 ** -24)] == [1, 1, 3, 3]
    many = torch.rand(256, 16384)
    many[:, 8192] = 0  # the first of a block: its sum may be rounded up
    many /= many.sum(dim=1, keepdim=True)
    sums = hita.cumulative_sums(many)
    for u in (torch.zeros(256, 1), sums[:, 8191:8192] / sums.amax(dim=1, keepdim=True)):
        assert (many.gather(1, hita.draw(many, u)) > 0).all()


def test_llama_drops_class_labels_at_the_given_rate_while_training_only():
    llama, seen = tiny_llama(class_dropout=0.1), []
    llama.class_embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for training in (True, False):
        llama.train(training)(ids(2000), ids(2000, 6), ids(2000, 16))
    dropped = [(labels == 5).float().mean().item() for labels in seen]
    assert dropped == [approx(0.1, abs=0.03), 0]  # 4.5 standard deviations
    assert not seen[1].any()


def test_llama_overfits_and_its_evaluation_weighs_all_pictures_alike():
    config = dataclasses.replace(TINY_LLAMA, dropout=0.0, token_dropout=0.0, class_dropout=0.0)
    llama, (class_ids, g, p) = hita.Llama(config), tiny_ids(4)
    found = overfit(llama, 1e-2, 150, lambda: [
        sum(hita.llama_losses(*llama(class_ids, g, p), g, p))])
    assert found[0] == approx(2 * np.log(32), abs=1e-4)  # zero heads: uniform
    assert found[-1] < 0.7
    llama, (class_ids, g, p) = tiny_llama(), tiny_ids(70)  # batches of 64 and 6
    rows = torch.cat([class_ids[:, None] + 1, g, p], dim=1).numpy()
    found = train_ar.evaluate(llama, rows, torch.device("cpu"))
    expected = [loss.item() for loss in hita.llama_losses(*llama(class_ids, g, p), g, p)]
    assert [found["val_global"], found["val_patch"]] == approx(expected, rel=1e-5)


def test_llama_released_sampling_embeds_the_last_global_as_a_patch():
    llama, class_ids = tiny_llama(), torch.arange(5)
    g, p = llama.generate(class_ids, top_k=1, released_sampling=True)
    x = llama.embed(class_ids, g[:, :-1], torch.cat([g[:, -1:], p[:, :-1]], dim=1))
    x = llama.backbone(x, torch.arange(22))
    logits = torch.cat([llama.global_head(x[:, :6]), llama.patch_head(x[:, 6:])], dim=1)
    assert torch.equal(logits.argmax(-1), torch.cat([g, p], 1))
    g2, p2 = llama.generate(class_ids, top_k=1)
    assert torch.equal(g, g2) and not torch.equal(p, p2)


# ---- golden numbers: they must not drift --------------------------------------

def fill(module: nn.Module) -> nn.Module:
    """Weights from numpy's frozen generator, so that torch's does not matter."""
    for i, p in enumerate(module.parameters()):
        values = np.random.RandomState(i).standard_normal(p.shape).astype(np.float32)
        p.data = torch.from_numpy(values) / p[0].numel() ** 0.5
    return module.eval()


def wave(*shape: int) -> torch.Tensor:
    return (torch.arange(np.prod(shape)) * 0.37).sin().reshape(shape)


GOLDEN = {
    "encoder": (lambda: fill(hita.Encoder(TINY))(wave(2, 3, 16, 16)), 0.909424, 0.0587585),
    "extractor": (lambda: fill(hita.QueryExtractor(TINY_U))(
        wave(2, 16, 4, 4), wave(2, 257, 8)), 2.29967, 0.473899),
    "extractor without DINOv2": (lambda: fill(hita.QueryExtractor(TINY))(
        wave(2, 16, 4, 4), None), 1.66395, -0.371092),
    "quantizer": (lambda: fill(hita.VectorQuantizer(32, 4))(wave(2, 9, 4)), 3.54454, 0.407916),
    "fusion": (lambda: fill(hita.Fusion(TINY))(
        wave(2, 6, 16), wave(2, 16, 16), (4, 4)), 2.3315, 0.32831),
    "fusion, feature branch": (lambda: fill(hita.Fusion(TINY_U)).reconstruct_features(
        wave(2, 6, 16), 8), 2.12484, -0.423527),
    "decoder": (lambda: fill(hita.Decoder(TINY))(wave(2, 16, 4, 4)), 0.570233, -0.014906),
    "tokenizer": (lambda: vars(fill(tiny())(wave(2, 3, 16, 16))).values(), 1.24069, -0.521249),
    "discriminator": (lambda: fill(hita.PatchDiscriminator(8))(
        wave(1, 3, 64, 64)), 0.574994, -0.0305378),
    "llama": (lambda: fill(tiny_llama())(torch.tensor([1, 4]), *(
        torch.arange(2 * n).reshape(2, n) % 32 for n in (6, 16))), 0.701962, 0.723494),
    "llama with 12 channels a head": (lambda: fill(tiny_llama(dim=24))(torch.tensor([1, 4]), *(
        torch.arange(2 * n).reshape(2, n) % 32 for n in (6, 16))), 0.921629, 0.322565),
}


@pytest.mark.parametrize("component", GOLDEN)
def test_golden_numbers_of_tiny_components(component):
    """The mean magnitude, and a sum with signs, which moves when values change places."""
    call, magnitude, signed = GOLDEN[component]
    out = call()
    parts = [out] if isinstance(out, torch.Tensor) else [x for x in out if x is not None]
    out = torch.cat([x.double().flatten() for x in parts])
    waved = (out * (torch.arange(len(out)) * 0.61).cos()).sum() / len(out) ** 0.5
    found = [out.abs().mean().item(), waved.item()]
    assert found == approx([magnitude, signed], rel=1e-4, abs=1e-4)


# ---- checkpoints, released files, and prints, the trained pair in data/ -------

def save_tiny(folder: Path, tokenizer=None, llama=None) -> tuple:
    """A tokenizer and a Llama that belong together, as the scripts leave them."""
    tokenizer, llama = tokenizer or tiny(), llama or tiny_llama()
    made_from = {"tokenizer": str(folder / "tokenizer.pt"),
                 "tokenizer_hash": hita.fingerprint(tokenizer)}
    folder.mkdir(exist_ok=True)
    for kind, model, facts in (
            ("tokenizer", tokenizer, {}),
            ("llama", llama, {"classes": list("abcde"), "made_from": made_from})):
        data = {"kind": kind, "config": vars(model.cfg), "ema": model.state_dict(), **facts}
        torch.save(data, folder / f"{kind}.pt")
    return tokenizer, llama


def test_checkpoints_come_back_the_same_or_are_refused_and_the_old_stays(tmp_path, monkeypatch):
    class Malicious:
        __reduce__ = lambda self: (os.system, ("echo ran > ran.txt",))

    monkeypatch.chdir(tmp_path)
    for model, kind in zip(save_tiny(tmp_path), ("tokenizer", "llama")):
        found = hita.load_model(f"{kind}.pt", kind)
        assert found.cfg == model.cfg and not found.training
        assert all(map(torch.equal, found.state_dict().values(), model.state_dict().values()))
    assert hita.load_llama("llama.pt").classes == list("abcde")
    Path("cut.pt").write_bytes(Path("llama.pt").read_bytes()[:1000])
    good = torch.load("llama.pt")
    ema, config = good["ema"], good["config"]
    for name, content, message in (
            ("nothing.pt", None, "train_ar.py"), ("cut.pt", None, "no checkpoint"),
            ("tokenizer.pt", None, "holds a tokenizer"),
            ("x.pt", {"ema": {}, "args": Malicious()}, "safely"),
            ("x.pt", {**good, "config": {"colour": "red"}}, "another version: .*colour"),
            ("x.pt", {**good, "config": config | dict(dim="wide")}, "another version: .*wide"),
            *(("x.pt", x, "no checkpoint") for x in ([1], {"ema": [1]}, {0: 1}, {"kind": "llama"})),
            ("x.pt", {"model": torch.ones(2), "some": 1}, "no checkpoint"),
            ("x.pt", {**good, "config": config | dict(heads=-1)}, "heads"),
            ("x.pt", {**good, "ema": {"extra": torch.zeros(1), **ema}}, "extra"),
            ("x.pt", {**good, "ema": {**ema, "norm.weight": torch.zeros(3)}}, "norm.weight"),
            ("x.pt", {**good, "ema": {k: ema[k] for k in list(ema)[:-1]}}, list(ema)[-1])):
        if content:
            torch.save(content, name)
        refused(message, hita.load_llama, name)
    assert not Path("ran.txt").exists()

    def full_disk(data, f):
        f.write(b"half a")
        raise OSError("No space left on device")

    for name in ("x.tmp", "llama.pt.tmp"):  # of someone else
        Path(name).touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(torch, "save", full_disk)
    refused("No space left", hita.write_file, Path("llama.pt"), lambda f: torch.save(good, f))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_llama_finds_its_tokenizer_by_the_hash_of_the_weights(tmp_path):
    tokenizer, _ = save_tiny(tmp_path / "a")
    save_tiny(tmp_path / "b", tiny(k=1))
    made_from = hita.load_llama(tmp_path / "a/llama.pt").made_from
    right, wrong = str(tmp_path / "a/tokenizer.pt"), str(tmp_path / "b/tokenizer.pt")
    find = lambda *places: hita.find_tokenizer(made_from, *places)
    for places in ((None, wrong), (right, wrong)):
        path, found = find(*places)
        assert path == right and torch.equal(found.patch_up.weight, tokenizer.patch_up.weight)
    for flag in (wrong, "typo.pt"):
        refused(f"{flag} .*not .*this Llama's.*--tokenizer", find, flag, wrong)
    (tmp_path / "a").rename(tmp_path / "moved")  # the whole directory went elsewhere
    assert find(None, tmp_path / "moved/tokenizer.pt")[0] == str(tmp_path / "moved/tokenizer.pt")
    for places in ((None, wrong), (None, "nowhere.pt")):
        refused("train_ar.py.*--out", find, *places)
    made_from = {"tokenizer": "hita-v"}
    refused("goes with hita-v, not with hita-u", find, "hita-u", "nowhere.pt")


THEIRS = [  # our names (regular expressions) -> names in the released files, one after another
    (r"extractor\.queries", "encode_transformer.carrier_tokens"),
    (r"extractor\.positions", "encode_transformer.pos_embed"),
    (r"extractor\.dino_proj", "encode_transformer.proj.mlp"),
    (r"extractor\.norm", "encode_transformer.norm_pre"),
    (r"(extractor\.bidirectional.*)attn\.out", r"\1attn1.to_out.0"),
    (r"(extractor\.bidirectional.*)attn\.", r"\1attn1.to_"),
    (r"((?:extractor|fusion)\..*)attn\.(\w+)", r"\1attn1.\2_proj"), (r"ffn", "ffnet"),
    (r"extractor\.bidirectional", "encode_transformer.transformer1.layers"),
    (r"extractor\.causal", "encode_transformer.transformer2.layers"),
    (r"fusion\.global_positions", "decode_transformer.slot_position_embedding"),
    (r"fusion\.positions", "decode_transformer.position_embedding"),
    (r"fusion\.layers", "decode_transformer.transformer.layers"),
    (r"fusion\.mask_token", "decode_transformer.mask_embedding"),
    (r"fusion\.vfm_norm", "decode_transformer.norm_vfm"),
    (r"fusion\.vfm_proj", "decode_transformer.proj"), (r"fusion\.norm", "decode_transformer.norm"),
    (r"global_quantizer\.codebook", "slot_quantize.embedding.weight"),
    (r"patch_quantizer\.codebook", "quantize.embedding.weight"),
    (r"patch_down", "quant_conv"), (r"patch_up", "post_quant_conv"),
    (r"global_down", "pre_slots_quant"), (r"global_up", "post_slots_quant"),
    (r"levels", "conv_blocks"), (r"shortcut", "nin_shortcut"),
    (r"(coder\..*)\.out\.", r"\1.proj_out."), (r"(encoder.*)resample\.1", r"\1downsample.conv"),
    (r"(decoder.*)resample\.1", r"\1upsample.conv"),
    (r"class_embedding", "cls_embedding.embedding_table"), (r"patch_embedding", "tok_embeddings"),
    (r"global_embedding", "slot_embeddings"), (r"^global_positions", "slot_pos"),
    (r"^blocks(.*)norm1", r"layers\1attention_norm"), (r"^blocks(.*)norm2", r"layers\1ffn_norm"),
    (r"^blocks(.*)qkv", r"layers\1attention.wqkv"), (r"^blocks(.*)out", r"layers\1attention.wo"),
    (r"^blocks(.*)(w\d\.)", r"layers\1feed_forward.\2"), (r".*_head", "output"),
]


def released_layout(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights as the released files have them."""
    weights = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in THEIRS:
            key = re.sub(pattern, name, key)
        weights[key] = tensor
    if isinstance(model, hita.Llama):
        heads = [model.global_head.weight, model.patch_head.weight]
        return weights | {"output.weight": torch.cat(heads).detach()}
    for name in ("quant_conv.weight", "post_quant_conv.weight"):
        weights[name] = weights[name][..., None, None]
    used = {f"{x}quantize.codebook_used": torch.zeros(9) for x in ("", "slot_")}
    return weights | used


@pytest.fixture
def small_released(monkeypatch, tmp_path):
    """A small Hita-U and B, which the Hub hands out in the released layout."""
    monkeypatch.setitem(hita.TOKENIZERS, "hita-u", dataclasses.replace(
        hita.TOKENIZERS["hita-u"], channels=4, channel_mult=(1, 1, 1, 1, 1), res_blocks=1,
        latent_dim=16, layers=1, heads=2))
    monkeypatch.setitem(hita.LLAMA_SIZES, "B", dict(layers=1, heads=2, dim=16))
    tokenizer = hita.HitaTokenizer(hita.TOKENIZERS["hita-u"]).eval()
    llama = fill(hita.Llama(hita.LlamaConfig(**hita.LLAMA_SIZES["B"])))
    fetched = []

    def download(repository, file):
        fetched.append(file)
        model, path = (llama, tmp_path / "b") if "GPT-B" in file else (tokenizer, tmp_path / "u")
        ema = released_layout(model)
        torch.save({"model": {k: v + 1 for k, v in ema.items()}, "ema": ema,
                    "args": argparse.Namespace(lr=1)}, path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tokenizer, llama, fetched


def test_released_files_load_strictly_or_say_what_to_do(small_released, monkeypatch, tmp_path):
    loaders = (hita.load_tokenizer, "hita-u", "quant_conv.bias"), (
        hita.load_llama, "hita-u-b-250e", "norm.weight")
    for model, (load, name, some) in zip(small_released, loaders):
        assert all(map(torch.equal, load(name).state_dict().values(), model.state_dict().values()))
        weights, path = released_layout(model), tmp_path / "x.pt"
        dino = {"encode_transformer.backbone.pretrained_encoder.norm.weight": torch.zeros(3)}
        for fits in (weights, {"model": weights}, weights | dino):
            torch.save(fits, path)
            assert load(path).cfg == model.cfg
        lacking = {k: v for k, v in weights.items() if k != some}
        for wrong in (lacking, weights | {some: torch.zeros(3, 3)}, weights | {"x": torch.ones(1)}):
            torch.save({"ema": wrong}, path)
            refused("x.pt", load, path)
    assert hita.load_llama("hita-u-b-250e").classes[207] == "golden retriever"
    folders = [f"n{i:08d}" for i in range(1000)]  # ImageNet's: the embeddings stay
    llama = hita.Llama(small_released[1].cfg)
    train_ar.start_from(llama, "hita-u-b-250e", folders, "unknown")
    assert torch.equal(llama.class_embedding.weight, small_released[1].class_embedding.weight)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    refused("OSError.*hita-ultra.pt.*--tokenizer", hita.load_tokenizer, "hita-u")
    monkeypatch.chdir(tmp_path)
    for name in ("hita-u", "prints"):  # folders of these names hide nothing
        Path(name).mkdir()
    refused("OSError.*hita-ultra.pt", hita.load_tokenizer, "hita-u")
    assert hita.load_tokenizer("prints").cfg == hita.TOKENIZERS["prints"]
    assert len(hita.RELEASED) == 2 + 17 + 1
    assert hita.RELEASED["hita-v-xl-50e"] == "vanilla/GPT-XL/GPT-XL-50e.pt"


def test_prints_reconstructs_holds_the_palette_and_draws_the_readmes_pictures():
    tokenizer = hita.load_tokenizer("prints")
    pictures = hita.Pictures(hita.embedded_data(), "val", 64)
    assert (len(pictures), len(pictures.classes)) == (365, 50)
    images = torch.stack([pictures[0, i][0] for i in range(0, 365, 12)])  # 31 of all classes
    global_ids, patch_ids = tokenizer.encode(images)
    others = global_ids.roll(15, dims=0)
    # measured: 24.98 dB, 12.63 dB, 4.82 of the log2 31 = 4.95 bits that 31 can show
    assert hita.psnr(images, tokenizer.decode(global_ids, patch_ids)).mean() > 24.5
    assert hita.psnr(images, tokenizer.decode(others, patch_ids)).mean() < 14
    assert hita.usage("global", hita.count_ids(global_ids, 256))["global_bits"] > 4.6
    # the README's first pictures: other CPUs round differently, other numbers give about 10 dB
    llama = hita.load_llama("prints")
    shown = 2 * hita.TF.to_tensor(Image.open(ROOT / "assets/samples.png").convert("RGB")) - 1
    class_ids = torch.tensor([llama.classes.index("face-happy")] * 2)  # its first row
    drawn = tokenizer.decode(*llama.generate(class_ids, **sample.PRINTS))
    kept = torch.stack([shown[:, 2:66, x:x + 64] for x in (2, 68)])
    assert hita.psnr(kept, drawn).min() > 35


def test_judge_tells_what_is_real_right_near_copied_and_varied():
    (images, class_ids, _), (train, *_) = judge.real("val"), judge.real("train")
    tokenizer = hita.load_tokenizer("prints")
    recon = sample.decode(tokenizer, *tokenizer.encode(images))
    real, near = judge.score(images, class_ids), judge.score(recon, class_ids)
    noise = 2 * torch.rand_like(images) - 1
    assert (real["top1"], real["top5"]) == approx((0.37, 0.65), abs=0.01)  # as in the README
    assert real["fd"] < near["fd"] < judge.score(noise, class_ids)["fd"]
    wrong = judge.score(images, class_ids[torch.randperm(len(images))])
    assert wrong["top1"] < 0.06 and 0.03 < wrong["top5"] < 0.18 and real["copies"] < 0.06
    same = judge.score(train[:1].expand(50, -1, -1, -1), torch.zeros(50, dtype=torch.int64))
    assert same["copies"] == 1 and same["spread"] == approx(0, abs=1e-3) and real["spread"] > 0.9
    refused("shape|images are", judge.score, images[:, :1], class_ids)


def test_prints_is_a_released_model_in_all_uses(script, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    pictures = sorted((hita.embedded_data() / "val/flag").iterdir())[:2]
    for name, flags in (
            ("samples", ["--class", "flag", "face-happy"]), ("keep-globals", ["--keep-globals"]),
            ("style", ["--style", *pictures]),
            ("complete", ["--complete", *pictures, "--class", "flag"])):
        script(sample, *flags, "--num", 2)
        assert "using prints" in capsys.readouterr().out and Path(f"out/{name}.png").exists()
    script(train_tokenizer, "--preset", "prints", "--init-from", "prints", "--data", "data",
           "--steps", 1, "--batch-size", 2, "--gan-weight", 0, "--out", "out-t", "--workers", 0)
    assert figures("out-t/tokenizer.jsonl")[-1]["psnr"] > 8  # on noise


# ---- data --------------------------------------------------------------------

def picture_folder(root: Path, number: int = 12, classes: int = 5) -> Path:
    for split in ("train", "val"):
        for i in range(number):
            path = root / split / f"class{i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


def test_versions_of_a_picture_are_plain_mirrored_cropped_and_stay_the_same(tmp_path):
    square = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    found = hita.crop_square(Image.fromarray(square), 64)
    assert torch.equal(hita.to_uint8(found), torch.from_numpy(square).permute(2, 0, 1))
    tall = np.zeros((300, 100, 3), np.uint8)
    tall[100:200] = 255
    assert (hita.crop_square(Image.fromarray(tall), 100) == 1).all()
    for i in range(5):
        rng = np.random.default_rng(i)
        assert hita.crop_square(Image.fromarray(tall), 64, rng, 0.8).shape == (3, 64, 64)
    data = hita.Pictures(picture_folder(tmp_path), "train", 16, augment=True, crop_range=0.5)
    assert torch.equal(data[3, 5][0], data[3, 5][0])
    assert not torch.equal(data[3, 5][0], data[4, 5][0])
    plain = hita.Pictures(tmp_path, "train", 16, crop_range=0.5)
    assert torch.equal(plain[0, 5][0], hita.load_picture(plain.samples[5][0], 16)[0])
    assert torch.equal(plain[1, 5][0], plain[0, 5][0].flip(-1))
    assert not torch.equal(plain[2, 5][0], plain[0, 5][0])  # from the third version on


@pytest.mark.parametrize("name, convert", [
    ("rgb.png", lambda x: x), ("cmyk.tif", lambda x: x.convert("CMYK")),
    ("rgba.webp", lambda x: x.convert("RGBA")), ("palette.gif", lambda x: x.quantize(4)),
    ("turned.png", lambda x: x.transpose(Image.Transpose.ROTATE_90)),
    ("grey.png", lambda x: x.convert("L"))])
def test_any_kind_of_picture_is_read(name, convert, tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30], pixels[:20, 30:] = (200, 100, 50), (10, 220, 90)
    image, exif = Image.fromarray(pixels), Image.Exif()
    if name == "turned.png":
        exif[0x0112] = 6  # to be turned by 90 degrees to the right
    convert(image).save(tmp_path / name, exif=exif, lossless=True)
    image = image.convert("L") if "grey" in name else image
    expected = hita.crop_square(image.convert("RGB"), 16)
    for source in (tmp_path / name, io.BytesIO((tmp_path / name).read_bytes()), image):
        found = hita.load_picture(source, 16)
        assert found.shape == (1, 3, 16, 16) and torch.allclose(found[0], expected, atol=0.03)


def test_damaged_exif_does_no_harm_and_broken_pictures_are_named(tmp_path, monkeypatch):
    assert hita.on_white(Image.new("RGBA", (1, 1))).getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for wrong, message in ((tmp_path / "none.png", "none.png"), (tmp_path / "bad.png", "bad.png"),
                           (np.zeros((16, 16, 3)), "ndarray"), (Image.new("F", (9, 9)), "8 bits"),
                           (Image.new("I;16", (9, 9)), "8 bits")):
        refused(message, hita.load_picture, wrong, 16)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 0.5  # orientation, a rational
    damaged = exif.tobytes()[:-12]
    for data, size in ((exif, (4, 8)), (damaged, (4, 8)), (b"Exif\0\0MM", (8, 4))):
        Image.new("RGB", (8, 4), "red").save(tmp_path / "x.jpg", exif=data)
        assert hita.read_picture(tmp_path / "x.jpg").size == size
    monkeypatch.setattr(hita, "contextlib", None)  # a mistake in the code is none in the file
    pytest.raises(AttributeError, hita.read_picture, Image.new("L", (4, 4)))


def test_what_other_programs_leave_is_no_data_and_links_are_followed(tmp_path, capsys):
    root = picture_folder(tmp_path / "data")
    some = (root / "train/class0/0.png").read_bytes()
    for name in ("class0/._0.png", ".cache/0.png", "class0/.ipynb_checkpoints/0.png",
                 "@eaDir/0.png", "class1/@eaDir/0.png", "__MACOSX/class0/0.png",
                 "#recycle/0.png", "class5/notes.txt", "loose.png", tmp_path / "more/deep/x.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(some)
    data = hita.Pictures(root, "train", 16)
    assert len(data) == 12 and data.classes == [f"class{i}" for i in range(5)]
    assert "class5, loose.png\n" in capsys.readouterr().out  # and nothing hidden
    (root / "train/class0/up").symlink_to("..")  # in circles
    (root / "train/class1/self.png").symlink_to(root / "train/class1/self.png")
    (root / "train/class1/x.png").symlink_to(tmp_path / "more/deep/x.png")
    (root / "train/class5").rename(tmp_path / "notes")
    (root / "train/class5").symlink_to(tmp_path / "more")
    data = hita.Pictures(root, "train", 16)
    assert len(data) == 12 + 1 + 1 + 1 and len(data.classes) == 6  # with the link to itself
    before = data.signature()
    os.utime(tmp_path / "more/deep/x.png", (1, 1))
    assert len([x for x, y in zip(before[0], data.signature()[0]) if x != y]) == 2


def test_bad_pictures_are_named_and_the_next_stand_in_but_for_20_in_a_row(tmp_path, capfd):
    data = hita.Pictures(picture_folder(tmp_path, 40, 2), "train", 16)
    stands_in = {3: 4, 39: 0} | {i: 34 for i in range(15, 34)}
    for i in stands_in:
        path = Path(data.samples[i][0])
        path.write_bytes(path.read_bytes()[:60] if i % 2 else b"")
    Image.new("L", (1, 1)).save(data.samples[4][0])
    items = [(0, i) for i in stands_in]
    loader = torch.utils.data.DataLoader(data, 1, sampler=items, num_workers=1)
    for (image, label), i in zip(loader, stands_in.values()):
        assert torch.equal(image[0], data[0, i][0]) and label == data.samples[i][1]
    said = capfd.readouterr().err
    assert all(f"skipped: the picture {data.samples[i][0]} " in said for i in stands_in)
    Path(data.samples[34][0]).unlink()
    refused(f"none of 20 .* {data.samples[15][0]} cannot be read: ", lambda: data[0, 15])


def test_validation_pictures_have_the_classes_of_train_and_may_be_absent(tmp_path):
    root = picture_folder(tmp_path)
    plain, train = (hita.Pictures(root, "train", 16, augment) for augment in (False, True))
    (root / "val/class0").rename(tmp_path / "away")
    assert {label for _, label in hita.validation_pictures(train).samples} == {1, 2, 3, 4}
    (root / "val").rename(root / "test")
    found = hita.validation_pictures(train)
    assert found.split == "train" and found.samples == train.samples
    assert torch.equal(found[0, 3][0], plain[0, 3][0])
    refused("no pictures in .*/<class>/", hita.Pictures, root, "val", 16)


def test_batches_go_through_epochs_and_the_learning_rate_up_and_down(monkeypatch):
    found = sum((hita.batch(step, 10, 4, seed=3) for step in range(1, 6)), [])
    for epoch in (0, 1):  # 20 items: two epochs, though 4 does not divide 10
        assert sorted(i for e, i in found if e == epoch) == list(range(10))
    assert [i for _, i in found[:10]] != [i for _, i in found[10:]]
    assert hita.batch(4, 10, 4, seed=3) == found[12:16]
    monkeypatch.setattr(hita, "world", lambda: 2)
    assert hita.batch(4, 10, 4, seed=3) == found[12:14]
    refused("batch_size 5", hita.batch, 1, 10, 5, seed=3)
    recipe = argparse.Namespace(steps=100, warmup=10, lr=1e-3, lr_final=1e-4)
    rate = lambda step: hita.learning_rate(step, recipe)
    assert rate(5) == approx(1e-7 + 0.5 * (1e-3 - 1e-7)) and rate(10) == approx(1e-3)
    assert rate(55) == approx(5.5e-4) and rate(100) == approx(1e-4)
    recipe.lr = 1e-5  # lowered on resume, without a thought of lr_final
    assert rate(55) == rate(100) == approx(1e-5)
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.ones_(b.running_mean)
    nn.init.constant_(b.weight, 3.0)
    hita.update_ema(a, b, 0.9)  # of parameters; buffers are copied
    assert a.weight.tolist() == approx([1.2, 1.2]) and a.running_mean.tolist() == [1, 1]


def test_log_averages_over_steps_and_bits_are_those_of_a_position(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"step": 1, "a": 0}\n{"step": 9, "a": 0}\n{"step": 10, ')
    clock = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(hita.time, "time", lambda: next(clock))
    log = hita.Log(tmp_path / "x.jsonl", steps=5, start=1)
    for value in (1.0, 2.0, 3.0, 4.0):  # two a step; names may be shared
        log.add({"loss": torch.tensor(value), "ids": torch.tensor([[value, 0.0]])})
        log.add({"ids": value})
    log.write(3, batch_size=10)
    old, new = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert (old["step"], new["step"]) == (1, 3)  # later ones and a broken one are gone
    assert new["loss"] == new["ids"] == 2.5 and new["ids_use"] == 0.5
    assert new["images/s"] == approx(10) and new["eta_min"] == approx(2 / 60)
    constant = torch.arange(16).expand(1000, -1)  # a code for each position
    assert hita.usage("x", hita.count_ids(constant, 32)) == {"x_use": 0.5, "x_bits": 0.0}
    ids = torch.stack([torch.arange(1000) % 8, torch.arange(1000) % 2], dim=1)
    counts = hita.count_ids(ids, 32)
    assert counts.sum() == 2000 and counts[1, :2].tolist() == [500, 500]
    assert hita.usage("x", counts) == {"x_use": 8 / 32, "x_bits": approx((3 + 1) / 2)}


def test_token_cache_is_reused_goes_on_and_is_made_anew(tmp_path, monkeypatch):
    root, path, encoded = picture_folder(tmp_path / "data"), tmp_path / "tokens.npy", []
    tokenizer = tiny()
    true = tokenizer.encode

    def build(tokenizer=tokenizer, copies=2):
        encoded.clear()
        tokenizer.encode = lambda images: (encoded.append(len(images)), true(images))[1]
        return train_ar.token_cache(path, tokenizer, hita.Pictures(root, "train", 16), copies, 0)

    tokens, data = build().copy(), hita.Pictures(root, "train", 16)
    assert tokens.shape == (24, 1 + 6 + 16) and sum(encoded) == 24
    for row in (0, 7, 12 + 7):  # plain pictures, then mirrored ones
        image, label = data[divmod(row, 12)]
        found = train_ar.split(train_ar.to_device(tokens[[row]], torch.device("cpu")), 6)
        assert found[0] == label and all(map(torch.equal, found[1:], true(image[None])))
    assert np.array_equal(build(), tokens) and not encoded
    stored = np.lib.format.open_memmap(path, "r+")
    stored[[3, 20], 0] = 0  # as if it had been killed before these
    stored.flush()
    assert np.array_equal(build(), tokens) and encoded == [2]
    for change in (dict(copies=3), dict(tokenizer=tiny(k=1)), {}):
        assert len(build(**change)) == sum(encoded) >= 24
    for damage in (lambda x: b"", lambda x: x[:100], lambda x: x[:-1], lambda x: bytes(len(x))):
        path.write_bytes(damage(path.read_bytes()))
        assert np.array_equal(build(), tokens) and sum(encoded) == 24
    (tmp_path / "tokens.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(hita, "all_sum", lambda x: x)
        patch.setattr(hita, "world", lambda: 2)  # as if the other's rows got lost
        refused("8 rows of .*tokens.npy are missing: .*nodes", build)
    with monkeypatch.context() as patch:
        patch.setattr(hita.shutil, "disk_usage", lambda path: Mock(free=1000))
        refused("tokens.npy takes .* are free", build, copies=5)
    (root / "train/class0/0.png").write_bytes(b"bad")  # another stands in
    assert build()[0, 0] == 1 and sum(encoded) == 24


# ---- scripts -----------------------------------------------------------------

SMALL = [
    "--data", "data", "--image-size", 24, "--channels", 8, "--channel-mult", "1,1,2",
    "--latent-dim", 16, "--layers", 1, "--num-global", 6, "--global-codebook-size", 32,
    "--patch-codebook-size", 16, "--k", 2, "--batch-size", 4, "--log-every", 2, "--eval-every", 4,
    "--gan-start", 4, "--gan-width", 8, "--steps", 4]
SMALL_AR = ["--dim", 24, "--layers", 1, "--heads", 2, "--batch-size", 4, "--log-every", 2,
            "--eval-every", 2, "--steps", 4]


def figures(path: str) -> list[dict]:
    """The lines of a log, without what depends on the clock."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in ("images/s", "eta_min")} for x in lines]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """-> function that runs a script here, in tmp_path, which has data."""
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    picture_folder(tmp_path / "data", 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
        module.main()

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


def two_processes(*args) -> str:
    """Run a script with torchrun -> what it says."""
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    result = subprocess.run(
        [sys.executable, *torchrun, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0 and "FutureWarning" not in result.stderr, result.stderr
    return result.stdout


def same_figures(one: str, two: str, *names: str) -> list[dict]:
    """Logs of a run that was done in two ways say the same but for rounding."""
    logs = figures(one), figures(two)
    for name in names:
        a, b = ([f[name] for f in log if name in f] for log in logs)
        assert a == approx(b, rel=1e-5) and a, name
    return logs[0]


def test_scripts_in_two_processes_equal_those_in_one_and_sample(script, tmp_path):
    flags = *SMALL, "--data", tmp_path / "data"
    script(train_tokenizer, *flags)
    two_processes("train_tokenizer.py", *flags, "--out", tmp_path / "two")
    # the same until the discriminator, with batch statistics per process, comes in at the end
    logs = "out/tokenizer.jsonl", "two/tokenizer.jsonl"
    log = same_figures(*logs, "rec", "codebook")
    assert log[0]["grad"] == approx(figures(logs[1])[0]["grad"], rel=1e-4)
    assert {"loss", "rec", "codebook", "adv", "disc", "D(real)", "D(fake)", "grad", "global_use",
            "global_bits", "patch_use", "patch_bits"} <= set(log[1])
    assert log[2]["step"] == 4 and "psnr" in log[2] and Path("out/tokenizer-000004.png").exists()
    flags = "--tokenizer", tmp_path / "out/tokenizer.pt", *SMALL_AR, "--class-dropout", 0
    script(train_ar, *flags)  # on the pictures of its tokenizer
    two_processes("train_ar.py", *flags, "--out", tmp_path / "two")
    logs = "out/llama.jsonl", "two/llama.jsonl"
    same_figures(*logs, "global", "patch", "val_global", "val_patch")
    assert Path("out/llama-000004.png").exists()
    script(sample, "--class", 3, "class1", "--num", 3, "--single")
    assert Image.open("out/samples.png").size == (3 * 26 + 2, 2 * 26 + 2)
    assert len(list(Path("out/samples").iterdir())) == 6


BAD_REQUESTS = {  # script: {flags: what the line says}
    train_tokenizer: {
        "--preset hita-w": "hita-w", "--preset": "--preset", "--heads 0": "heads", "--k x": "x",
        "--patch-codebok-size 5": "--patch-codebok-size", "--data ''": "--data is empty",
        "--data nowhere": "/<class>/", "--npz x": "--eval", "--eval": "train_tokenizer.py",
        "--device meta": "meta", "--device warp9": "warp9", "--steps 0": "steps", "--lr nan": "lr",
        "--lpips-weight 1": "vgg16", "--channel-mult 1,,2": "channel-mult",
        "--resume nowhere.pt": "nowhere.pt", "--crop-range 1.5": "crop_range",
        "--batch-size 1 --gan-weight 0": "--batch-size"},
    train_ar: {
        "": "tokenizer.py", "--heads 5": "heads", "--export ''": "--export is empty",
        "--copies 0": "copies", "--tokenizer assets/samples.png": "samples.png"},
    sample: {
        "": "train_ar.py", "--out=": "--out= is empty", "--class flag ''": "empty",
        "--class -x": "--class", "--num 0": "num is 0", "--num 1e9": "1e9", "--count 5": "--npz",
        "--image x.abc": "x.abc", "--from README.md": "--style", "--keep nan": "keep",
        "--cfg-scale 1e30": "cfg_scale", "--complete README.md": "--class",
        "--reconstruct README.md --keep-globals": "not allowed with"}}


@pytest.mark.parametrize("module, flags, message", [
    (module, *row) for module, rows in BAD_REQUESTS.items() for row in rows.items()])
def test_bad_requests_get_one_line(module, flags, message, script, monkeypatch, capsys):
    out = Path("out").absolute()
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        hita.run_script(lambda: script(module, *shlex.split(flags), "--out", out), "")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and line.startswith("error: ") and message in line
    assert module is not sample or not out.exists()


def test_one_line_is_for_what_the_user_named_a_traceback_for_the_rest(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", f"--data={tmp_path}", "--image", "a/b.png"])
    line = lambda error: hita.explanation(error, "a smaller batch")
    missing = lambda name: FileNotFoundError(2, "No such file", name)
    named = missing("a/b.png"), missing(f"{tmp_path}/x/y"), missing("out/x.png")
    assert all(map(line, (*named, OSError(28, "No space left"), hita.HitaError("x"))))
    assert line(torch.OutOfMemoryError("x")).endswith("a smaller batch")
    assert line(hita.HitaError("Caught\nTraceback\nhita.HitaError: 3 < 4")) == "3 < 4"
    rest = [kind("a worker's memory") for kind in (OSError, NameError, MemoryError, RuntimeError)]
    assert not any(map(line, (missing("mine.txt"), missing(None), *rest)))


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_is_for_gpus_that_have_it(emulated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulated)
    assert hita.has_bfloat16(torch.device("cuda")) != emulated
    assert not hita.has_bfloat16(torch.device("cpu"))


def stops(monkeypatch, *steps: int) -> None:
    """Runs are told to stop after so many steps each, and then no more."""
    answers = iter([step == last for last in steps for step in range(1, last + 1)])
    monkeypatch.setattr(hita.Stop, "asked", lambda self: next(answers, False))


RUN = [*SMALL, "--batch-size", 7, "--log-every", 1, "--eval-every", 5, "--dropout", 0.1,
       "--crop-range", 0.7, "--steps", 12]


@pytest.mark.parametrize("after", [(1,), (4, 1), (5, 6)])
def test_a_resumed_tokenizer_run_equals_an_uninterrupted_one(after, script, monkeypatch):
    """Bit for bit, before and after the discriminator, and in the middle of epochs."""
    script(train_tokenizer, "--out", "whole", *RUN)
    stops(monkeypatch, *after)
    script(train_tokenizer, "--out", "parts", *RUN)
    for _ in after[1:]:
        script(train_tokenizer, "--out", "parts", "--resume", "--workers", 1)
    script(train_tokenizer, "--out", "parts", "--resume")
    states = [torch.load(f"{out}/tokenizer.pt") for out in ("whole", "parts")]
    for name in ("model", "ema", "discriminator"):
        assert all(map(torch.equal, states[0][name].values(), states[1][name].values()))
    # a stop comes before the evaluation that is due at its step
    losses = [[x for x in figures(f"{out}/tokenizer.jsonl") if "loss" in x or x["step"] > 9]
              for out in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 12 + 2
    script(train_tokenizer, "--out", "parts", "--resume")  # which is finished


def test_a_resumed_llama_run_equals_an_uninterrupted_one(script, monkeypatch, tmp_path):
    script(train_tokenizer, "--out", "tok", *SMALL, "--steps", 1)
    run = [*SMALL_AR, "--batch-size", 7, "--log-every", 1, "--eval-every", 5, "--steps", 12,
           "--tokenizer", "tok/tokenizer.pt", "--keep-every", 4]
    script(train_ar, "--out", "whole", *run)
    whole = figures("whole/llama.jsonl")
    stops(monkeypatch, 7)
    script(train_ar, "--out", "parts", *run)
    with open("parts/llama.jsonl", "a") as f:  # by a killed run
        f.write('{"step": 8}\n')
    script(train_ar, "--out", "parts", "--resume")
    assert figures("parts/llama.jsonl") == whole
    kept = sorted(p.name for p in Path("parts").glob("*.pt"))
    assert kept == ["llama-000004.pt", "llama-000008.pt", "llama-000012.pt", "llama.pt"]
    earlier = train_ar, "--resume", "parts/llama-000008.pt"
    refused("later step", script, *earlier, "--out", "parts")
    script(*earlier, "--out", "fork")
    assert figures("fork/llama.jsonl") == [x for x in whole if x["step"] > 8]
    script(sample, "--llama", "fork/llama.pt", "--num", 1)  # finds the tokenizer of tok/
    (tmp_path / "data/train/class0").rename(tmp_path / "data/train/xclass")
    refused("classes in .* are not those", script, train_ar, "--out", "parts", "--resume")


def test_what_cannot_be_resumed_is_refused(script, tmp_path, monkeypatch, capsys):
    script(train_tokenizer, *SMALL, "--gan-weight", 0, "--steps", 2)
    held = {p: p.read_bytes() for p in Path("out").iterdir()}
    save_tiny(tmp_path / "weights")
    for args, message in (
            ([*SMALL], "holds a run already.*--resume.*--out"),
            (["--resume", "--batch-size", 8], "batch_size is 8 and was 4.*--out"),
            (["--resume", "--channels", 16], "channels is 16 and was 8"),
            (["--resume", "--preset", "hita-v"], "image_size is 336"),
            (["--resume", "weights/tokenizer.pt"], "another run"),
            (["--resume", "weights/tokenizer.pt", "--out", "new"], "weights only.*--init-from"),
            (["--resume", "--data", hita.embedded_data()], "pictures is 6230 and was 30")):
        refused(message, script, train_tokenizer, *args)
    assert held == {p: p.read_bytes() for p in Path("out").iterdir()}
    script(train_tokenizer, "--resume", "--steps", 3, "--lr", 1e-5, "--init-from", "hita-u")
    said = capsys.readouterr().out
    assert "resuming out/tokenizer.pt after step 2\n" in said and "lr=1e-05" in said
    assert "--init-from hita-u is for new runs" in said
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")  # a relative --data has become a full path
    script(train_tokenizer, "--resume", "--out", "../out", "--steps", 4)
    (tmp_path / "data/val").rename(tmp_path / "val")
    (tmp_path / "data").rename(tmp_path / "moved")
    missing = "checkpoint was made from .*data.*--data"
    refused(missing, script, train_tokenizer, "--out", "../out", "--resume")
    refused(missing, script, train_ar, "--out", "../out")
    script(train_ar, "--data", "../moved", "--out", "../out", *SMALL_AR)
    assert "train_... are of training pictures" in capsys.readouterr().out
    lines = figures("../out/llama.jsonl")
    assert "train_patch" in lines[-1] and not any("val_patch" in line for line in lines)
    script(train_tokenizer, "--data", "../moved", "--out", "../out", "--eval")
    assert {"train_psnr", "train_swap"} <= set(figures("../out/eval.jsonl")[0])


def test_a_run_that_diverges_stops_before_weights_and_checkpoint(script, monkeypatch):
    true, calls = hita.reconstruction_loss, iter(range(1, 100))
    monkeypatch.setattr(hita, "reconstruction_loss", lambda *x: true(*x) * (
        float("nan") if next(calls) == 7 else 1))
    refused("not finite.*--resume", script, train_tokenizer, *RUN)
    saved = torch.load("out/tokenizer.pt")
    assert saved["step"] == 5
    assert all(x.isfinite().all() for x in [*saved["model"].values(), *saved["ema"].values()])


def test_a_signal_ends_a_run_after_its_step(tmp_path):
    data, out = picture_folder(tmp_path / "data"), tmp_path / "out"
    command = [sys.executable, "train_tokenizer.py", *RUN, "--data", data, "--out", out,
               "--workers", 1, "--steps", 100_000, "--device", "cpu"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    next(line for line in process.stdout if line.startswith("step"))
    os.killpg(process.pid, signal.SIGINT)  # as from a terminal, loaders too
    text = process.stdout.read()
    assert process.wait(30) == 0 and "stopped after step" in text, text
    stopped = int(re.search(r"stopped after step (\d+)", text)[1])
    assert torch.load(out / "tokenizer.pt")["step"] == stopped


PLACES = {  # what fails: its owner, its name, the script, its flags
    "loader": (hita, "crop_square", train_tokenizer, SMALL),
    "loop": (hita, "reconstruction_loss", train_tokenizer, SMALL),
    "evaluation": (hita, "psnr", train_tokenizer, SMALL),
    "saving": (hita, "write_file", train_tokenizer, SMALL),
    "encoding": (hita.HitaTokenizer, "encode", train_ar, ["--tokenizer", "tiny/tokenizer.pt"]),
    "--eval": (train_tokenizer, "probes", train_tokenizer, ["--eval", "tiny/tokenizer.pt"])}


def run_broken(place, args, start, rank, world):
    """A process of a run, of which the first fails at this place."""
    def broken(*args, **kwargs):
        raise RuntimeError("a worker's peer has no memory")

    os.setsid()  # so that what it leaves can be found
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                          MASTER_PORT=str(20_000 + os.getppid() % 10_000))
    torch.multiprocessing.set_start_method(start, force=True)
    owner, name, script, flags = PLACES[place]
    if rank == 0:
        setattr(owner, name, broken)
    sys.argv = ["script", *map(str, [*flags, *args]), "--device", "cpu"]
    hita.run_script(script.main, "")


@pytest.mark.parametrize("place", PLACES)
def test_whatever_ends_a_run_ends_its_processes_with_a_traceback(place, script, capfd):
    save_tiny(Path("tiny"))
    for processes, workers, start in (
            (1, 0, "fork"), (1, 2, "fork"), (1, 1, "spawn"), (2, 0, "fork"), (2, 1, "fork")):
        if processes == 2 and place == "--eval" or start == "spawn" and place != "loop":
            continue
        args = ["--data", "data", "--out", f"{processes}{workers}{start}", "--workers", workers]
        runs = [torch.multiprocessing.get_context("fork").Process(
            target=run_broken, args=(place, args, start, i, processes)) for i in range(processes)]
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
            hangs = run.exitcode is None and (os.killpg(run.pid, signal.SIGKILL), run.join())
            assert run.exitcode != 0 and not hangs
            with pytest.raises(ProcessLookupError):  # soon nothing of its group is left
                for _ in range(50):
                    os.killpg(run.pid, 0)
                    time.sleep(0.1)
        said = capfd.readouterr().err
        assert "in broken\n" in said and "RuntimeError: a worker's peer has no memory" in said


def test_parts_of_a_batch_and_recomputed_activations_give_the_same_losses(script):
    run = *RUN, "--dropout", 0
    script(train_tokenizer, *run, "--out", "tok0")
    script(train_tokenizer, *run, "--out", "tok1", "--recompute")
    same_figures("tok0/tokenizer.jsonl", "tok1/tokenizer.jsonl", "rec", "codebook", "psnr")
    none = ["--dropout", 0, "--token-dropout", 0, "--class-dropout", 0]
    for n in (1, 2):
        script(train_ar, "--tokenizer", "tok0/tokenizer.pt", "--out", f"ar{n}", *SMALL_AR,
               *none, "--accumulate", n)
    same_figures("ar1/llama.jsonl", "ar2/llama.jsonl", "global", "patch", "val_patch")


def test_the_readmes_fine_tuning_ends_in_pictures(script, tmp_path, monkeypatch):
    """Its lines with small models in place of the released ones."""
    monkeypatch.setattr(hita, "TOKENIZERS", {"emoji": TINY, "hita-u": TINY})
    small = dict(layers=1, heads=2, dim=16)
    monkeypatch.setattr(hita, "LLAMA_SIZES", {"emoji": small, "B": small})
    few = dict(steps=1, batch_size=4, workers=0)
    monkeypatch.setitem(train_tokenizer.RECIPES, "hita-u", train_tokenizer.Training(
        **few, lpips_weight=0, gan_weight=0))
    monkeypatch.setitem(train_ar.RECIPES, "B", train_ar.Training(**few))
    save_tiny(tmp_path / "theirs", llama=tiny_llama(layers=1))
    monkeypatch.setattr(hita, "released_file", lambda name, kind: {
        "hita-u": "theirs/tokenizer.pt", "hita-u-b-250e": "theirs/llama.pt"}[name])
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^python (\S+) (.* --out out-fine.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert [name for name, _ in lines] == ["train_tokenizer.py", "train_ar.py", "sample.py"]
    for name, args in lines:
        args = args.replace("DIR", "data").replace("NAME", "class1").split()
        script(sys.modules[name.removesuffix(".py")], *args)
    assert Path("out-fine/samples.png").exists()


def test_exported_weights_go_on_and_a_changed_tokenizer_is_named(script, tmp_path, capsys):
    script(train_tokenizer, *SMALL)
    script(train_ar, *SMALL_AR)
    for kind, module in (("tokenizer", train_tokenizer), ("llama", train_ar)):
        script(module, "--export", f"{kind}.pt")
        of_run, exported = (hita.load_model(f, kind) for f in (f"out/{kind}.pt", f"{kind}.pt"))
        assert hita.fingerprint(of_run) == hita.fingerprint(exported)
        assert f"{kind}.pt: " in capsys.readouterr().out
        assert str(tmp_path).encode() not in Path(f"{kind}.pt").read_bytes()
        weights = torch.load(f"{kind}.pt")["ema"].values()
        assert {x.dtype for x in weights if x.dim() > 1} == {torch.float16}
        refused("exists already", script, module, "--export", f"{kind}.pt")
    script(train_tokenizer, "--resume", "--steps", 5)
    refused("not .any more. this Llama's", script, sample)
    said = refused("not .any more. this Llama's", script, train_ar, "--resume")
    flags = re.search("python train_ar.py (.*) --out", said)[1].replace("FILE", "out/tokenizer.pt")
    script(train_ar, *flags.split(), *SMALL_AR, "--out", "again")
    script(sample, "--out", "again", "--num", 1)
    script(sample, "--out", "again", "--reconstruct", "data/val/class0/0.png")
    Path("again").rename("elsewhere")  # the hash decides, not the path
    Path("elsewhere/tokenizer.pt").write_bytes(Path("out/tokenizer.pt").read_bytes())
    Path("out").rename("gone")
    script(sample, "--out", "elsewhere", "--num", 1)
    script(sample, "--llama", "llama.pt", "--num", 1)  # exported, as is its tokenizer
    Path("tokenizer.pt").rename("mine.pt")
    refused("this Llama's.*--tokenizer", script, sample, "--llama", "llama.pt", "--num", 1)
    script(sample, "--llama", "llama.pt", "--num", 1, "--tokenizer", "mine.pt")
    script(train_tokenizer, "--eval", "mine.pt", "--data", "data")
    refused("elsewhere.*--data", script, train_ar, "--tokenizer", "mine.pt")


def test_fine_tuning_takes_what_fits_and_starts_other_classes_anew(script, capsys):
    script(train_tokenizer, *SMALL)
    saved = torch.load("out/tokenizer.pt")
    cfg = hita.TokenizerConfig(**saved["config"])
    tokenizer, D = hita.HitaTokenizer(cfg), hita.PatchDiscriminator(8)
    train_tokenizer.start_from(tokenizer, D, "out/tokenizer.pt")
    for model, name in ((tokenizer, "ema"), (D, "discriminator")):
        assert all(map(torch.equal, model.state_dict().values(), saved[name].values()))
    flags = *SMALL, "--out", "new", "--init-from", "out/tokenizer.pt"
    script(train_tokenizer, *flags, "--k", 3)  # k may change
    script(train_tokenizer, *SMALL, "--no-centre", "--out", "plain", "--steps", 1)
    for wrong, message in (
            (["--latent-dim", 32], "needs --latent-dim 16$"), (["--no-centre"], "needs --centre$"),
            (["--init-from", "plain/tokenizer.pt"], "--no-centre"), (["--heads", 2], "--heads 4"),
            (["--channel-mult", "1,2"], "needs --channel-mult 1,1,2$"),
            (["--gan-width", 16], "needs --gan-width 8"),
            (["--init-from", "prints"], "--latent-dim 160 .*, or --preset prints")):
        refused(message, script, train_tokenizer, *flags, "--out", "third", *wrong)
    tokenizer, source = save_tiny(Path("tiny"))
    larger, D = tiny(image_size=24), hita.PatchDiscriminator(8)
    train_tokenizer.start_from(larger, D, "tiny/tokenizer.pt")
    assert "4 x 4 patches: resized to 6" in capsys.readouterr().out
    for name in ("extractor.positions", "fusion.positions"):
        expected = hita.resize_positions(tokenizer.get_parameter(name), 6, 6)
        assert torch.equal(larger.get_parameter(name), expected)
    llama, path, own = tiny_llama(), "tiny/llama.pt", hita.fingerprint(tokenizer)
    train_ar.start_from(llama, path, list("abcde"), own)
    assert not capsys.readouterr().out
    train_ar.start_from(tiny_llama(grid=6), path, list("abcde"), "unknown")
    train_ar.start_from(llama, path, list("abcde"), "another")
    assert "ids mean something else" in capsys.readouterr().out
    assert all(map(torch.equal, llama.state_dict().values(), source.state_dict().values()))
    llama = tiny_llama(num_classes=3)
    new = llama.class_embedding.weight.detach().clone()
    train_ar.start_from(llama, path, list("abc"), own)
    assert torch.equal(llama.class_embedding.weight[:3], new[:3])
    assert torch.equal(llama.class_embedding.weight[3], source.class_embedding.weight[5])
    assert torch.equal(llama.patch_head.weight, source.patch_head.weight)
    refused("needs --dim 16", train_ar.start_from, tiny_llama(dim=24), path, list("abc"), own)


# ---- uses and evaluation -----------------------------------------------------

def test_classes_go_by_name_or_index_and_choose_the_model_where_nothing_was_trained():
    names = ["cat", "face-happy", "flag", "Flag", "red  panda"]
    find = sample.class_indices
    assert find(["face-happy", "2", "Face-Happy", "Flag"], names) == [1, 2, 1, 3]
    assert find(None, names[:3]) == [0, 1, 2] and len(find(None, list(map(str, range(50))))) == 12
    assert find(["17", "2", "002"], ["17", "5", "2", "002"]) == [0, 2, 3]
    assert find(["1", "0"], ["17", "5"]) == [1, 0]
    for wrong, message in (("face-hapy", "face-happy"), ("5", "0 to 4"), ("-1", "0 to 4"),
                           ("--5", "no class is called --5"), ("FLAG", r"index: \[2, 3\]")):
        refused(message, find, [wrong], names)
    choose = lambda asked: sample.default_llama(argparse.Namespace(out="out", classes=asked))
    for asked in (None, ["face-happy", "FLAG"], ["fase-happy"], hita.load_llama("prints").classes):
        assert choose(asked) == "prints"
    for name in ("207", "tabby", "crane", "golden_retriever", "-1"):
        assert choose([name]) == sample.IMAGENET
    refused("tabby: .* one after the other", choose, ["tabby", "flag"])


def test_a_released_model_is_fetched_without_its_dino_and_shown_at_256_px(small_released, script):
    script(sample, "--class", "golden_retriever", "--num", 1)
    assert small_released[2] == ["ultra/GPT-B/GPT-B-250e.pt", "ultra/tokenizer/hita-ultra.pt"]
    assert Image.open("out/samples.png").size == (256, 256)
    tokenizer = small_released[0]
    found = torch.randint(16384, (3, 128)), torch.randint(16384, (3, 441))
    images = sample.decode(tokenizer, *found)
    assert torch.allclose(images, tokenizer.decode(*found), atol=1e-5)
    assert torch.equal(sample.published_size(images, native=True), images)
    expected = F.interpolate(images, 256, mode="bicubic", antialias=False, align_corners=False)
    assert torch.equal(sample.published_size(images, native=False), expected)


@pytest.fixture
def shown(script, tmp_path, monkeypatch):
    """-> function that runs sample.py -> its pictures, columns, ids that it decodes."""
    for i, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30, 20)).save(tmp_path / name)
    own_decode, tokenizer = sample.decode, tiny()
    tokenizer.extractor.queries.data.zero_()
    images = torch.cat([hita.load_picture(name, 16) for name in ("a.png", "b.png")])
    mean = tokenizer.embed(images, None)[0].mean(dim=(0, 1))
    tokenizer.global_down.bias.data -= mean  # now a's global codes are opposite to b's
    save_tiny(tmp_path / "out", tokenizer)

    def run(*args):
        grid, decode = Mock(wraps=hita.picture_grid), Mock(side_effect=own_decode)
        monkeypatch.setattr(hita, "picture_grid", grid)
        monkeypatch.setattr(sample, "decode", decode)
        script(sample, *args)
        return *grid.call_args.args, [call.args[1:] for call in decode.call_args_list]

    return run


def test_style_takes_globals_of_others_and_a_sample_keeps_its_own(shown, capsys):
    pairs, columns, _ = shown("--reconstruct", "a.png", "b.png")
    assert columns == 2 and capsys.readouterr().out.count(" dB") == 2
    other, columns, _ = shown("--style", "b.png", "--from", "a.png")
    assert columns == 2 and len(other) == 4
    matrix, columns, _ = shown("--style", "a.png", "b.png")
    assert torch.allclose(other[3], matrix[7], atol=1e-3)
    assert columns == 3 and len(matrix) == 9
    assert torch.equal(matrix[[3, 6]], pairs[[0, 2]])  # the margins
    assert torch.equal(matrix[[1, 2]], pairs[[0, 2]])
    assert torch.allclose(matrix[[4, 8]], pairs[[1, 3]], atol=1e-3)
    assert (matrix[5] - matrix[4]).abs().max() > 0.01 < (matrix[7] - matrix[8]).abs().max()
    pictures, columns, decoded = shown("--keep-globals", "--class", "2", "--num", 4)
    (same, patches), (globals_, same_patches) = decoded
    assert columns == 4 and torch.equal(pictures[0], pictures[4])  # the sample itself
    assert all(len(x.unique(dim=0)) == 1 for x in (same, same_patches))
    assert all(len(x.unique(dim=0)) == 4 for x in (globals_, patches))


@pytest.mark.parametrize("source", ["visible", "sampled", "full"])
def test_a_completion_keeps_what_is_given(shown, source):
    how = "--complete", "a.png", "--class", "3", "--num", 3
    pictures, columns, (decoded,) = shown(*how, "--keep", 0.5, "--globals", source)
    tokenizer, image = hita.load_tokenizer("out/tokenizer.pt"), hita.load_picture("a.png", 16)
    visible = image.clone()
    visible[:, :, 8:] = image[:, :, :8].mean(dim=(2, 3), keepdim=True)
    assert columns == 5 and torch.equal(pictures[:1], image)
    assert torch.allclose(pictures[1:2, :, 9:], visible[:, :, 9:], atol=1e-6)
    found = torch.cat(decoded, dim=1)
    g, p = tokenizer.encode(image if source == "full" else visible)
    assert torch.equal(found[:, 6:6 + 8 - 2], p[:, :6].expand(3, -1))  # two rows but the last k
    assert not torch.equal(found[:, 12:14], p[:, 6:8].expand(3, -1))
    assert torch.equal(found[:, :6], g.expand(3, -1)) == (source != "sampled")
    assert not torch.equal(found[0, 14:], found[1, 14:])
    save_tiny(Path("one"), tiny(image_size=4), tiny_llama(grid=1))  # has one row of patches
    for wrong, message in ((["--keep", 0.01], "--keep"), (["--keep", 0.999], "--keep"),
                           (["--out", "one"], "rows of"), (["--class", 0], "2 classes for 1")):
        refused(message, shown, *how, *wrong)


def test_many_pictures_go_to_an_npz_file_single_ones_to_a_folder(script, tmp_path, monkeypatch):
    save_tiny(tmp_path / "out")
    Path("one.npz.tmp").write_text("mine")
    script(sample, "--count", 130, "--npz", "one.npz")
    flags = "--out", tmp_path / "out", "--count", 130, "--npz", tmp_path / "two.npz"
    assert "130 pictures in" in two_processes("sample.py", *flags)
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)
    script(sample, "--count", 130, "--npz", "three.npz", "--compile")  # chunks of one size
    one, *others = (np.load(f"{name}.npz") for name in ("one", "two", "three"))
    assert one["arr_0"].shape == (130, 16, 16, 3) and one["arr_0"].dtype == np.uint8
    assert one["arr_1"].dtype == np.int64 and np.array_equal(one["arr_1"], np.arange(130) % 5)
    assert all(np.array_equal(one[x], other[x]) for other in others for x in ("arr_0", "arr_1"))
    names = sorted(path.name for path in tmp_path.glob("*npz*"))
    assert names == ["one.npz", "one.npz.tmp", "three.npz", "two.npz"]
    pixels, folder = np.zeros((2, 8, 8, 3), np.uint8), tmp_path / "x"
    folder.mkdir()
    for name in ("00007-mine.png", "00007-cat.png"):
        (folder / name).touch()
    sample.write_single(pixels, [0, 1], ["../../up", "x" * 300, "cat"], folder)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["00000-.._.._up.png", f"00001-{'x' * 60}.png", "00007-mine.png"]


def test_what_cannot_work_or_be_written_is_refused_early(script, tmp_path, monkeypatch):
    save_tiny(tmp_path / "out")
    sizes = dict(global_codebook_size=16)
    save_tiny(Path("sizes"), tiny(**sizes), tiny_llama(**sizes))
    one = script, sample, "--num", 1
    script(*one[1:], "--out", "sizes")
    refused(r"one size, not \(16, 32\)", *one, "--out", "sizes", "--released-sampling")
    alone = {**torch.load("sizes/llama.pt"), "made_from": {}}  # does not know its tokenizer
    torch.save(alone, "alone.pt")
    flags = "--llama", "alone.pt", "--tokenizer", "out/tokenizer.pt"
    refused("global_codebook_size is 32 .* 16", *one, *flags)
    for path in ("folder.png", "folder.npz"):
        Path(path).mkdir()
    for path in ("file", "new"):
        Path(path).write_text("mine")
    monkeypatch.setattr(hita.Llama, "generate", None)
    monkeypatch.setattr(hita.HitaTokenizer, "encode", None)
    for flags, named in (
            ("--image x.psd", "x.psd"), ("--image folder.png", "folder.png"),
            ("--image x.hdf", "hdf"), ("--image out/llama.pt/x.png", "llama.pt"),
            ("--image x.webp --num 1000", "1002"), ("--single --image new.png", "new cannot"),
            ("--npz folder.npz", "folder.npz"), ("--npz file/x.npz", "file/x.npz"),
            ("--image x.ico", "x.ico"), ("--out typo", "typo/llama.pt"),
            ("--reconstruct a.png --out file", "file")):
        refused(named, script, sample, "--class", "a", *flags.split())
    evaluation = train_tokenizer, "--eval", "out/tokenizer.pt", "--data", "data"
    for flags in (["--out", "file"], ["--npz", "file/x"]):
        refused("file.* cannot be written", script, *evaluation, *flags)
    refused("file.* cannot be written", script, train_tokenizer, *SMALL, "--out", "file/deep")
    monkeypatch.setattr(hita.shutil, "disk_usage", lambda path: Mock(free=2 * 5 * 3 * 16 ** 2))
    refused("7.68e-06 GB, 7.68e-06 GB are free", *one, "--npz", "new.npz")
    assert not Path("typo").exists() and not list(tmp_path.glob("*new.npz*"))


def test_embedded_pictures_are_unpacked_and_stderr_may_be_closed(script, tmp_path, monkeypatch):
    save_tiny(tmp_path / "out")
    shutil.make_archive("mini64", "zip", "data")
    monkeypatch.setattr(hita, "EMOJI", tmp_path / "mini64.zip")
    script(sample, "--reconstruct", "mini64/val/class0/0.png")
    assert Path("out/reconstruct.png").exists()
    monkeypatch.setattr(sys, "stderr", None)
    hita.run_script(lambda: script(sample, "--class", "a", "--num", 1), "")
    assert Path("out/samples.png").exists()


def test_swap_is_psnr_where_the_decoder_ignores_the_globals(script):
    data, tokenizer = hita.Pictures("data", "val", 16), tiny()
    nn.init.normal_(tokenizer.decoder.conv_out.weight, std=0.2)
    _, _, patch_ids = train_tokenizer.encode_all(tokenizer, data, 1, 0)
    others = torch.randint(32, (30, 6))  # these have bits
    measure = lambda: train_tokenizer.evaluate(tokenizer, data, Path("x.png"), 0, others=others)
    expected = [hita.psnr(data[0, i][0][None], tokenizer.decode(others[[i]], patch_ids[[i]]))
                for i in range(len(data))]
    found = measure()
    assert found["swap"] == approx(torch.cat(expected).mean().item(), abs=1e-4)
    assert abs(found["swap"] - found["psnr"]) > 1e-3
    nn.init.zeros_(tokenizer.global_up.weight)
    found = measure()
    assert found["swap"] == approx(found["psnr"], abs=1e-4)


def test_linear_probe_finds_the_optimum():
    centres = torch.randn(3, 4)
    y, val_y = torch.arange(60) % 3, torch.arange(300) % 3
    x, val_x = centres[y] + torch.randn(60, 4), centres[val_y] + torch.randn(300, 4)
    norm = lambda v: (v - x.mean(0)) / x.std(0)
    # least squares where a row sqrt(decay n) a feature stands below the data
    left = torch.cat([norm(x), 6 ** 0.5 * torch.eye(4)])
    right = torch.cat([F.one_hot(y) - 1 / 3, torch.zeros(4, 3)])
    expected = (norm(val_x) @ torch.linalg.lstsq(left, right).solution).argmax(1)
    found = train_tokenizer.linear_probe(x, y, val_x)
    assert torch.equal(found, expected) and 0.4 < (found == val_y).float().mean() < 0.99


@pytest.mark.parametrize("flags", [
    ["--num-global", 0, "--k", 0], ["--k", 0], ["--k", 6, "--no-centre"],
    ["--dino", VIT, "--dino-dim", 384]])
def test_ablations_work_to_the_evaluation(flags, script, vit_file, small_dino, monkeypatch):
    dino = ["--dino-file", vit_file] if "--dino" in flags else []
    script(train_tokenizer, *SMALL, *flags, *dino, "--steps", 1)
    script(train_ar, *SMALL_AR, "--steps", 1)  # data and DINOv2: what the tokenizer had
    evaluate = Mock(wraps=train_tokenizer.evaluate)
    monkeypatch.setattr(train_tokenizer, "evaluate", evaluate)
    script(train_tokenizer, "--eval", "--npz", "out/val")
    script(sample, "--class", 1, "--num", 2)
    script(sample, "--complete", "data/val/class0/0.png", "--class", "1", "--num", 2)
    line, = figures("out/eval.jsonl")
    assert {"psnr", "patch_use", "patch_bits", "probe_patch", "probe_chance"} <= set(line)
    assert line["pictures"] == 30
    if line["M"]:
        assert {"probe_global", "global_bits", "swap"} <= set(line)
        tokenizer, val, *_, others = evaluate.call_args.args
        own = train_tokenizer.encode_all(tokenizer, val, 1, 0)[1]
        assert torch.equal(others, torch.cat([own[15:], own[:15]]))  # half the split further on
    originals, recon = (np.load(f"out/val-{kind}.npz")["arr_0"]
                        for kind in ("originals", "reconstructions"))
    assert originals.shape == recon.shape == (30, 24, 24, 3)
    image = hita.Pictures("data", "val", 24)[0, 7][0]
    expected = ((image + 1) * 127.5).round().permute(1, 2, 0)
    assert np.array_equal(originals[7], expected.numpy().astype(np.uint8))
