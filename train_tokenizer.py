"""Train the Hita tokenizer: images <-> global and patch token ids.

    python train_tokenizer.py                                    the demo: embedded emoji pictures, minutes on a laptop CPU
    torchrun --nproc_per_node 8 train_tokenizer.py --preset hita-v --data imagenet      the released model
    python train_tokenizer.py --steps 3000 --out out-long        the demo, longer
    python train_tokenizer.py --k 0 --out out-k0                 an ablation: globals may be ignored
    python train_tokenizer.py --resume                           go on with the run in out/
    python train_tokenizer.py --preset hita-u --init-from hita-u --data DIR      fine-tune the released Hita-U
    python train_tokenizer.py --preset hita-v --batch-size 32 --bench            speed and memory, with random weights
    python train_tokenizer.py --eval                             figures of the trained tokenizer, also added to out/eval.jsonl
    python train_tokenizer.py --eval hita-u --data imagenet --npz out/u          of a released one, and pictures for rFID

--data DIR holds train/<class>/<pictures> and, if there is a validation split, val/<class>/<pictures>.
The run directory gets tokenizer.pt (the newest state of the run), tokenizer.jsonl (one line of figures per log interval) and
tokenizer-<step>.png (originals beside reconstructions). SIGTERM or Ctrl-C: the step is finished, the run saved.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

import hita
from hita import option


@dataclass
class Training(hita.Settings):
    """The recipe. The defaults are the released one (50 epochs of ImageNet); one epoch is 5,004 steps there."""
    steps: int = option(250_200, "optimizer steps", high=10 ** 9)
    batch_size: int = option(256, "pictures per step, over all processes")
    lr: float = option(1e-4, "learning rate of generator and discriminator", 1e-12)
    lr_final: float = option(1e-4, "learning rate at the end of the generator's cosine schedule", 1e-12)
    warmup: int = option(20_016, "steps of linear warm-up of the generator", 0, 10 ** 9)
    clip: float = option(1.0, "gradient norm is clipped to this, separately for generator and discriminator", 1e-12)
    ema: float = option(0.9999, "decay of the averaged weights", 0, 0.999999)
    lpips_weight: float = option(1.0, "weight of the perceptual loss", 0)
    gan_weight: float = option(0.5, "weight of the adversarial loss", 0)
    gan_start: int = option(20_000, "step at which the discriminator and its loss come in", high=10 ** 9)
    gan_width: int = option(64, "channels of the discriminator's first layer", high=4096)
    crop_range: float = option(0.8, "augmentation: random crops show between this share of a picture's side and all of it", 0.01, 1)
    seed: int = option(0, "seed of weights, data order and augmentation", 0, 2 ** 32 - 1)
    log_every: int = option(100, "steps between log lines", high=10 ** 9)
    eval_every: int = option(5000, "steps between evaluations, pictures and checkpoints", high=10 ** 9)
    keep_every: int = option(50_000, "checkpoints of multiples of this step are kept, 0 keeps only the newest", 0, 10 ** 9)
    recompute: bool = option(False, "save memory: compute the conv nets' activations again in the backward pass")
    workers: int = option(8, "data loader processes; 0 loads in this one", 0, 1024)


RECIPES = {
    "hita-v": Training(),
    "hita-u": Training(),
    "emoji": Training(steps=1300, batch_size=16, lr=1e-3, lr_final=1e-4, warmup=50, ema=0.99, lpips_weight=0.0, gan_weight=0.03,
                      gan_start=1000, gan_width=32, crop_range=1.0, log_every=50, eval_every=650, keep_every=0, workers=0),
}


def parse_args():
    """Command line -> (arguments, tokenizer configuration, recipe, checkpoint to resume or None). Flags that are not given
    have the values of the checkpoint, without one those of the preset."""
    parser = hita.Parser(__doc__)
    preset = parser.add_choice("--preset", list(RECIPES), "emoji", "model and recipe to start from")
    parser.add_run("fine-tune: start from the weights of this file or released tokenizer (hita-v, hita-u), with the preset and "
                   "flags it was trained with [random weights]")
    parser.add_argument("--eval", nargs="?", const="", metavar="CHECKPOINT", help="evaluate this tokenizer, a file or hita-v or "
                        "hita-u, on the validation pictures and stop [tokenizer.pt in the run directory]")
    parser.add_argument("--npz", metavar="PREFIX", help="with --eval: write <PREFIX>-originals.npz and <PREFIX>-reconstructions.npz")
    parser.add_config("model", hita.TOKENIZERS[preset])
    parser.add_config("training", RECIPES[preset])
    args = parser.parse_args()
    hita.check(not args.npz or args.eval is not None, "--npz is for --eval")
    if getattr(args, "num_global", None) == 0 and not hasattr(args, "k"):
        args.k = 0  # without global tokens there is nothing to replace patches with
    cfg, recipe = hita.TOKENIZERS[preset], RECIPES[preset]
    saved = None if args.bench or args.eval is not None else hita.find_run(args, "tokenizer", Training)
    if saved and not hasattr(args, "preset"):
        cfg, recipe = saved["config"], saved["recipe"]
    return args, hita.override(cfg, args), hita.override(recipe, args), saved


def build(cfg: hita.TokenizerConfig, recipe: Training, device: torch.device, dino_file: str | None, init_from: str | None,
          pretrained: bool = True):
    """-> tokenizer, its EMA copy, discriminator, perceptual loss or None; the same weights in every process.
    pretrained=False gives DINOv2 and the perceptual loss random weights."""
    hita.check(cfg.image_size >= 24 or recipe.gan_weight == 0, f"the discriminator needs pictures of at least 24 pixels, "
               f"image_size is {cfg.image_size}; train with --gan-weight 0")
    torch.manual_seed(recipe.seed)
    tokenizer, discriminator = hita.HitaTokenizer(cfg), hita.PatchDiscriminator(recipe.gan_width)
    if init_from:
        data = hita.read_checkpoint(init_from, "tokenizer")
        hita.start_from(tokenizer, data, init_from)
        start_discriminator(discriminator, data.get("discriminator"), init_from)
    tokenizer, discriminator = (m.to(device, memory_format=torch.channels_last) for m in (tokenizer, discriminator))
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    if pretrained or not cfg.uses_dino:
        hita.attach_dino(tokenizer, dino_file)
    else:
        tokenizer.dino = hita.DINOv2(cfg.dino, pretrained=False)
    ema.dino = tokenizer.dino
    perceptual = hita.PerceptualLoss(pretrained).to(device) if recipe.lpips_weight > 0 else None
    torch.manual_seed(recipe.seed + hita.rank())  # dropout differs between the processes
    return tokenizer, ema, discriminator, perceptual


def start_discriminator(discriminator: hita.PatchDiscriminator, weights: dict | None, path: str) -> None:
    """Fine-tuning: take over the discriminator of a checkpoint where it is a PatchGAN. Raises HitaError for one of another
    width. (The released Hita-U was trained with a discriminator on DINO features, which is not part of this repository.)"""
    known = isinstance(weights, dict) and "main.0.weight" in weights
    if known:
        hita.load_weights(discriminator, {"ema": weights, "names": []}, f"the discriminator of {path}")
    if hita.rank() == 0:
        print("its PatchGAN discriminator too" if known else "it has no PatchGAN discriminator: a new one starts", flush=True)


def generator_losses(images: torch.Tensor, result: hita.TokenizerOutput, recipe: Training,
                     perceptual: hita.PerceptualLoss | None,
                     discriminator: hita.PatchDiscriminator | None) -> dict[str, torch.Tensor]:
    """The terms that the generator minimises, weighted; those that are switched off are left out."""
    losses = {"rec": hita.reconstruction_loss(images, result.recon), "codebook": result.codebook_loss}
    if result.feature_loss is not None:
        losses["feature"] = result.feature_loss
    if perceptual is not None:
        losses["lpips"] = recipe.lpips_weight * perceptual(images, result.recon)
    if discriminator is not None:
        losses["adv"] = recipe.gan_weight * hita.adversarial_loss(discriminator(result.recon))
    return losses


def discriminator_step(images: torch.Tensor, recon: torch.Tensor, judge: torch.nn.Module, optimizer: torch.optim.Optimizer,
                       recipe: Training) -> dict[str, torch.Tensor]:
    """One optimizer step of the discriminator -> its loss and mean logits."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        real, fake = judge(images), judge(recon)          # two passes: each has batch statistics of its own
        loss = hita.discriminator_loss(real, fake)
    optimizer.zero_grad()
    (recipe.gan_weight * loss).backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(judge.parameters(), recipe.clip)
    hita.careful_step(optimizer, loss, grad_norm)
    return {"disc": loss, "D(real)": real.mean(), "D(fake)": fake.mean(), "D(grad)": grad_norm}


@torch.no_grad()
def evaluate(ema: hita.HitaTokenizer, data: hita.ImageFolder, device: torch.device, picture: Path,
             perceptual: hita.PerceptualLoss | None = None, npz: list[hita.PictureFile] = (), workers: int = 0) -> dict[str, float]:
    """PSNR in dB, SSIM, LPIPS if there is a net for it, and use of both codebooks over the validation split, with the EMA
    weights, of 336 px pictures at 256 px; writes originals beside reconstructions to `picture` and to two .npz files."""
    loader = DataLoader(data, 16, sampler=[(0, i) for i in range(hita.rank(), len(data), hita.world())], num_workers=workers)
    total = torch.zeros(4, device=device)                                         # sums of PSNR, SSIM, LPIPS; number of pictures
    hits = torch.zeros(2, ema.cfg.codebook_size, device=device)                   # uses of each global and each patch code
    for i, (images, _) in enumerate(hita.bar(loader, "evaluating", hita.rank() == 0, 16)):
        images = images.to(device)
        out = ema(images)
        hits += both_counts(out, ema.cfg)
        pairs = [hita.at_published_size(x, antialias=True).clamp(-1, 1) for x in (images, out.recon.float())]
        lpips = perceptual(*pairs) if perceptual else hits.new_zeros(())
        figures = hita.psnr(*pairs).mean(), hita.ssim(*pairs).mean(), lpips, torch.ones_like(lpips)
        total += len(images) * torch.stack(figures)
        for file, pictures in zip(npz, pairs):
            file.put(16 * i, hita.to_uint8(pictures))
    total, hits = hita.all_sum(total), hita.all_sum(hits)
    if hita.rank() == 0:
        shown = torch.stack([data[0, i * len(data) // 24][0] for i in range(24)]).to(device)
        pairs = torch.stack([shown, ema(shown).recon], dim=1).flatten(0, 1)       # original, reconstruction, original, ...
        hita.save_grid(pairs, picture, columns=12)
    psnr, ssim, lpips, _ = (total / total[3]).tolist()
    return {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if perceptual else {}) | usage(hits)


@torch.no_grad()
def probes(tokenizer: hita.HitaTokenizer, train: hita.ImageFolder, val: hita.ImageFolder, device: torch.device,
           workers: int) -> dict[str, float]:
    """Top-1 accuracy on the validation split of linear classifiers of the quantized global and of the quantized patch tokens,
    fitted to up to 20,000 pictures of the training split, beside that of the most frequent class."""
    features, labels = {}, {}
    for split, data, every in (("train", train, -(-len(train) // 20_000)), ("val", val, 1)):
        loader = DataLoader(data, 16, sampler=[(0, i) for i in range(0, len(data), every)], num_workers=workers)
        parts = [(tokenizer.encode(images.to(device)), classes) for images, classes in hita.bar(loader, f"encoding {split}", scale=16)]
        global_ids, patch_ids = (torch.cat(ids) for ids in zip(*(ids for ids, _ in parts)))
        features[split] = {"patch": tokenizer.patch_quantizer.lookup(patch_ids).flatten(1)}     # (n, N * C)
        if tokenizer.cfg.num_global:
            features[split]["global"] = tokenizer.global_quantizer.lookup(global_ids).flatten(1)
        labels[split] = torch.cat([classes for _, classes in parts]).to(device)
    found = {f"probe_{kind}": hita.linear_probe(features["train"][kind], labels["train"], features["val"][kind], labels["val"],
                                                len(train.classes)) for kind in sorted(features["train"])}
    return found | {"probe_chance": (labels["val"] == labels["train"].mode().values).float().mean().item()}


def evaluate_checkpoint(args, workers: int, device: torch.device) -> None:
    """--eval: print all figures of a tokenizer and add them to eval.jsonl in the run directory."""
    hita.check(hita.world() == 1, "--eval works in one process; leave out torchrun")
    path, out = args.eval or str(Path(args.out) / "tokenizer.pt"), hita.run_directory(args.out)
    saved = hita.read_checkpoint(path, "tokenizer")
    tokenizer = hita.load_model(saved, path).to(device, memory_format=torch.channels_last)
    hita.attach_dino(tokenizer, args.dino_file or saved.get("files", {}).get("dino_file"))
    train = hita.ImageFolder(args.data or saved.get("files", {}).get("data") or hita.embedded_data(), "train", tokenizer.cfg.image_size)
    val, perceptual = hita.validation_data(train), None
    try:
        perceptual = hita.PerceptualLoss().to(device)
    except hita.HitaError as e:
        print(f"without {e}")
    size, kinds = hita.published_size(tokenizer.cfg.image_size), ("originals", "reconstructions") if args.npz else ()
    npz = [hita.PictureFile(Path(f"{args.npz}-{kind}.npz"), len(val), size) for kind in kinds]
    figures = evaluate(tokenizer, val, device, out / "eval.png", perceptual, npz, workers)
    for file in npz:
        file.close()
    line = {"tokenizer": path, "step": saved.get("step"), "num_global": tokenizer.cfg.num_global, "k": tokenizer.cfg.k,
            "dino": tokenizer.cfg.dino, "pictures": len(val), **figures}
    if val.folder == train.folder:
        print("without probes: there are no validation pictures, and these are some of the training pictures")
    else:
        line |= probes(tokenizer, train, val, device, workers)
    print(" ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items()))
    with open(out / "eval.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def both_counts(out: hita.TokenizerOutput, cfg: hita.TokenizerConfig) -> torch.Tensor:
    """Uses of each global and each patch code (2, V)."""
    return torch.stack([hita.count_ids(ids, cfg.codebook_size) for ids in (out.global_ids, out.patch_ids)])


def usage(hits: torch.Tensor) -> dict[str, float]:
    """Hits (2, V) of global and patch codes -> share in use and perplexity of each codebook that is used at all."""
    figures = {}
    for name, h in zip(("global", "patch"), hits):
        if h.sum() > 0:
            figures[f"{name}_use"], figures[f"{name}_ppl"] = hita.usage_and_perplexity(h)
    return figures


def make_step(cfg: hita.TokenizerConfig, recipe: Training, compiled: bool, tokenizer, ema, discriminator, perceptual):
    """-> the optimizers of tokenizer and discriminator, and a function (step, images) -> (figures, uses of codes (2, V)) that
    trains both models for a step."""
    for level in (*tokenizer.encoder.levels, *tokenizer.decoder.levels):
        level.recompute = recipe.recompute
    parts = [tokenizer.encoder, *([tokenizer.extractor, tokenizer.fusion] if cfg.num_global else []), tokenizer.decoder,
             tokenizer.dino, discriminator, perceptual]  # not the quantizers, which stay in float32
    for part in filter(None, parts if compiled else []):
        part.compile()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    model, judge = tokenizer, discriminator
    if hita.world() > 1:
        model, judge = DDP(tokenizer, broadcast_buffers=False), DDP(discriminator, broadcast_buffers=False)
    tokenizer.train()

    def train_step(step: int, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = hita.learning_rate(step, recipe.steps, recipe.warmup, recipe.lr, recipe.lr_final)
        adversarial = step >= recipe.gan_start and recipe.gan_weight > 0

        # generator
        discriminator.requires_grad_(False)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            result = model(images)
            losses = generator_losses(images, result, recipe, perceptual, discriminator if adversarial else None)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), recipe.clip)
        hita.careful_step(optimizer, loss, grad_norm)
        hita.update_ema(ema, tokenizer, recipe.ema)
        metrics = {"loss": loss, **losses, "grad": grad_norm}

        # discriminator
        if adversarial:
            discriminator.requires_grad_(True)
            metrics |= discriminator_step(images, result.recon.detach(), judge, optimizer_d, recipe)
        return metrics, both_counts(result, cfg)

    return optimizer, optimizer_d, train_step


def bench(args, cfg: hita.TokenizerConfig, recipe: Training, device: torch.device) -> None:
    """Print the speed of encoding, decoding and training with random weights and pictures, LPIPS and discriminator at work."""
    models = build(cfg, recipe, device, None, None, pretrained=False)
    *_, train_step = make_step(cfg, recipe, hita.compiled(args, device), *models)
    B, ema = recipe.batch_size, models[1]
    images = (2 * torch.rand(B, 3, cfg.image_size, cfg.image_size, device=device) - 1).to(memory_format=torch.channels_last)
    title = f"{args.preset if hasattr(args, 'preset') else 'emoji'}, {cfg.image_size} px, batch {B}"
    hita.measure(f"encode {title}, float32", lambda: ema.encode(images), device, B, count_flops=True)
    ids = ema.encode(images)
    hita.measure(f"decode {title}, float32", lambda: ema.decode(*ids), device, B, count_flops=True)
    hita.measure(f"train {title}, {'bfloat16' if images.is_cuda else 'float32'}", lambda: train_step(recipe.gan_start, images),
                 device, B, count_flops=True)


def main():
    args, cfg, recipe, saved = parse_args()
    device = hita.start(args.device)
    if args.bench:
        return bench(args, cfg, recipe, device)
    if args.eval is not None:
        return evaluate_checkpoint(args, recipe.workers, device)
    train = hita.ImageFolder(args.data or hita.embedded_data(), "train", cfg.image_size, True, recipe.crop_range, recipe.seed)
    val = hita.validation_data(train)
    if saved:
        hita.check_settings(saved, cfg, recipe, train)
    models = tokenizer, ema, discriminator, _ = build(cfg, recipe, device, args.dino_file, None if saved else args.init_from)
    out = hita.run_directory(args.out)
    optimizer, optimizer_d, train_step = make_step(cfg, recipe, hita.compiled(args, device), *models)
    log = hita.Log(out / "tokenizer.jsonl", recipe.steps, device)
    parts = {"model": tokenizer, "ema": ema, "discriminator": discriminator, "optimizer": optimizer, "optimizer_d": optimizer_d,
             "log": log, "random": hita.RandomState(device)}
    facts = {"config": dataclasses.asdict(cfg), "recipe": dataclasses.asdict(recipe), "pictures": train.fingerprint(),
             "files": {"data": args.data, "dino_file": args.dino_file}}
    order = hita.Shuffled(len(train), recipe.batch_size, recipe.seed, first_step=saved["step"] if saved else 0)
    batches = iter(DataLoader(train, batch_sampler=order, num_workers=recipe.workers, worker_init_fn=hita.ignore_signals,
                              pin_memory=device.type == "cuda"))
    if hita.rank() == 0:
        print(f"tokenizer {sum(p.numel() for p in tokenizer.parameters()) / 1e6:.1f}M parameters, {len(train)} pictures, "
              f"{device} x {hita.world()}\n{cfg}\n{recipe}", flush=True)
    look = lambda step: evaluate(ema, val, device, out / f"tokenizer-{step:06d}.png")
    for step in hita.steps(out, "tokenizer", recipe, parts, facts, saved, look, usage):
        images = next(batches)[0].to(device, non_blocking=True, memory_format=torch.channels_last)   # (B, 3, H, W)
        log.add(step, *train_step(step, images))


if __name__ == "__main__":
    hita.run(main)
