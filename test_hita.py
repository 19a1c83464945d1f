"""Tests of hita.py and the scripts: `pytest`, no network, under four minutes on two CPU cores; one more where there is CUDA."""

import argparse
import copy
import dataclasses
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import huggingface_hub
import lpips
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import hita
import sample
import train_ar
import train_tokenizer

ROOT = Path(__file__).parent
TINY = hita.TokenizerConfig(image_size=16, channels=8, channel_mult=(1, 1, 2), res_blocks=1, latent_dim=16, layers=1, heads=2,
                            dropout=0.1, num_global=6, codebook_size=32, k=2, dino="none")   # M = 6, N = 16, V = 32
TINY_LLAMA = hita.LlamaConfig(layers=2, heads=2, dim=16, num_classes=5, num_global=6, grid=4, codebook_size=32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**changes) -> hita.HitaTokenizer:
    return hita.HitaTokenizer(dataclasses.replace(TINY, **changes)).eval()


def tiny_llama(**changes) -> hita.Llama:
    """Heads start at zero; give them weights, so that the logits say something."""
    llama = hita.Llama(dataclasses.replace(TINY_LLAMA, **changes)).eval()
    for head in llama.heads():
        torch.nn.init.normal_(head.weight)
    return llama


def tiny_ids(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.arange(batch) % 5, torch.randint(32, (batch, 6)), torch.randint(32, (batch, 16))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# configuration -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, parameters, tensors", [("hita-v", 104_240_839, 499), ("hita-u", 104_767_687, 504)])
def test_released_tokenizers_have_the_released_parameters(preset, parameters, tensors):
    with torch.device("meta"):
        tokenizer = hita.HitaTokenizer(hita.TOKENIZERS[preset])
        assert count(tokenizer) == parameters and len(tokenizer.state_dict()) == tensors
        assert tokenizer.patch_quantizer.codebook.shape == (16384, 8)
        assert tokenizer.global_quantizer.codebook.shape == (16384, 12)
        out = tokenizer.extractor(torch.empty(2, 512, 21, 21), torch.empty(2, 257, 1024))
        assert [x.shape for x in out] == [(2, 128, 512), (2, 441, 512)]


@pytest.mark.parametrize("size, parameters", [("B", 136_152_576), ("L", 376_596_480), ("XL", 816_806_400),
                                              ("XXL", 1_461_500_928), ("2B", 2_251_549_440)])
def test_released_llamas_have_the_released_parameters(size, parameters):
    with torch.device("meta"):
        llama = hita.Llama(hita.LlamaConfig(**hita.LLAMA_SIZES[size]))
        assert count(llama) == parameters
        x = llama.backbone(torch.empty(1, 569, llama.cfg.dim), torch.arange(569))
        assert x.shape == (1, 569, llama.cfg.dim)


def test_discriminator_has_the_released_size_and_logit_map():
    D = hita.PatchDiscriminator()
    assert count(D) == 2_765_633 and D(torch.zeros(1, 3, 336, 336)).shape == (1, 1, 40, 40)


@pytest.mark.parametrize("changes", [dict(k=7), dict(k=-1), dict(image_size=18), dict(num_global=0, k=2), dict(heads=3), dict(channels=6),
                                     dict(codebook_size=0), dict(vfm_recon=True), dict(beta=-1.0), dict(dropout=1.0)])
def test_contradictory_tokenizer_settings_are_refused(changes):
    with pytest.raises(hita.HitaError):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("config, files", [(hita.TokenizerConfig, ["hita.py"]), (hita.LlamaConfig, ["hita.py"]),
                                           (train_tokenizer.Training, ["train_tokenizer.py", "hita.py"]), (train_ar.Training, ["train_ar.py", "hita.py"])])
def test_every_setting_is_read(config, files):
    text = "".join((ROOT / f).read_text() for f in files)
    for field in dataclasses.fields(config):
        assert any(f"{name}.{field.name}" in text for name in ("cfg", "recipe", "self")), f"{field.name} is never read"


# quantizer -----------------------------------------------------------------------------------------------------------

def test_quantizer_takes_the_nearest_code_and_passes_the_gradient_straight_through():
    vq = hita.VectorQuantizer(32, 4)
    z = torch.randn(2, 5, 4, requires_grad=True)
    codes, ids, _ = vq(z)
    sphere, book = F.normalize(z.detach(), dim=-1), F.normalize(vq.codebook.detach(), dim=-1)
    assert torch.equal(ids, torch.cdist(sphere, book[None]).argmin(-1)) and ids.dtype == torch.int64
    assert torch.allclose(codes, book[ids], atol=1e-6) and torch.allclose(vq.lookup(ids), codes, atol=1e-6)
    weight = torch.randn_like(codes)
    (codes * weight).sum().backward()
    reference = z.detach().clone().requires_grad_()
    (F.normalize(reference, dim=-1) * weight).sum().backward()
    assert torch.allclose(z.grad, reference.grad, atol=1e-6) and vq.codebook.grad is None


def test_beta_weighs_the_encoder_side():
    grads = {}
    for beta in (0.25, 0.5):
        torch.manual_seed(0)
        vq, z = hita.VectorQuantizer(32, 4, beta), torch.randn(2, 5, 4, requires_grad=True)
        vq(z)[2].backward()
        grads[beta] = z.grad, vq.codebook.grad
    assert torch.allclose(2 * grads[0.25][0], grads[0.5][0])          # encoder: proportional to beta
    assert torch.allclose(grads[0.25][1], grads[0.5][1])              # codebook: independent of beta
    assert grads[0.25][1].abs().sum() > 0


def test_quantizer_works_in_float32_under_autocast():
    vq, z = hita.VectorQuantizer(4096, 8), torch.randn(1, 256, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids, loss = vq(z)
    assert torch.equal(ids, vq(z)[1]) and codes.dtype == loss.dtype == torch.float32


def test_unused_codes_are_revived_and_then_used():
    vq = hita.VectorQuantizer(64, 4, revive=True).train()
    z = F.normalize(torch.randn(8, 32, 4) + torch.tensor([5.0, 0, 0, 0]), dim=-1)    # a narrow cone that few codes are near
    with torch.no_grad():
        before = len(vq.eval()(z)[1].unique())
        for _ in range(3):
            vq.train()(z)
        after = len(vq.eval()(z)[1].unique())
    assert before < 32 and after > 50
    frozen = vq.codebook.clone()
    vq(z)                                                              # eval mode moves nothing
    assert torch.equal(frozen, vq.codebook)


def test_hits_are_counted_over_all_processes(monkeypatch):
    vq = hita.VectorQuantizer(64, 4, revive=True).train()
    vq.hits.fill_(1.0)
    monkeypatch.setattr(hita, "all_sum", lambda x: 2 * x)              # as if another process had used the same codes
    vq(torch.randn(1, 10, 4))
    assert vq.hits.sum().item() == pytest.approx(64 * vq.MEMORY + 20)


def test_usage_and_perplexity():
    use, perplexity = hita.usage_and_perplexity(torch.tensor([3.0, 3.0, 0.0, 0.0]))
    assert use == 0.5 and perplexity == pytest.approx(2.0)


def test_ids_outside_the_codebook_are_refused():
    with pytest.raises(hita.HitaError, match="between 0 and 31"):
        hita.VectorQuantizer(32, 4).lookup(torch.tensor([[32]]))


# what sees what ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [0, 1, 2, 6])
def test_k_replacement_decides_which_tokens_a_cell_sees(k):
    fusion = tiny(k=k).fusion
    M, N = 6, 16
    tokens = torch.randn(1, M + N, 16, requires_grad=True)
    states = fusion(tokens[:, :M], tokens[:, M:], (4, 4))              # (1, N, D)
    for i in (0, 1, 5, N - 1):
        grad, = torch.autograd.grad(states[0, i].sum(), tokens, retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0                               # (M + N,)
        expected = torch.arange(M + N) <= M - k + i                    # cell i is the state at position M - k + i
        assert torch.equal(seen, expected)
        assert seen[M:].sum() == max(0, i - k + 1)                     # patches 0 .. i - k


def test_queries_gather_from_all_patches_and_the_second_stage_is_causal():
    extractor = tiny().extractor
    x = torch.randn(1, 16, 4, 4)
    changed = x.clone()
    changed[..., -1, -1] = torch.randn(16)                             # the last patch only
    before, after = extractor(x, None), extractor(changed, None)
    assert all(((a - b).abs().amax(-1) > 1e-5).all() for a, b in zip(before, after))  # bidirectional: all queries, all patches
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, 4] = torch.randn(16)
    moved = (extractor.causal(x) - extractor.causal(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 6


def test_both_codebooks_reach_the_picture_and_the_loss_reaches_everything():
    tokenizer = tiny(dropout=0.0).train()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    out = tokenizer(images)
    (hita.reconstruction_loss(images, out.recon) + out.codebook_loss).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    _, g, p = tiny_ids()
    picture, other_globals, other_patches = (tokenizer.eval().decode(*ids) for ids in ((g, p), (g.flip(0), p), (g, p.flip(0))))
    assert (picture - other_globals).abs().max() > 0.01 and (picture - other_patches).abs().max() > 0.01


def test_hita_u_mask_tokens_see_everything_and_globals_do_not_see_them():
    cfg = dataclasses.replace(TINY, vfm_recon=True, dino="some-vit", dino_dim=8)
    fusion = hita.Fusion(cfg).eval()
    globals_, inside = torch.randn(1, 6, 16, requires_grad=True), []
    fusion.layers[0].register_forward_hook(lambda module, args, out: inside.append(out))
    features = fusion.reconstruct_features(globals_)
    assert features.shape == (1, 256, 8)
    grads = torch.autograd.grad(features[0, 0].sum(), (globals_, fusion.positions), retain_graph=True)
    assert all((grad.abs().sum(-1) > 0).all() for grad in grads)       # the first mask token sees all globals, all mask tokens
    grads = torch.autograd.grad(inside[0][0, 2].sum(), (globals_, fusion.positions), allow_unused=True)
    assert (grads[0].abs().sum(-1) > 0)[0].tolist() == [True] * 3 + [False] * 3 and grads[1].abs().sum() == 0


# tokenizer -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(num_global=0, k=0)])
def test_encode_and_decode_agree_with_the_training_forward(changes):
    tokenizer = tiny(**changes)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    global_ids, patch_ids = tokenizer.encode(images)
    assert global_ids.shape == (2, tokenizer.cfg.num_global) and patch_ids.shape == (2, 16)
    assert global_ids.dtype == patch_ids.dtype == torch.int64
    out = tokenizer(images)
    assert torch.equal(out.patch_ids, patch_ids) and torch.equal(out.global_ids, global_ids)
    assert torch.allclose(out.recon, tokenizer.decode(global_ids, patch_ids), atol=1e-5)
    assert out.recon.shape == images.shape and out.codebook_loss.requires_grad


def test_other_sizes_and_oblong_images():
    tokenizer = tiny()
    assert tokenizer(torch.zeros(1, 3, 24, 24)).recon.shape == (1, 3, 24, 24)
    assert tokenizer(torch.zeros(1, 3, 16, 32)).recon.shape == (1, 3, 16, 32)
    ids = tokenizer.encode(torch.zeros(1, 3, 16, 32))
    assert tokenizer.decode(*ids, grid=(4, 8)).shape == (1, 3, 16, 32)
    for call in (lambda: tokenizer(torch.zeros(1, 3, 16, 18)), lambda: tokenizer.encode(torch.zeros(3, 16, 16)),
                 lambda: tokenizer.decode(ids[0], ids[1][:, :-1]), lambda: tokenizer.decode(ids[0][:, 1:], ids[1])):
        with pytest.raises(hita.HitaError):
            call()


def test_position_tables_are_read_row_by_row():
    positions = torch.arange(16.0).reshape(1, 16, 1)
    assert hita.resize_positions(positions, 4, 4) is positions
    wide = hita.resize_positions(positions, 4, 8).reshape(4, 8)
    assert (wide.diff(dim=1) > 0).all() and wide.diff(dim=0).mean() == pytest.approx(4, abs=0.2)


def test_tokenizer_overfits_two_pictures():
    tokenizer = tiny(dropout=0.0, revive_codes=True).train()
    images = F.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, 16)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    first = None
    for _ in range(120):
        out = tokenizer(images)
        loss = hita.reconstruction_loss(images, out.recon)
        optimizer.zero_grad()
        (loss + out.codebook_loss).backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.3 * first


@pytest.fixture(scope="module")
def small_dino():
    torch.manual_seed(0)
    return hita.DINOv2("vit_small_patch14_reg4_dinov2.lvd142m", pretrained=False)


def test_dinov2_is_frozen_and_in_no_checkpoint(small_dino):
    cfg = dict(dino="vit_small_patch14_reg4_dinov2.lvd142m", dino_dim=384)
    tokenizer = tiny(**cfg)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with pytest.raises(hita.HitaError, match="dino="):
        tokenizer.encode(images)
    plain = count(tokenizer), set(tokenizer.state_dict())
    tokenizer.dino = small_dino
    assert (count(tokenizer), set(tokenizer.state_dict())) == plain
    tokenizer.train()
    tokenizer(images).recon.sum().backward()
    assert not small_dino.training and all(p.grad is None for p in small_dino.parameters())
    assert tokenizer.extractor.dino_proj[0].weight.grad.abs().sum() > 0
    tokens = small_dino(images)
    full = small_dino.vit.forward_features(small_dino.preprocess(images))
    assert tokens.shape == (1, 257, 384) and torch.equal(tokens[:, 1:], full[:, 5:]) and torch.equal(tokens[:, 0], full[:, 0])


def test_dinov2_preprocessing(small_dino):
    x = torch.linspace(-1, 1, 8)[None, None, :, None].expand(1, 3, 8, 8)
    y = small_dino.preprocess(x)                                       # a ramp stays a ramp: the corners are aligned
    assert y.shape == (1, 3, 224, 224)
    assert y[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-4)
    assert y[0, :, -1, 0].tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], abs=1e-4)
    noise = torch.randn(1, 3, 672, 672).clamp(-1, 1)
    blurred, plain = (small_dino.preprocess(v).std() for v in (noise, noise[..., :224, :224]))
    assert blurred < 0.5 * plain                                       # a blur precedes shrinking


def test_dinov2_is_the_same_function_from_the_original_file_and_from_timms(small_dino, tmp_path):
    """Both files hold a 37 x 37 table of positions. The original has one for the cls token too, which timm has added already."""
    name, x = "vit_small_patch14_reg4_dinov2.lvd142m", torch.rand(1, 3, 32, 32)
    weights = timm.create_model(name, num_classes=0).state_dict()
    assert weights["pos_embed"].shape == (1, 37 * 37, 384)
    safetensors.torch.save_file(weights, tmp_path / "timm.safetensors")
    cls_position = torch.randn(1, 1, 384)
    original = {**weights, "mask_token": torch.zeros(1, 384), "register_tokens": weights["reg_token"],
                "cls_token": weights["cls_token"] - cls_position, "pos_embed": torch.cat([cls_position, weights["pos_embed"]], dim=1)}
    torch.save({k: v for k, v in original.items() if k != "reg_token"}, tmp_path / "original.pth")
    ours, theirs = (hita.DINOv2(name, file=str(tmp_path / f))(x) for f in ("timm.safetensors", "original.pth"))
    assert torch.allclose(ours, theirs, atol=1e-3) and not torch.allclose(ours, small_dino(x), atol=0.1)
    table = weights["pos_embed"].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    table = F.interpolate(table, (16, 16), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)    # as DINOv2 does itself
    assert torch.allclose(hita.DINOv2(name, file=str(tmp_path / "original.pth")).vit.pos_embed, table, atol=1e-5)
    for wrong, message in (("nowhere.pth", "no DINOv2 weights file"), (str(ROOT / "hita.py"), "does not hold the weights")):
        with pytest.raises(hita.HitaError, match=message):
            hita.DINOv2(file=wrong)


# losses --------------------------------------------------------------------------------------------------------------

def test_adversarial_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hita.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert hita.adversarial_loss(torch.zeros(3)).item() == pytest.approx(np.log(2))
    assert hita.adversarial_loss(torch.tensor([5.0])) < hita.adversarial_loss(torch.tensor([-5.0]))


def test_reconstruction_loss_and_psnr():
    x = torch.zeros(2, 3, 4, 4)
    assert hita.reconstruction_loss(x, x + 0.5).item() == pytest.approx(0.5)          # 2 * 0.25
    assert hita.psnr(x, x + 0.2).tolist() == pytest.approx([20.0, 20.0])              # 10 log10(2^2 / 0.04)


def test_perceptual_loss_has_no_dropout():
    loss = hita.PerceptualLoss(pretrained=False).train()
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    first = loss(x, y)
    first.backward()
    assert torch.equal(first, loss(x, y)) and y.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())
    flat = torch.zeros(1, 4, 2, 2, requires_grad=True)                 # features of an empty picture may all be 0
    lpips.normalize_tensor(flat).sum().backward()
    assert flat.grad.isfinite().all()


# evaluation ----------------------------------------------------------------------------------------------------------

def test_ssim_is_that_of_scipys_filters():
    x = F.interpolate(torch.rand(2, 3, 8, 8), (24, 20), mode="bicubic").clamp(0, 1) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    def reference(a, b):                                               # one channel, in [-1, 1]
        mean = lambda v: scipy.ndimage.gaussian_filter(v, 1.5, truncate=3.5)[5:-5, 5:-5]
        va, vb, cov = (mean(u * v) - mean(u) * mean(v) for u, v in ((a, a), (b, b), (a, b)))
        ma, mb, c1, c2 = mean(a), mean(b), 0.02 ** 2, 0.06 ** 2
        return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))).mean()
    expected = [np.mean([reference(a, b) for a, b in zip(*pair)]) for pair in zip(x.double().numpy(), y.double().numpy())]
    assert hita.ssim(x, y).tolist() == pytest.approx(expected, abs=1e-4) and hita.ssim(x, x).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("n", [200, 5])                                # 5 pictures: covariances have not full rank
def test_frechet_distance_is_that_of_scipys_matrix_root(n):
    a, b = torch.randn(n, 8) @ torch.randn(8, 8), torch.randn(n + 3, 8) + 1
    C = [np.cov(x.double().numpy().T) for x in (a, b)]
    root = scipy.linalg.sqrtm(C[0] @ C[1] + 1e-12 * np.eye(8)).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(C[0] + C[1] - 2 * root)
    assert hita.frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert hita.frechet_distance(a, a) == pytest.approx(0, abs=1e-9) and hita.frechet_distance(a, b) == pytest.approx(hita.frechet_distance(b, a))
    with pytest.raises(hita.HitaError, match="two"):
        hita.frechet_distance(a[:1], b)


def test_linear_probe_finds_the_optimum_that_scipy_finds():
    centres = torch.randn(3, 4)
    y, val_y = torch.arange(60) % 3, torch.arange(300) % 3
    x, val_x = centres[y] + torch.randn(60, 4), centres[val_y] + torch.randn(300, 4)
    norm = lambda v: ((v - x.mean(0)) / x.std(0)).double().numpy()
    def loss(w):
        logits = norm(x) @ w[:12].reshape(4, 3) + w[12:]
        return (scipy.special.logsumexp(logits, axis=1) - logits[np.arange(60), y.numpy()]).mean() + 0.01 / 2 * (w[:12] ** 2).sum()
    w = scipy.optimize.minimize(loss, np.zeros(15), tol=1e-8).x
    expected = ((norm(val_x) @ w[:12].reshape(4, 3) + w[12:]).argmax(1) == val_y.numpy()).mean()
    assert hita.linear_probe(x, y, val_x, val_y, 3) == pytest.approx(expected, abs=0.01) and 0.4 < expected < 0.99


# Llama ---------------------------------------------------------------------------------------------------------------

def logits_of_steps(llama: hita.Llama, *args, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """generate(*args, **how) -> the logits of all its steps (B, M + N, V), ids (B, M + N)."""
    seen = []
    hooks = [head.register_forward_hook(lambda module, args, out: seen.append(out)) for head in llama.heads()]
    ids = torch.cat(llama.generate(*args, **how), dim=1)
    for hook in hooks:
        hook.remove()
    return torch.stack([x.flatten(0, -2) for x in seen], dim=1).float(), ids


@pytest.mark.parametrize("changes", [{}, dict(num_global=0)])
def test_cached_steps_equal_the_full_forward(changes):
    """Every position, so also M - 1, M and M + 1, where table, head and positions change."""
    llama = tiny_llama(**changes)
    class_ids = torch.tensor([1, 4])
    cached, ids = logits_of_steps(llama, class_ids, top_k=1)
    full = torch.cat(llama(class_ids, *ids.split([llama.cfg.num_global, 16], dim=1)), dim=1)
    assert torch.allclose(cached, full, atol=1e-4) and torch.equal(full.argmax(-1), ids)


@pytest.mark.parametrize("changes", [{}, dict(num_global=0), dict(released_sampling=True)])
def test_given_tokens_are_read_at_once_and_a_sampler_can_be_used_again(changes):
    llama, class_ids = tiny_llama(**changes), torch.arange(5)
    sampler = hita.Sampler(llama, 5, 2.0, top_k=1)
    ids = torch.cat(sampler(class_ids), dim=1)
    for length in (0, 1, 5, 6, 7, ids.shape[1] - 1, ids.shape[1]):
        assert torch.equal(torch.cat(sampler(class_ids, given=ids[:, :length]), dim=1), ids)
    sampler.span = 8                                                   # attention over caches of few lengths, as on CUDA
    sampler.caches = [F.pad(cache, (0, 0, 0, -ids.shape[1] % 8)) for cache in sampler.caches]
    assert torch.equal(torch.cat(sampler(class_ids), dim=1), ids)
    sampler = hita.Sampler(llama, 5, 2.0)
    draw = lambda: torch.cat(sampler(class_ids, torch.Generator().manual_seed(1)), dim=1)
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), ids)
    for wrong in (dict(class_ids=class_ids[:4]), dict(class_ids=class_ids, given=ids[:4]), dict(class_ids=class_ids, given=torch.cat([ids, ids], 1))):
        with pytest.raises(hita.HitaError):
            sampler(**wrong)


def test_tokens_are_drawn_with_their_probabilities():
    llama = tiny_llama(num_global=0, grid=1, codebook_size=4, num_classes=1)
    llama.patch_head.weight.data *= 0.5
    ids = torch.zeros(20_000, dtype=torch.int64)
    _, drawn = llama.generate(ids)
    expected = llama(ids[:1], ids[:1, None][:, :0], ids[:1, None])[1][0, 0].softmax(-1)
    assert (drawn.flatten().bincount(minlength=4) / len(ids)).tolist() == pytest.approx(expected.tolist(), abs=0.02)   # 5 standard deviations


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_few_rows_pass_a_linear_layer_as_many_do(rows):
    layer, x = hita.Linear(48, 40), torch.randn(rows, 1, 48)
    with torch.no_grad():
        y = layer(x)
    assert y.is_contiguous() and torch.allclose(y, x @ layer.weight.T, atol=1e-6) and torch.equal(layer(x), F.linear(x, layer.weight))


def test_steps_in_bfloat16_stay_near_the_float32_forward():
    llama, class_ids = tiny_llama(), torch.arange(5)
    half = copy.deepcopy(llama)
    for p in half.parameters():                                        # as sample.py does on CUDA
        p.data = p.data.bfloat16()
    cached, ids = logits_of_steps(half, class_ids, top_k=1)
    full = torch.cat(llama(class_ids, ids[:, :6], ids[:, 6:]), dim=1)
    assert (cached - full).abs().max() < 0.05 * full.std() and not torch.equal(cached, full)


def test_compiled_blocks_draw_the_same_tokens():
    llama = tiny_llama()
    draw = lambda: torch.cat(llama.generate(torch.arange(5), 2.0, generator=torch.Generator().manual_seed(1)), dim=1)
    plain = draw()
    for block in llama.blocks:
        block.compile(backend="eager", fullgraph=True)                 # traced as a whole, but run without a C++ compiler
    assert torch.equal(draw(), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_steps_recorded_on_cuda_equal_the_plain_forward():
    llama, class_ids = tiny_llama().cuda(), torch.arange(5, device="cuda")
    sampler = hita.Sampler(llama, 5, top_k=1)
    for _ in range(2):                                                 # recorded while drawing, then launched only
        g, p = sampler(class_ids)
        assert torch.equal(torch.cat(llama(class_ids, g, p), dim=1).argmax(-1), torch.cat([g, p], 1)) and len(sampler.graphs) == 2
    sample.prepare(tiny().cuda(), llama, torch.device("cuda"), compiled=False)
    full = torch.cat(llama.float()(class_ids, g, p), dim=1)
    cached, _ = logits_of_steps(llama.bfloat16(), class_ids, given=torch.cat([g, p], 1)[:, :-1])
    assert (cached[:, -1] - full[:, -1]).abs().max() < 0.05 * full.std()


def test_llama_is_causal_and_sees_the_class():
    llama = tiny_llama()
    class_ids, g, p = tiny_ids()
    logits = torch.cat(llama(class_ids, g, p), dim=1)
    for position in (0, 5, 6, 7, 20):                                  # token at `position` is input position + 1
        g2, p2 = g.clone(), p.clone()
        (g2 if position < 6 else p2)[:, position if position < 6 else position - 6] += 1
        moved = (torch.cat(llama(class_ids, g2 % 32, p2 % 32), dim=1) - logits).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == [i > position for i in range(22)]
    assert ((torch.cat(llama(class_ids + 1, g, p), dim=1) - logits).abs().amax(-1) > 1e-6).all()


def test_the_position_of_the_first_patch_attends_uniformly_and_patches_know_row_and_column():
    cos, sin = hita.position_rotations(6, 4, 8)
    assert cos.shape == sin.shape == (22, 4)
    assert (cos[:6] == 1).all() and (sin[:6] == 0).all() and (cos[6] == 0).all() and (sin[6] == 0).all()
    cell = 7 + 2 * 4 + 3                                               # patch at row 2, column 3
    assert torch.allclose(torch.atan2(sin, cos)[cell], torch.tensor([2.0, 2 * 0.01, 3.0, 3 * 0.01]), atol=1e-5)


def test_guidance_of_one_is_the_identity_and_guidance_reaches_the_logits():
    llama = tiny_llama()
    class_ids = torch.arange(5)
    draw = lambda scale: torch.cat(llama.generate(class_ids, scale, generator=torch.Generator().manual_seed(1)), 1)
    assert torch.equal(draw(1.0), draw(1.0 + 1e-7)) and not torch.equal(draw(1.0), draw(5.0))
    unconditional = draw(0.0)                                          # scale 0 forgets the class
    llama.class_embedding.weight.data[:5] += 1
    assert torch.equal(unconditional, draw(0.0))
    logits, ids = logits_of_steps(llama, class_ids, 3.0, top_k=1)
    cond, uncond = logits.chunk(2)                                     # (B, M + N, V) each
    assert torch.equal(ids, (3 * cond - 2 * uncond).argmax(-1))


def test_sampling_is_repeatable_and_stays_in_range():
    llama = tiny_llama()
    draw = lambda seed: llama.generate(torch.arange(5), 2.0, 1.0, 10, 0.9, torch.Generator().manual_seed(seed))
    first, again, other = draw(1), draw(1), draw(2)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert first[0].shape == (5, 6) and first[1].shape == (5, 16) and first[1].dtype == torch.int64
    assert 0 <= min(x.min() for x in first) and max(x.max() for x in first) < 32


def test_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda **kw: (hita.filter_logits(logits, **kw) > -torch.inf)[0].tolist()
    assert kept() == [True] * 4 and kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, True, False, False]               # the token that crosses p stays
    assert kept(top_p=0.4) == [True, False, False, False] and kept(top_p=0.9) == [True, True, True, False]
    assert hita.filter_logits(torch.tensor([[1.0, 1.0, 0.0]]), top_k=1)[0].tolist() == [1, 1, -torch.inf]  # ties stay
    assert torch.allclose(hita.filter_logits(logits, temperature=0.5), 2 * logits)
    for wrong in (dict(temperature=0.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(cfg_scale=float("nan"))):
        with pytest.raises(hita.HitaError, match=next(iter(wrong))):
            tiny_llama().generate(torch.tensor([0]), **wrong)


def test_class_labels_are_dropped_at_the_given_rate_while_training_only():
    llama = tiny_llama(class_dropout=0.1, dropout=0.0, token_dropout=0.0)
    seen = []
    llama.class_embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    ids = torch.zeros(2000, dtype=torch.int64), torch.zeros(2000, 6, dtype=torch.int64), torch.zeros(2000, 16, dtype=torch.int64)
    with torch.no_grad():
        llama.train()(*ids)
        llama.eval()(*ids)
    assert (seen[0] == 5).float().mean().item() == pytest.approx(0.1, abs=0.03)   # 0.03 is 4.5 standard deviations
    assert (seen[1] == 0).all()


def test_llama_overfits_two_batches():
    llama = hita.Llama(dataclasses.replace(TINY_LLAMA, dropout=0.0, token_dropout=0.0, class_dropout=0.0))
    optimizer = torch.optim.AdamW(llama.parameters(), 1e-2)
    class_ids, g, p = tiny_ids(4)
    for step in range(150):
        loss = sum(hita.llama_losses(*llama(class_ids, g, p), g, p))
        if step == 0:
            assert loss.item() == pytest.approx(2 * np.log(32), abs=1e-4)         # zero heads: uniform
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7


def test_classes_out_of_range_are_refused():
    for wrong in (torch.tensor([5]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor(1)):
        with pytest.raises(hita.HitaError):
            tiny_llama().generate(wrong)


def test_released_sampling_looks_up_the_last_global_token_in_the_patch_table():
    llama = tiny_llama(released_sampling=True)
    class_ids = torch.arange(5)
    g, p = llama.generate(class_ids, top_k=1)
    x = torch.cat([llama.class_embedding(class_ids)[:, None], llama.global_embedding(g[:, :-1]), llama.patch_embedding(g[:, -1:]),
                   llama.patch_embedding(p[:, :-1])], dim=1)
    x = llama.backbone(x, torch.arange(22))
    assert torch.equal(torch.cat([llama.global_head(x[:, :6]), llama.patch_head(x[:, 6:])], 1).argmax(-1), torch.cat([g, p], 1))
    llama.cfg.released_sampling = False
    g2, p2 = llama.generate(class_ids, top_k=1)
    assert torch.equal(g, g2) and not torch.equal(p, p2)


# numbers that must not drift -----------------------------------------------------------------------------------------

def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Weights from numpy's frozen generator, so that neither initialisation nor torch's random streams matter."""
    for i, p in enumerate(module.parameters()):
        p.data = torch.from_numpy(np.random.RandomState(i).standard_normal(p.shape).astype(np.float32)) / p[0].numel() ** 0.5
    return module.eval()


def wave(*shape: int) -> torch.Tensor:
    return (torch.arange(np.prod(shape)) * 0.37).sin().reshape(shape)


def golden_outputs(component: str):
    cfg, llama_ids = dataclasses.replace(TINY, vfm_recon=True, dino="some-vit", dino_dim=8), (torch.tensor([1, 4]), *(
        torch.arange(2 * n).reshape(2, n) % 32 for n in (6, 16)))
    return {"encoder": lambda: fill(hita.Encoder(TINY))(wave(2, 3, 16, 16)),
            "extractor": lambda: fill(hita.QueryExtractor(cfg))(wave(2, 16, 4, 4), wave(2, 257, 8)),
            "extractor without DINOv2": lambda: fill(hita.QueryExtractor(TINY))(wave(2, 16, 4, 4), None),
            "quantizer": lambda: fill(hita.VectorQuantizer(32, 4))(wave(2, 9, 4)),
            "fusion": lambda: fill(hita.Fusion(TINY))(wave(2, 6, 16), wave(2, 16, 16), (4, 4)),
            "feature branch": lambda: fill(hita.Fusion(cfg)).reconstruct_features(wave(2, 6, 16), 8),
            "decoder": lambda: fill(hita.Decoder(TINY))(wave(2, 16, 4, 4)),
            "tokenizer": lambda: vars(fill(tiny())(wave(2, 3, 16, 16))).values(),
            "discriminator": lambda: fill(hita.PatchDiscriminator(8))(wave(1, 3, 64, 64)),
            "llama": lambda: fill(tiny_llama())(*llama_ids)}[component]()


@pytest.mark.parametrize("component, golden", [
    ("encoder", [0.970209, 0.410055]), ("extractor", [2.29967, 0.473899]), ("extractor without DINOv2", [1.66395, -0.371092]),
    ("quantizer", [3.54454, 0.407916]), ("fusion", [2.3315, 0.32831]), ("feature branch", [2.12484, -0.423527]),
    ("decoder", [0.474607, -0.0164654]), ("tokenizer", [1.34986, -0.334568]), ("discriminator", [0.574994, -0.0305378]),
    ("llama", [0.701962, 0.723494])])
def test_tiny_seeded_components_give_the_same_numbers_as_ever(component, golden):
    """Two figures stand for all outputs: the mean magnitude, and a sum with signs, which moves when values change places."""
    out = golden_outputs(component)
    out = torch.cat([x.double().flatten() for x in ([out] if isinstance(out, torch.Tensor) else out) if x is not None])
    signed = (out * (torch.arange(len(out)) * 0.61).cos()).sum() / len(out) ** 0.5
    assert [out.abs().mean().item(), signed.item()] == pytest.approx(golden, rel=1e-4, abs=1e-4)


# checkpoints ---------------------------------------------------------------------------------------------------------

def save_tiny(folder: Path, tokenizer: hita.HitaTokenizer | None = None) -> tuple[hita.HitaTokenizer, hita.Llama]:
    tokenizer, llama = tokenizer or tiny(), tiny_llama()
    hita.save_checkpoint(folder / "tokenizer.pt", {"kind": "tokenizer", "config": dataclasses.asdict(tokenizer.cfg),
                                                   "ema": tokenizer.state_dict()})
    hita.save_checkpoint(folder / "llama.pt", {"kind": "llama", "config": dataclasses.asdict(llama.cfg), "ema": llama.state_dict(),
                                               "classes": list("abcde"), "tokenizer": hita.fingerprint(tokenizer)})
    return tokenizer, llama


def test_checkpoints_come_back_the_same(tmp_path):
    tokenizer, llama = save_tiny(tmp_path)
    tokenizer2, llama2 = hita.load_tokenizer(tmp_path / "tokenizer.pt"), hita.load_llama(tmp_path / "llama.pt")
    assert not tokenizer2.training and not llama2.training and tokenizer2.cfg == tokenizer.cfg and llama2.cfg == llama.cfg
    images, (c, g, p) = torch.rand(2, 3, 16, 16), tiny_ids()
    assert all(map(torch.equal, tokenizer.encode(images), tokenizer2.encode(images)))
    assert all(map(torch.equal, llama(c, g, p), llama2(c, g, p)))


def test_unfit_checkpoints_are_refused_with_a_reason(tmp_path):
    save_tiny(tmp_path)
    good = torch.load(tmp_path / "llama.pt", weights_only=True)
    def refused(data, match, load=hita.load_llama):
        path = tmp_path / "x.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        with pytest.raises(hita.HitaError, match=match):
            load(path)
    with pytest.raises(hita.HitaError, match="train_ar.py"):
        hita.load_llama(tmp_path / "nothing.pt")
    refused(good, "holds a llama", hita.load_tokenizer)
    refused(b"", "not a checkpoint")
    refused((tmp_path / "llama.pt").read_bytes()[:1000], "not a checkpoint")
    refused({"some": 1}, "no model weights")
    refused({**good, "config": {"colour": "red"}}, "colour")
    for setting in (dict(layers=10 ** 9), dict(dim="wide"), dict(dropout=float("nan")), dict(heads=True), dict(grid=-1)):
        refused({**good, "config": good["config"] | setting}, f"x.pt has settings.*{next(iter(setting))}")
    refused({**good, "config": good["config"] | dict(codebook_size=2 ** 24, dim=65536)}, "shape")    # and no memory is taken
    for classes in (5, ["a"], [1, 2, 3, 4, 5]):
        refused({**good, "classes": classes}, "name for each")
    refused({**good, "ema": {k: v for k, v in good["ema"].items() if k != "norm.weight"}}, "lacks tensor norm.weight")
    refused({**good, "ema": {**good["ema"], "extra": torch.zeros(1)}}, "unexpected tensor extra")
    refused({**good, "ema": {**good["ema"], "norm.weight": torch.zeros(3)}}, r"norm.weight has shape \(3,\)")


class Malicious:
    def __reduce__(self):
        return os.system, ("echo ran > ran.txt",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": {}, "args": Malicious()}, "evil.pt")
    with pytest.raises(hita.HitaError, match="safely"):
        hita.load_tokenizer("evil.pt")
    assert not Path("ran.txt").exists()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    hita.save_checkpoint(path, {"step": 1})
    def full_disk(data, f):
        f.write(b"half a")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(hita.HitaError, match="No space left"):
        hita.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


def released_tokenizer_keys(cfg: hita.TokenizerConfig) -> set[str]:
    """The names in a released tokenizer file, spelled out from the configuration."""
    both = lambda *names: [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    res = lambda name, shortcut: both(*(f"{name}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")),
                                      *([f"{name}.nin_shortcut"] if shortcut else []))
    attn = lambda name: both(*(f"{name}.{part}" for part in ("norm", "q", "k", "v", "proj_out")))
    layer = lambda name: both(f"{name}.norm1", f"{name}.norm2", f"{name}.ffnet.w12", f"{name}.ffnet.w3")
    keys = []
    for side, widths, blocks, resample in (("encoder", cfg.channel_mult, cfg.res_blocks, "downsample"),
                                           ("decoder", cfg.channel_mult[::-1], cfg.res_blocks + 1, "upsample")):
        keys += both(f"{side}.conv_in", f"{side}.norm_out", f"{side}.conv_out")
        keys += res(f"{side}.mid.0", False) + attn(f"{side}.mid.1") + res(f"{side}.mid.2", False)
        for i, width in enumerate(widths):
            for b in range(blocks):
                keys += res(f"{side}.conv_blocks.{i}.res.{b}", b == 0 and width != widths[max(i - 1, 0)])
                if i == (len(widths) - 1 if side == "encoder" else 0):
                    keys += attn(f"{side}.conv_blocks.{i}.attn.{b}")
            if i < len(widths) - 1:
                keys += both(f"{side}.conv_blocks.{i}.{resample}.conv")
    for i in range(cfg.layers):
        name = f"encode_transformer.transformer1.layers.{i}"
        keys += layer(name) + [f"{name}.attn1.to_{x}.weight" for x in "qkv"] + both(f"{name}.attn1.to_out.0")
        for name in (f"encode_transformer.transformer2.layers.{i}", f"decode_transformer.transformer.layers.{i}"):
            keys += layer(name) + both(*(f"{name}.attn1.{x}_proj" for x in ("q", "k", "v", "out")))
    keys += [f"encode_transformer.{x}" for x in ("carrier_tokens", "pos_embed", "proj.mlp.0.weight", "proj.mlp.3.weight")]
    keys += both(*(f"encode_transformer.{x}" for x in ("proj.mlp.1", "proj.mlp.4", "norm_pre1", "norm_pre2")))
    keys += ["decode_transformer.position_embedding", "decode_transformer.slot_position_embedding"] + both("decode_transformer.norm")
    if cfg.vfm_recon:
        keys += ["decode_transformer.mask_embedding", *both("decode_transformer.norm_vfm", "decode_transformer.proj")]
    keys += both("quant_conv", "post_quant_conv", "pre_slots_quant", "post_slots_quant")
    return set(keys + [f"{x}quantize.{y}" for x in ("", "slot_") for y in ("embedding.weight", "codebook_used")])


def released_llama_keys(layers: int) -> set[str]:
    blocks = {f"layers.{i}.{x}.weight" for i in range(layers) for x in (
        "attention_norm", "ffn_norm", "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}
    return blocks | {f"{x}.weight" for x in ("cls_embedding.embedding_table", "tok_embeddings", "slot_embeddings", "slot_pos",
                                             "norm", "output")}


def released_layout(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights as the released files have them."""
    if isinstance(model, hita.Llama):
        weights = {hita.released_name(k, hita.RELEASED_LLAMA): v for k, v in model.state_dict().items()}
        return weights | {"output.weight": torch.cat([model.global_head.weight, model.patch_head.weight]).detach()}
    weights = {hita.released_name(k, hita.RELEASED_TOKENIZER): v for k, v in model.state_dict().items()}
    for name in ("quant_conv.weight", "post_quant_conv.weight"):
        weights[name] = weights[name][..., None, None]
    return weights | {"quantize.codebook_used": torch.zeros(9), "slot_quantize.codebook_used": torch.zeros(9)}


@pytest.mark.parametrize("preset, count", [("hita-v", 501), ("hita-u", 506), ("B", 90), ("XL", 258)])
def test_released_files_have_these_tensors(preset, count):
    with torch.device("meta"):
        if preset in hita.TOKENIZERS:
            model, expected = hita.HitaTokenizer(hita.TOKENIZERS[preset]), released_tokenizer_keys(hita.TOKENIZERS[preset])
        else:
            model = hita.Llama(hita.LlamaConfig(**hita.LLAMA_SIZES[preset]))
            expected = released_llama_keys(model.cfg.layers)
    assert len(expected) == count and set(released_layout(model)) == expected


@pytest.fixture
def small_released(monkeypatch) -> tuple[hita.HitaTokenizer, hita.Llama]:
    """A small Hita-U and B, which the loaders take for the released sizes, on the released grid and codebooks."""
    sizes = dict(channels=4, channel_mult=(1, 1, 1, 1, 1), res_blocks=1, latent_dim=16, layers=1, heads=2)
    for name in ("hita-v", "hita-u"):
        monkeypatch.setitem(hita.TOKENIZERS, name, dataclasses.replace(hita.TOKENIZERS[name], **sizes))
    monkeypatch.setitem(hita.LLAMA_SIZES, "B", dict(layers=1, heads=2, dim=16))
    tokenizer, llama = hita.HitaTokenizer(hita.TOKENIZERS["hita-u"]), hita.Llama(hita.LlamaConfig(**hita.LLAMA_SIZES["B"]))
    for head in llama.heads():
        torch.nn.init.normal_(head.weight)
    return tokenizer.eval(), llama.eval()


def test_released_files_load_strictly_and_with_their_ema_weights(small_released, tmp_path):
    path = tmp_path / "x.pt"
    for model, load, some in zip(small_released, (hita.load_tokenizer, hita.load_llama), ("quant_conv.weight", "output.weight")):
        weights = released_layout(model)
        def loaded(ema, **rest):
            torch.save({"model": {k: v + 1 for k, v in ema.items()}, "ema": ema, "args": argparse.Namespace(lr=1), **rest}, path)
            return load(path)
        extra = {"encode_transformer.backbone.pretrained_encoder.norm.weight": torch.zeros(3)}
        for again in (loaded(weights), loaded(weights | extra)):
            assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
        torch.save(weights, path)                                      # the sharded trainer saves bare weights
        assert load(path).cfg == model.cfg
        torch.save({"model": weights}, path)
        assert load(path).cfg == model.cfg
        for key in sorted(k for k in weights if "codebook_used" not in k)[::17]:
            with pytest.raises(hita.HitaError, match=f"lacks tensor {key} "):
                loaded({k: v for k, v in weights.items() if k != key})
            with pytest.raises(hita.HitaError, match=f": {key} has shape"):
                loaded(weights | {key: torch.zeros(3, 3, 3, 3, 3, 3)})
        with pytest.raises(hita.HitaError, match=f"unexpected tensor {some}x "):
            loaded(weights | {some + "x": torch.zeros(1)})
    with pytest.raises(hita.HitaError, match="holds a llama"):
        hita.load_tokenizer(path)


def no_network(*args, **kwargs):
    raise OSError("no network")


# the Hub --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path):
    """A server that has the files in tmp_path/hub and notes what is asked for -> (environment, list of requests)."""
    requests = []
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(f"{self.command} {self.path}")
            file = tmp_path / "hub" / self.path.split("/resolve/main/")[-1]
            body = file.read_bytes() if file.is_file() else b""
            self.send_response(200 if body else 404)
            for name, value in (("ETag", f'"{file.name}"'), ("X-Repo-Commit", "1" * 40), ("Content-Length", len(body))):
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")
        do_HEAD = do_GET
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}, requests
    server.shutdown()


def test_sampling_with_a_released_model_fetches_it_once(small_released, hub, tmp_path):
    environment, requests = hub
    files = ["ultra/tokenizer/hita-ultra.pt", "ultra/GPT-B/GPT-B-250e.pt"]
    for file, model in zip(files, small_released):
        (tmp_path / "hub" / file).parent.mkdir(parents=True)
        torch.save({"ema": released_layout(model)}, tmp_path / "hub" / file)
    small = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hita, sample; hita.LLAMA_SIZES['B'] = {hita.LLAMA_SIZES['B']}; "
             f"hita.TOKENIZERS['hita-u'] = hita.{hita.TOKENIZERS['hita-u']}; hita.run(sample.main)")
    def run(*args, **more):
        return subprocess.run([sys.executable, "-c", small, *args], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, **environment, "CUDA_VISIBLE_DEVICES": "", **more})
    result = run("--class", "golden_retriever", "--num", "1")
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert "hita-u-b-250e" in first and "nothing was trained in out" in first
    gets = [r for r in requests if r.startswith("GET") and "resolve" in r]
    assert gets == [f"GET /yexiguafu/hita-gen/resolve/main/{file}" for file in files]   # and no DINOv2
    assert Image.open(tmp_path / "out/samples.png").size == (256, 256)
    requests.clear()
    result = run("--model", "hita-u-b-250e", "--class", "207", "--num", "1", "--native", HF_HUB_OFFLINE="1")
    assert result.returncode == 0 and not requests and "as --model says" in result.stdout.splitlines()[0], result.stderr
    assert Image.open(tmp_path / "out/samples.png").size == (336, 336)
    listed = run("--list").stdout.splitlines()
    assert len(listed) == 1 + 17 + 1 and [line.split()[0] for line in listed if " yes" in line] == ["hita-u-b-250e"]
    assert any(line.split()[:6] == ["hita-v-xl-50e", "XL", "816.8", "M", "50", "2.98"] for line in listed)


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hita, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--class", "207"])
    with pytest.raises(hita.HitaError) as error:
        sample.main()
    for part in ("no network", "ultra/tokenizer/hita-ultra.pt as", "ultra/GPT-B/GPT-B-250e.pt as", str(tmp_path / "weights" / "hita-u.pt"),
                 "python train_tokenizer.py && python train_ar.py"):
        assert part in str(error.value)
    with pytest.raises(hita.HitaError, match="model.safetensors as .*--dino-file"):
        hita.DINOv2()
    (tmp_path / "weights").mkdir()
    tokenizer = tiny()
    hita.save_checkpoint(tmp_path / "weights" / "hita-v.pt", {"kind": "tokenizer", "config": dataclasses.asdict(tokenizer.cfg),
                                                              "ema": tokenizer.state_dict()})
    assert hita.load_tokenizer("hita-v").cfg == tokenizer.cfg          # a file that was downloaded by hand
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "hita-u-xl-10e"])
    with pytest.raises(hita.HitaError, match="hita-u-xl-100e"):
        sample.main()


# fine-tuning ----------------------------------------------------------------------------------------------------------

def test_the_tokenizer_starts_from_a_checkpoint_and_its_discriminator(tmp_path):
    source, D = tiny(), hita.PatchDiscriminator(8)
    data = {"kind": "tokenizer", "config": dataclasses.asdict(source.cfg), "ema": source.state_dict(), "discriminator": D.state_dict()}
    torch.save(data, tmp_path / "x.pt")
    recipe = dataclasses.replace(train_tokenizer.RECIPES["emoji"], gan_width=8)
    build = lambda **changes: train_tokenizer.build(dataclasses.replace(TINY, image_size=24, **changes), recipe, torch.device("cpu"),
                                                    None, str(tmp_path / "x.pt"))
    with pytest.raises(hita.HitaError, match="image_size is 24 and was 16.*--preset"):
        build()
    data["config"]["image_size"], data["ema"] = 24, hita.HitaTokenizer(dataclasses.replace(TINY, image_size=24)).state_dict()
    torch.save(data, tmp_path / "x.pt")
    tokenizer, ema, discriminator, _ = build(k=3)                      # k may change
    for model, weights in ((tokenizer, data["ema"]), (ema, data["ema"]), (discriminator, data["discriminator"])):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.save({**data, "discriminator": {"heads.0.0.0.bias": torch.zeros(3)}}, tmp_path / "x.pt")
    assert not torch.equal(build()[2].main[0].weight, D.main[0].weight)


def test_the_llama_starts_from_a_checkpoint_and_other_classes_anew(tmp_path):
    _, source = save_tiny(tmp_path)
    llama = tiny_llama()
    train_ar.start_llama(llama, str(tmp_path / "llama.pt"), list("abcde"))
    assert all(map(torch.equal, llama.state_dict().values(), source.state_dict().values()))
    llama = tiny_llama(num_classes=3)
    new = llama.class_embedding.weight.detach().clone()
    train_ar.start_llama(llama, str(tmp_path / "llama.pt"), list("abc"))
    assert torch.equal(llama.class_embedding.weight[:3], new[:3]) and torch.equal(llama.class_embedding.weight[3], source.class_embedding.weight[5])
    assert torch.equal(llama.patch_head.weight, source.patch_head.weight)
    with pytest.raises(hita.HitaError, match="dim is 24 and was 16"):
        train_ar.start_llama(tiny_llama(dim=24), str(tmp_path / "llama.pt"), list("abc"))


# data ----------------------------------------------------------------------------------------------------------------

def picture_folder(root: Path, count: int = 12, classes: int = 5, size: tuple[int, int] = (20, 24)) -> Path:
    for split in ("train", "val"):
        for i in range(count):
            path = root / split / f"class{i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return root


def test_embedded_data():
    root = hita.embedded_data()
    train, val = hita.ImageFolder(root, "train", 64), hita.ImageFolder(root, "val", 64)
    assert (len(train), len(val), len(train.classes)) == (6230, 365, 50) and train.classes == val.classes
    image, label = val[0, 0]
    assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() == 1 and label == 0
    assert torch.equal(val[1, 0][0], image.flip(-1))


def test_augmentation_depends_on_seed_epoch_and_picture_alone(tmp_path):
    data = hita.ImageFolder(picture_folder(tmp_path), "train", 16, augment=True, crop_range=0.5)
    assert torch.equal(data[3, 5][0], data[3, 5][0]) and not torch.equal(data[3, 5][0], data[4, 5][0])
    assert data[0, 0][0].shape == (3, 16, 16)


def test_centre_crop_and_random_crop_sizes():
    image = Image.fromarray(np.arange(300 * 200 * 3, dtype=np.uint32).reshape(300, 200, 3).astype(np.uint8))
    assert hita.fit(image, 64).shape == (64, 64, 3)
    assert all(hita.fit(image, 64, np.random.default_rng(i), 0.8).shape == (64, 64, 3) for i in range(5))
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert np.array_equal(hita.fit(square, 64), np.asarray(square))    # pictures of the right size are left alone
    assert hita.fit(Image.new("RGB", (1, 10_000)), 64).shape == hita.fit(Image.new("RGB", (10_000, 1)), 64).shape == (64, 64, 3)


def test_transparent_pictures_get_a_white_ground():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert hita.on_white(image).getpixel((0, 0)) == (255, 255, 255) and hita.on_white(Image.new("L", (4, 4))).mode == "RGB"


def test_any_kind_of_picture_is_read(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30], pixels[:20, 30:] = (200, 100, 50), (10, 220, 90)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6                                                   # to be turned by 90 degrees to the right
    image.save(tmp_path / "rgb.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.convert("RGBA").save(tmp_path / "rgba.webp", lossless=True)
    image.quantize(4).save(tmp_path / "palette.gif")
    image.convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    expected, grey = (hita.read_picture(tmp_path / name, 16) for name in ("rgb.png", "grey.png"))
    assert expected.shape == (3, 16, 16) and expected.std() > 0.3
    for name in ("turned.png", "cmyk.tif", "rgba.webp", "palette.gif"):
        assert torch.allclose(hita.read_picture(tmp_path / name, 16), expected, atol=0.03), name
    assert torch.allclose(hita.read_picture(tmp_path / "grey16.png", 16), grey, atol=0.01)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for name, message in (("none.png", "no picture"), ("bad.png", "bad.png cannot be read")):
        with pytest.raises(hita.HitaError, match=message):
            hita.read_picture(tmp_path / name, 16)


def png(width: int, height: int) -> bytes:
    """A picture that says it has so many pixels but has none."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")


def test_bad_pictures_are_named_once_over_all_workers_counted_and_replaced(tmp_path, capfd):
    root = picture_folder(tmp_path)
    folder, good = root / "train/class0", (root / "train/class0/0.png").read_bytes()
    bad = {"0.png": b"not a picture", "a.jpg": b"", "b.png": good[:60], "bomb.png": png(60000, 60000), "c.gif": b"GIF89a"}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "d.png").mkdir()
    (folder / "notes.txt").write_text("no picture")
    (root / "train/empty").mkdir()
    good_ones = {"one.png": (1, 1), "ünïcødé 猫 \n.png": (9, 9), "x" * 250 + ".png": (9, 9), "large.png": (10_000, 10_000), "strip.png": (1, 10_000)}
    for name, size in good_ones.items():
        Image.new("L", size).save(folder / name)
    data = hita.ImageFolder(root, "train", 16)
    loader = torch.utils.data.DataLoader(data, 1, sampler=[(epoch, i) for epoch in (0, 1) for i in range(len(data))], num_workers=2)
    images = [image[0] for image, _ in loader]
    assert len(images) == 2 * (12 + 6 + 5) and all(image.shape == (3, 16, 16) for image in images)
    assert torch.equal(images[0], images[1])                           # 0.png gives way to the next
    said = capfd.readouterr().err
    assert all(said.count(f"/{name}, ") == 1 for name in (*bad, "link.png", "d.png")) and said.count("notes.txt") == 1, said
    assert "7 so far" in said and "8 so far" not in said and "no pictures of 1 classes, as empty" in said
    for path in list(root.rglob("*.png"))[:20]:
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(hita.HitaError, match="too many"):
        hita.ImageFolder(root, "train", 16)


def test_data_folders_without_pictures_are_refused(tmp_path):
    for root in (tmp_path / "missing", tmp_path):
        with pytest.raises(hita.HitaError, match="folder"):
            hita.ImageFolder(root, "train", 16)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(hita.HitaError, match="no pictures"):
        hita.ImageFolder(tmp_path, "train", 16)


def test_validation_data(tmp_path):
    root = picture_folder(tmp_path)
    (root / "val/class0").rename(tmp_path / "away")                    # labels are those of train all the same
    assert {label for _, label in hita.validation_data(hita.ImageFolder(root, "train", 16)).files} == {1, 2, 3, 4}
    (root / "val/other").mkdir()
    with pytest.raises(hita.HitaError, match="class other"):
        hita.validation_data(hita.ImageFolder(root, "train", 16))
    (root / "val").rename(tmp_path / "away2")
    assert hita.validation_data(hita.ImageFolder(root, "train", 16)).files == hita.ImageFolder(root, "train", 16).files


def test_batches_go_through_every_epoch_once_and_can_start_anywhere():
    batches = iter(hita.Shuffled(10, 4, seed=3))
    items = sum((next(batches) for _ in range(5)), [])                 # 20 items: two epochs, though 4 does not divide 10
    for epoch in (0, 1):
        assert sorted(i for e, i in items if e == epoch) == list(range(10))
    assert [i for _, i in items[:10]] != [i for _, i in items[10:]]
    later = iter(hita.Shuffled(10, 4, seed=3, first_step=3))
    assert next(later) == items[12:16]
    with pytest.raises(hita.HitaError):
        hita.Shuffled(10, 0, 0)


def test_learning_rate():
    rate = lambda step: hita.learning_rate(step, 100, 10, 1e-3, 1e-4)
    assert rate(5) == pytest.approx(1e-7 + 0.5 * (1e-3 - 1e-7)) and rate(10) == pytest.approx(1e-3) and rate(100) == pytest.approx(1e-4)
    assert hita.learning_rate(77, 100, 0, 1e-4, 1e-4) == pytest.approx(1e-4)


def test_ema():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * a.weight + 0.1 * b.weight
    hita.update_ema(a, b, 0.9)
    assert torch.allclose(a.weight, expected)


def test_token_cache_is_reused_and_rebuilt_when_anything_changes(tmp_path):
    root = picture_folder(tmp_path / "data")
    recipe, device, path = dataclasses.replace(train_ar.RECIPES["emoji"]), torch.device("cpu"), tmp_path / "tokens.npy"
    tokenizer = tiny()
    data = hita.ImageFolder(root, "train", 16)
    build = lambda tok=tokenizer, copies=2: train_ar.token_cache(path, tok, data, copies, device, recipe)
    tokens = build()
    assert tokens.shape == (24, 1 + 6 + 16)
    for row in (0, 7, 12 + 7):                                         # plain pictures, then mirrored ones
        image, label = data[divmod(row, 12)]
        assert tokens[row].tolist() == [label, *sum((x[0].tolist() for x in tokenizer.encode(image[None])), [])]
    stamp = path.stat().st_mtime_ns
    build()
    assert path.stat().st_mtime_ns == stamp
    for change in (lambda: build(copies=3), lambda: build(tiny(k=1)), lambda: build(), lambda: (path.write_bytes(b"damaged"), build())):
        change()
        assert path.stat().st_mtime_ns != stamp
        stamp = path.stat().st_mtime_ns
    (root / "train/class0/0.png").write_bytes((root / "train/class1/1.png").read_bytes())
    build()
    assert path.stat().st_mtime_ns != stamp


def test_an_interrupted_encoding_goes_on_where_it_was(tmp_path, monkeypatch):
    data, device, recipe = hita.ImageFolder(picture_folder(tmp_path / "data"), "train", 16), torch.device("cpu"), train_ar.RECIPES["emoji"]
    tokenizer, encoded = tiny(), []
    whole = train_ar.token_cache(tmp_path / "whole.npy", tokenizer, data, 2, device, recipe).copy()
    monkeypatch.setattr(train_ar, "BLOCK", 5)                          # 24 rows in 5 blocks
    def encode(images):
        encoded.append(len(images))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return hita.HitaTokenizer.encode(tokenizer, images)
    tokenizer.encode = encode
    build = lambda: train_ar.token_cache(tmp_path / "tokens.npy", tokenizer, data, 2, device, recipe)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert not (tmp_path / "tokens.npy").exists()
    assert np.array_equal(build(), whole) and encoded == [5, 5, 5, 5, 5, 4]
    assert sorted(p.name for p in tmp_path.glob("tokens*")) == ["tokens.npy", "tokens.txt"]


def test_parts_of_a_batch_add_up_to_the_batch():
    llama, rows = tiny_llama(dropout=0.0, token_dropout=0.0, class_dropout=0.0), torch.cat([x.reshape(4, -1) for x in tiny_ids(4)], 1)
    def weights(parts):
        recipe, own = dataclasses.replace(train_ar.RECIPES["emoji"], accumulate=parts), copy.deepcopy(llama)
        *_, step = train_ar.make_step(recipe, own, copy.deepcopy(own), compiled=False)
        losses = [step(i, rows)["patch"] for i in (1, 2, 3)]
        return torch.cat([torch.stack(losses), *(p.detach().flatten() for p in own.parameters())])
    assert torch.allclose(weights(1), weights(4), atol=1e-5) and weights(1)[0] > weights(1)[2]


def test_recomputed_activations_give_the_same_gradients():
    tokenizer, images, grads = tiny(dropout=0.0).train(), torch.rand(2, 3, 16, 16), []
    for recompute in (False, True):
        recipe = dataclasses.replace(train_tokenizer.RECIPES["emoji"], recompute=recompute)
        train_tokenizer.make_step(tokenizer.cfg, recipe, False, tokenizer, tokenizer, hita.PatchDiscriminator(8), None)
        calls = []
        hook = tokenizer.encoder.levels[0].res[0].register_forward_hook(lambda *args: calls.append(1))
        tokenizer.zero_grad()
        tokenizer(images).recon.square().sum().backward()
        hook.remove()
        grads.append([p.grad.clone() for p in tokenizer.parameters() if p.grad is not None])
        assert len(calls) == 1 + recompute
    assert all(map(torch.equal, *grads))


# scripts -------------------------------------------------------------------------------------------------------------

def script(*args: str, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*launcher, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


SMALL = ["--image-size", 24, "--channels", 8, "--channel-mult", "1,1,2", "--latent-dim", 16, "--layers", 1, "--num-global", 6,
         "--codebook-size", 32, "--k", 2, "--steps", 4, "--batch-size", 4, "--log-every", 2, "--eval-every", 4, "--gan-start", 4]
SMALL_AR = ["--dim", 24, "--layers", 1, "--heads", 2, "--steps", 4, "--batch-size", 4, "--log-every", 2, "--eval-every", 2]


def figures(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_three_scripts_one_after_another_and_two_processes_equal_one(tmp_path):
    data = picture_folder(tmp_path / "data")
    runs = {}
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        result = script("train_tokenizer.py", "--data", data, "--out", out, *SMALL, processes=processes)
        assert result.returncode == 0, result.stderr
        result = script("train_ar.py", "--data", data, "--out", out, *SMALL_AR, processes=processes)
        assert result.returncode == 0, result.stderr
        runs[processes] = figures(out / "tokenizer.jsonl"), figures(out / "llama.jsonl")
    assert {"loss", "rec", "codebook", "adv", "disc", "D(real)", "D(fake)", "grad", "global_use", "global_ppl", "patch_use",
            "patch_ppl", "images/s", "eta_min"} <= set(runs[1][0][1])
    assert runs[1][0][2]["step"] == 4 and "psnr" in runs[1][0][2] and {"val_global", "val_patch"} <= set(runs[1][1][-1])
    for name in ("global", "patch", "val_patch"):
        one, two = ([f[name] for f in runs[n][1] if name in f] for n in (1, 2))
        assert one == pytest.approx(two, rel=1e-5), name
    for name in ("rec", "codebook"):  # up to the step at which the discriminator comes in, whose batch norm is per process
        one, two = ([f[name] for f in runs[n][0] if name in f] for n in (1, 2))
        assert one == pytest.approx(two, rel=1e-5), name
    out = tmp_path / "out1"
    for processes in (1, 2):
        result = script("train_ar.py", "--resume", "--steps", 5, "--out", tmp_path / f"out{processes}", processes=processes)
        assert result.returncode == 0 and "steps is 5 and was 4" in result.stdout, result.stderr
    assert figures(tmp_path / "out1/llama.jsonl")[-1]["val_patch"] == pytest.approx(figures(tmp_path / "out2/llama.jsonl")[-1]["val_patch"])
    for name in ("tokenizer.pt", "llama.pt", "tokenizer-000004.png", "llama-000004.png", "tokens-train.npy"):
        assert (out / name).stat().st_size > 0
    result = script("sample.py", "--out", out, "--class", "3", "class1", "--num", 3, "--single")
    assert result.returncode == 0 and "images/s" in result.stdout, result.stderr
    assert Image.open(out / "samples.png").size == (3 * 26 + 2, 2 * 26 + 2) and len(list((out / "samples").iterdir())) == 6


@pytest.mark.parametrize("command, works", [
    ("sample.py --bench emoji 16 --num 2", ["generate emoji, 16 px", "decode 16 px"]),
    ("train_ar.py --bench --batch-size 4 --accumulate 2", ["train emoji, 80 tokens, batch 4 in 2"]),
    ("train_tokenizer.py --bench --batch-size 2 --recompute", ["encode emoji, 64 px", "decode emoji", "train emoji"])])
def test_speed_is_measured_without_data(command, works, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(time, "perf_counter", iter(range(0, 1000, 20)).__next__)    # every call takes 20 s
    {"train_tokenizer.py": train_tokenizer, "train_ar.py": train_ar, "sample.py": sample}[command.split()[0]].main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(works) and all(line.startswith(work) for line, work in zip(lines, works))
    steps = 129 if "generate" in lines[0] else 1                       # 128 global tokens, 1 patch
    assert f"on cpu, {torch.get_num_threads()} threads: {20_000 / steps:.4g} ms/step" in lines[0] and "peak of this device unknown" in lines[0]
    assert "peak memory" in lines[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, message", [
    ("train_tokenizer.py --preset hita-w", "hita-w"), ("train_tokenizer.py --codebok-size 5", "--codebook-size"),
    ("train_tokenizer.py --k 99", "num_global"), ("train_tokenizer.py --k x", "x"), ("train_tokenizer.py --steps 0", "steps"),
    ("train_tokenizer.py --image-size 60", "multiple"), ("train_tokenizer.py --data nowhere", "nowhere"),
    ("train_tokenizer.py --device warp9", "warp9"), ("train_tokenizer.py --lpips-weight 1", "vgg16"),
    ("train_ar.py", "train_tokenizer.py"), ("train_ar.py --heads 5", "heads"), ("train_ar.py --seed -1", "seed"),
    ("sample.py", "train_tokenizer.py"), ("sample.py --num 0", "--num"), ("sample.py --temperature x", "x"),
    ("sample.py --image x.abc", "x.abc"), ("sample.py --seed -1", "--seed"), ("sample.py --top-p 2", "top_p"), ("sample.py --num 1e9", "1e9"),
    ("train_tokenizer.py --lr nan", "lr"), ("train_tokenizer.py --clip inf", "clip"), ("train_tokenizer.py --ema 1", "ema"),
    ("train_tokenizer.py --channel-mult 1,,2", "channel-mult"), ("train_tokenizer.py --batch-size 100000000", "batch_size"),
    ("train_tokenizer.py --resume nowhere.pt", "nowhere.pt"), ("train_tokenizer.py --resume data/README.md", "data/README.md"),
    ("train_tokenizer.py --image-size 8192 --channels 65536 --latent-dim 65536", "memory"),
    ("train_ar.py --tokenizer assets/samples.png", "samples.png"), ("train_ar.py --copies 0", "copies"),
    ("train_ar.py --batch-size 10 --accumulate 3", "--accumulate"), ("sample.py --bench Q", "2B"), ("sample.py --bench B 100", "100"),
    ("sample.py --count 5", "--npz"), ("sample.py --style README.md", "--from"), ("sample.py --keep nan", "--keep"),
    ("sample.py --reconstruct README.md --keep-globals", "one thing"), ("sample.py --fd nowhere nowhere", "nowhere"),
    ("train_tokenizer.py --eval", "train_tokenizer.py"), ("train_tokenizer.py --npz x", "--eval"), ("train_tokenizer.py --eval nowhere.pt", "nowhere.pt")])
def test_bad_requests_get_one_line_and_status_2(command, message, tmp_path, monkeypatch):
    name, *args = command.split()
    monkeypatch.setattr(sys, "argv", [name, *args, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    main = {"train_tokenizer.py": train_tokenizer, "train_ar.py": train_ar, "sample.py": sample}[name].main
    with pytest.raises(SystemExit) as exit:
        hita.run(main)
    lines = sys.stderr.getvalue().strip().splitlines()
    assert exit.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """-> function that runs a script on small data, stopped by a signal after step `stop`, and returns its lines of figures."""
    data = picture_folder(tmp_path / "data", 30)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    def run(module, out, *args, stop=None):
        count = iter(range(1, 1000))
        monkeypatch.setattr(hita.Stop, "asked", lambda self: next(count) == stop)
        monkeypatch.setattr(sys, "argv", ["x", "--data", str(data), "--out", str(tmp_path / out), *map(str, args)])
        module.main()
        kind = {train_tokenizer: "tokenizer", train_ar: "llama"}[module]
        return [{k: v for k, v in line.items() if k not in ("images/s", "eta_min")} for line in figures(tmp_path / out / f"{kind}.jsonl")]
    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


RUN = [*SMALL[:-8], "--steps", 12, "--batch-size", 7, "--log-every", 3, "--eval-every", 5, "--dropout", 0.1, "--crop-range", 0.7]


@pytest.mark.parametrize("stops", [(1,), (4, 1), (5, 6), (11,)])
def test_a_resumed_tokenizer_run_equals_an_uninterrupted_one(train, stops, tmp_path):
    """Bit for bit; batches of 7 of 30 pictures, so that no stop is at the end of an epoch; before and after the discriminator."""
    run = [*RUN, "--gan-start", 4, "--gan-width", 8]
    whole = train(train_tokenizer, "whole", *run)
    train(train_tokenizer, "parts", *run, stop=stops[0])
    for stop in stops[1:]:
        train(train_tokenizer, "parts", "--resume", "--workers", 1, stop=stop)
    assert train(train_tokenizer, "parts", "--resume") == whole and len(whole) == 6 + 3    # the intervals end at evaluations too
    weights = [torch.load(tmp_path / out / "tokenizer.pt", weights_only=True)["model"] for out in ("whole", "parts")]
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
    assert train(train_tokenizer, "parts", "--resume") == whole                            # a finished run stays as it is


def test_a_resumed_llama_run_equals_an_uninterrupted_one(train, tmp_path):
    train(train_tokenizer, "tok", *RUN, "--gan-weight", 0, "--steps", 1)
    run = [*SMALL_AR[:6], *RUN[-12:-2], "--tokenizer", tmp_path / "tok/tokenizer.pt", "--keep-every", 4]
    whole = train(train_ar, "whole", *run)
    train(train_ar, "parts", *run, stop=7)
    assert train(train_ar, "parts", "--resume") == whole
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.pt")) == ["llama-000004.pt", "llama-000008.pt", "llama-000012.pt", "llama.pt"]
    older = tmp_path / "parts/llama-000008.pt"
    with pytest.raises(hita.HitaError, match="later step"):
        train(train_ar, "parts", "--resume", older)
    assert train(train_ar, "fork", "--resume", older) == [line for line in whole if line["step"] > 8]
    saved = torch.load(older, weights_only=True)
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(hita.HitaError, match="optimizer does not fit"):
        train(train_ar, "fork2", "--resume", tmp_path / "x.pt")
    tokenizer = torch.load(tmp_path / "tok/tokenizer.pt", weights_only=True)
    torch.save({**tokenizer, "ema": {k: v + 1 for k, v in tokenizer["ema"].items()}}, tmp_path / "tok/tokenizer.pt")
    with pytest.raises(hita.HitaError, match="another tokenizer"):
        train(train_ar, "parts", "--resume")


def test_what_cannot_be_resumed_is_refused_and_nothing_is_overwritten(train, tmp_path, capsys):
    run = [*RUN, "--gan-weight", 0, "--steps", 2]
    train(train_tokenizer, "out", *run)
    held = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    hita.save_checkpoint(tmp_path / "x.pt", {"kind": "tokenizer", "config": dataclasses.asdict(TINY), "ema": tiny().state_dict()})
    for args, message in ((run, "holds a run already.*--resume.*--out"), (["--resume", "--batch-size", 8], "batch_size is 8 and was 7.*--init-from"),
                          (["--resume", "--channels", 16], "channels is 16 and was 8"), (["--resume", "--preset", "hita-v"], "image_size is 336"),
                          (["--resume", tmp_path / "x.pt"], "holds another run"), (["--resume", "--data", hita.embedded_data()], "pictures")):
        with pytest.raises(hita.HitaError, match=message):
            train(train_tokenizer, "out", *args)
    assert held == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(hita.HitaError, match="not the checkpoint of a run.*--init-from"):
        train(train_tokenizer, "other", "--resume", tmp_path / "x.pt")
    train(train_tokenizer, "out", "--resume", "--steps", 3, "--lr", 1e-5)
    assert "steps is 3 and was 2, lr is 1e-05 and was 0.001" in capsys.readouterr().out


def test_a_run_that_diverges_stops_before_weights_and_checkpoint(train, tmp_path, monkeypatch):
    true, calls = hita.reconstruction_loss, iter(range(1, 100))
    monkeypatch.setattr(hita, "reconstruction_loss", lambda *x: true(*x) * (float("nan") if next(calls) == 7 else 1))
    with pytest.raises(hita.HitaError, match="step 7: .*rec.* not finite.*--resume"):
        train(train_tokenizer, "out", *RUN, "--gan-weight", 0)
    saved = torch.load(tmp_path / "out/tokenizer.pt", weights_only=True)
    assert saved["step"] == 5 and all(x.isfinite().all() for x in [*saved["model"].values(), *saved["ema"].values()])
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p], fused=True)
    for loss, norm in ((1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        before, p.grad = p.detach().clone(), torch.full_like(p, loss * norm)
        hita.careful_step(optimizer, torch.tensor(loss), torch.tensor(norm))
        assert torch.equal(p, before) == (loss * norm != 1) and optimizer.state[p]["step"] == 1


def test_a_signal_ends_a_run_after_its_step(tmp_path):
    data, out = picture_folder(tmp_path / "data"), tmp_path / "out"
    process = subprocess.Popen([sys.executable, "train_tokenizer.py", "--data", data, "--out", out, *map(str, RUN), "--workers", "1",
                                "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    next(line for line in process.stdout if line.startswith("step"))
    for number in (signal.SIGINT, signal.SIGTERM):                     # so close together they are one
        os.killpg(process.pid, number)                                 # the loader's process gets them too, as from a terminal
    text = process.stdout.read()
    assert process.wait(30) == 0 and "stopped after step" in text, text
    assert torch.load(out / "tokenizer.pt", weights_only=True)["step"] == int(text.split("stopped after step ")[1].split(",")[0])


def test_a_second_signal_ends_a_run_at_once(monkeypatch, train):
    stop, status, now = hita.Stop(), [], iter([0.0, 0.1, 0.7])
    monkeypatch.undo()                                                 # the real Stop.asked
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(os, "_exit", status.append)
    assert not stop.asked()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)                                 # the same one, passed on twice
    assert stop.asked() and not status
    signal.raise_signal(signal.SIGTERM)
    assert status == [128 + signal.SIGTERM]


def test_classes_by_name_and_index():
    names = ["cat", "face-happy", "flag", "Flag", "red  panda"]
    assert sample.class_indices(["face-happy", "2", "Face-Happy", "Flag"], names) == [1, 2, 1, 3] and sample.class_indices(None, names[:3]) == [0, 1, 2]
    for wrong, message in (("face-hapy", "face-happy"), ("5", "0 to 4"), ("-1", "0 to 4"), ("FLAG", r"2 \(flag\), 3 \(Flag\)")):
        with pytest.raises(hita.HitaError, match=message):
            sample.class_indices([wrong], names)
    imagenet = sample.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert sample.class_indices(["golden retriever", "Golden_Retriever", "207"], imagenet) == [207] * 3
    with pytest.raises(hita.HitaError, match="giant panda"):
        sample.class_indices(["panda"], imagenet)


def test_pictures_of_336_px_become_256_px_as_in_the_protocol(small_released, monkeypatch):
    monkeypatch.setattr(sample, "DECODED", 2)
    tokenizer, ids = small_released[0], (torch.randint(16384, (3, 128)), torch.randint(16384, (3, 441)))
    native = tokenizer.decode(*ids)
    near = lambda pictures, images: (pictures - (images.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.51
    assert near(sample.decode(tokenizer, *ids, native=True), native)
    expected = F.interpolate(native, 256, mode="bicubic", antialias=False, align_corners=False)
    assert near(sample.decode(tokenizer, *ids, native=False), expected)


def test_sampling_with_another_tokenizer_is_refused(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    other = tiny(k=1)
    hita.save_checkpoint(tmp_path / "tokenizer.pt", {"kind": "tokenizer", "config": dataclasses.asdict(other.cfg), "ema": other.state_dict()})
    monkeypatch.setattr(sys, "argv", ["sample.py", "--out", str(tmp_path)])
    with pytest.raises(hita.HitaError, match="another tokenizer"):
        sample.main()


def test_names_of_classes_do_not_lead_out_of_the_folder(tmp_path):
    sample.write_pictures(torch.zeros(2, 3, 8, 8), ["../../up", "x" * 300], tmp_path / "out/x.png", 2, single=True)
    assert len(list((tmp_path / "out/x").iterdir())) == 2 and not list(tmp_path.glob("*.png"))


# zero-shot use and evaluation ----------------------------------------------------------------------------------------

@pytest.fixture
def shown(tmp_path, monkeypatch):
    """-> function that runs sample.py with a tiny model on some pictures a.png, b.png and returns the pictures of its grid."""
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize((30, 20)).save(tmp_path / name)
    tokenizer = tiny()
    tokenizer.extractor.queries.data.zero_()
    images = torch.stack([hita.read_picture(tmp_path / name, 16) for name in ("a.png", "b.png")])
    tokenizer.global_down.bias.data -= tokenizer.embed(images, None)[0].mean(dim=(0, 1))    # a's global codes are opposite to b's
    save_tiny(tmp_path, tokenizer)
    def run(*args):
        grids = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hita, "save_grid", lambda pictures, path, columns: grids.append((pictures, columns)))
        monkeypatch.setattr(sys, "argv", ["sample.py", "--out", str(tmp_path), *map(str, args)])
        sample.main()
        return grids[0] if grids else None
    return run


def test_style_transfer_with_the_own_globals_is_reconstruction_and_with_others_is_not(shown, capsys):
    pairs, columns = shown("--reconstruct", "a.png", "b.png")
    assert columns == 2 and capsys.readouterr().out.count(" dB") == 2
    matrix, columns = shown("--style", "a.png", "b.png", "--from", "a.png", "b.png")
    assert columns == 3 and len(matrix) == 9
    assert torch.equal(matrix[[3, 6]], pairs[[0, 2]]) and torch.equal(matrix[[1, 2]], pairs[[0, 2]])     # the margins
    assert torch.allclose(matrix[[4, 8]], pairs[[1, 3]], atol=1e-3)
    assert (matrix[5] - matrix[4]).abs().max() > 0.01 and (matrix[7] - matrix[8]).abs().max() > 0.01
    with pytest.raises(hita.HitaError, match="--from"):
        shown("--style", "a.png")
    assert shown("--keep-globals", "--num", 2)[1] == 2


@pytest.mark.parametrize("source", ["visible", "sampled", "full"])
def test_a_completion_keeps_what_is_given(shown, source, monkeypatch, tmp_path):
    decoded, states, true = [], [], hita.HitaTokenizer.decode
    def decode(self, *ids):
        hook = self.fusion.register_forward_hook(lambda module, args, out: states.append(out))
        decoded.append(torch.cat(ids, dim=1))
        picture = true(self, *ids)
        hook.remove()
        return picture
    monkeypatch.setattr(hita.HitaTokenizer, "decode", decode)
    pictures, columns = shown("--complete", "a.png", "--class", "3", "--keep", 0.5, "--num", 3, "--globals", source)
    tokenizer, image = hita.load_tokenizer(tmp_path / "tokenizer.pt"), hita.read_picture(tmp_path / "a.png", 16)
    visible = image.clone()
    visible[:, 8:] = image[:, :8].mean(dim=(1, 2), keepdim=True)
    assert columns == 5 and torch.equal(pictures[0], image) and torch.allclose(pictures[1][:, 9:], visible[:, 9:], atol=1e-6)
    ids, = decoded
    g, p = tokenizer.encode((image if source == "full" else visible)[None])
    assert torch.equal(ids[:, 6:6 + 8 - 2], p[:, :6].expand(3, -1))    # two of four rows of four, but for the last k
    assert torch.equal(ids[:, :6], g.expand(3, -1)) == (source != "sampled") and not torch.equal(ids[0, 14:], ids[1, 14:])
    if source != "sampled":                                            # what the decoder gets for the given cells is the same
        assert torch.allclose(states[0][:, :8], states[0][:1, :8].expand(3, -1, -1), atol=1e-5)
        assert not torch.allclose(states[0][0, 8:], states[0][1, 8:], atol=1e-2)
    for wrong in (("--keep", 0.01), ("--keep", 1)):
        with pytest.raises(hita.HitaError, match="--keep"):
            shown("--complete", "a.png", "--class", "3", *wrong)
    for wrong, message in ((("a.png",), "--class"), (("a.png", "--class", "0", "1"), "2 classes for 1"), (("c.png", "--class", "0"), "c.png")):
        with pytest.raises(hita.HitaError, match=message):
            shown("--complete", *wrong)


def test_kept_globals(shown, monkeypatch):
    seen, true = [], sample.decode
    monkeypatch.setattr(sample, "decode", lambda tokenizer, g, p, native: (seen.extend([g, p]), true(tokenizer, g, p, native))[1])
    pictures, columns = shown("--keep-globals", "--class", "2", "--num", 4)
    (same, globals_), (patches, same_patches) = (x.split(4) for x in seen)
    assert columns == 4 and torch.equal(pictures[0], pictures[4])      # the sample itself
    assert all(len(x.unique(dim=0)) == 1 for x in (same, same_patches)) and all(len(x.unique(dim=0)) == 4 for x in (globals_, patches))


def test_many_pictures_go_to_an_npz_file_whatever_the_number_of_processes(tmp_path):
    tokenizer, llama = save_tiny(tmp_path)
    for processes in (1, 2):
        result = script("sample.py", "--out", tmp_path, "--count", 130, "--npz", tmp_path / f"{processes}.npz", processes=processes)
        assert result.returncode == 0 and "130 pictures in" in result.stdout, result.stderr
    one, two = (np.load(tmp_path / f"{n}.npz")["arr_0"] for n in (1, 2))
    assert one.shape == (130, 16, 16, 3) and one.dtype == np.uint8 and np.array_equal(one, two) and np.array_equal(hita.read_npz(tmp_path / "1.npz"), one)
    sampler = hita.Sampler(llama, 64, 2.0)
    draw = lambda seed: sampler(torch.arange(64, 128) % 5, torch.Generator().manual_seed(seed))
    ids = draw(2654435761)                                             # class-balanced; a seed for each chunk
    assert not torch.equal(ids[1], draw(0)[1])
    difference = sample.decode(tokenizer, *ids, True).permute(0, 2, 3, 1).numpy().astype(int) - one[64:128]
    assert abs(difference).max() <= 1                                  # other threads and order of memory
    assert not list(tmp_path.glob("*.tmp*"))
    with pytest.raises(hita.HitaError, match="folder"):
        hita.PictureFile(tmp_path, 1, 16)


def test_distance_between_files_and_folders(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    (tmp_path / "b/deep").mkdir(parents=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"b/deep/{i}.png")
    np.savez(tmp_path / "c.npz", arr_0=255 - pixels)
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    safetensors.torch.save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "x.safetensors")
    def distance(a, b):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--fd", str(tmp_path / a), str(tmp_path / b), "--features", name, str(tmp_path / "x.safetensors")])
        sample.main()
        return float(capsys.readouterr().out.split("FD-DINOv2 ")[1].split()[0])
    assert distance("a.npz", "b") == pytest.approx(0, abs=1e-6) and distance("a.npz", "c.npz") > 1e-7
    np.savez(tmp_path / "wrong.npz", arr_0=pixels / 255)
    for wrong in ("wrong.npz", "nowhere", "x.safetensors"):
        with pytest.raises(hita.HitaError, match=wrong):
            distance("a.npz", wrong)


@pytest.mark.parametrize("flags", [["--num-global", 0, "--k", 0], ["--k", 0], ["--k", 6], ["--dino", "vit_small_patch14_reg4_dinov2.lvd142m", "--dino-dim", 384]])
def test_ablations_work_from_training_to_evaluation(train, flags, tmp_path, monkeypatch):
    if "--dino" in flags:
        safetensors.torch.save_file(timm.create_model(flags[1], num_classes=0).state_dict(), tmp_path / "dino.safetensors")
    dino = ["--dino-file", tmp_path / "dino.safetensors"] if "--dino" in flags else []
    train(train_tokenizer, "out", *RUN, *flags, *dino, "--gan-weight", 0, "--steps", 1)
    train(train_ar, "out", *SMALL_AR[:6], *RUN[-12:-2], *dino, "--steps", 1)
    for args in (["--eval", "--npz", "out/val"], ["--class", "1", "--num", 2], ["--complete", "data/val/class0/0.png", "--class", "1", "--num", 2]):
        module = train_tokenizer if "--eval" in args else sample
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
        monkeypatch.setattr(sys, "argv", ["x", "--out", "out", *map(str, args + (dino if module == sample else []))])
        module.main()
    line, = figures(tmp_path / "out/eval.jsonl")
    assert {"psnr", "ssim", "patch_use", "patch_ppl", "probe_patch", "probe_chance", "k", "dino"} <= set(line) and line["pictures"] == 30
    assert ("probe_global" in line and "global_use" in line) == (line["num_global"] > 0)
    originals, recon = (hita.read_npz(tmp_path / f"out/val-{kind}.npz") for kind in ("originals", "reconstructions"))
    assert originals.shape == recon.shape == (30, 24, 24, 3)
    val = hita.ImageFolder(tmp_path / "data", "val", 24)
    assert np.array_equal(originals[7], ((val[0, 7][0] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8))
