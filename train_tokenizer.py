"""Train the Hita tokenizer: images <-> global and patch token ids.

    python train_tokenizer.py                                  the demo, minutes on a laptop
    torchrun --nproc_per_node 8 train_tokenizer.py --preset hita-v --data imagenet
    python train_tokenizer.py --resume                         go on with the run in out/
    python train_tokenizer.py --preset hita-u --init-from hita-u --data DIR         fine-tune
    python train_tokenizer.py --eval                           figures, also in out/eval.jsonl

--data DIR holds train/<class>/<pictures> and, if there is a validation split, val/<class>/...
The run directory gets tokenizer.pt (the newest state), tokenizer.jsonl (a line of figures per log
interval) and tokenizer-<step>.png (originals beside reconstructions). Ctrl-C or SIGTERM saves.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import hita


@dataclass
class Training:
    """The recipe. The defaults are the released one, 50 epochs of 5,004 steps on ImageNet."""
    steps: int = 250_200  # optimizer steps
    batch_size: int = 256  # pictures per step, over all processes
    lr: float = 1e-4  # learning rate of generator and discriminator
    lr_final: float = 1e-4  # where the generator's cosine schedule ends
    warmup: int = 20_016  # steps of linear warm-up of the generator
    clip: float = 1.0  # gradient norm of each of the two is clipped to this
    ema: float = 0.9999  # decay of the averaged weights
    lpips_weight: float = 1.0  # weight of the perceptual loss
    gan_weight: float = 0.5  # weight of the adversarial loss
    gan_start: int = 20_000  # step at which the discriminator comes in
    gan_width: int = 64  # channels of the discriminator's first layer
    crop_range: float = 0.8  # random crops show between this share of a picture and all of it
    seed: int = 0  # seed of weights, data order, augmentation and dropout
    log_every: int = 100  # steps between log lines
    eval_every: int = 5000  # steps between evaluations, pictures and checkpoints
    keep_every: int = 50_000  # checkpoints of multiples of this stay; 0 keeps only the newest
    recompute: bool = False  # save memory: compute the conv nets' activations twice
    workers: int = 8  # data loader processes; 0 loads in this one


RECIPES = {
    "hita-v": Training(), "hita-u": Training(),
    "emoji": Training(
        steps=500, batch_size=28, lr=1.5e-3, warmup=50, ema=0.99, lpips_weight=0.0, gan_weight=0.02,
        gan_start=460, gan_width=32, crop_range=1.0, log_every=20, eval_every=500, keep_every=0,
        workers=0)}
RECIPES["prints"] = dataclasses.replace(
    RECIPES["emoji"], steps=2041, batch_size=64, gan_start=1796, eval_every=500, workers=4)


def main():
    # ---- settings: of the checkpoint or else the preset, then the flags
    parser = hita.Parser(__doc__)
    parser.add_run(list(RECIPES))
    parser.add_argument("--eval", nargs="?", const="", metavar="FILE", help="evaluate a tokenizer "
                        "on the validation pictures and stop [tokenizer.pt in the run directory]")
    parser.add_argument("--npz", metavar="PREFIX", help="with --eval: write "
                        "PREFIX-originals.npz and PREFIX-reconstructions.npz")
    parser.add_settings(hita.TOKENIZERS["emoji"])
    parser.add_settings(RECIPES["emoji"])
    args = parser.parse_args()
    hita.check(not args.npz or args.eval is not None, "--npz is for --eval")
    if args.eval is not None:
        return evaluate_checkpoint(args)
    if args.export:
        return hita.export(args, "tokenizer")
    saved, preset = hita.find_run(args, "tokenizer", Training), args.preset or "emoji"
    cfg, recipe = hita.TOKENIZERS[preset], RECIPES[preset]
    if saved and not args.preset:
        cfg, recipe = saved["config"], saved["recipe"]
    if getattr(args, "num_global", None) == 0 and not hasattr(args, "k"):
        args.k = 0  # without global tokens there is nothing to replace patches with
    cfg, recipe = hita.override(cfg, args), hita.override(recipe, args)
    hita.check(cfg.image_size >= 24 or recipe.gan_weight == 0, "the discriminator needs pictures "
               f"of at least 24 pixels, image_size is {cfg.image_size}; train with --gan-weight 0")

    # ---- data and models, the same in every process
    device = hita.set_up_device(args.device)
    torch.backends.cudnn.benchmark = True
    earlier = saved["made_from"] if saved else {}
    made_from, root = hita.sources(args, earlier)
    train = hita.Pictures(root, "train", cfg.image_size, True, recipe.crop_range, recipe.seed)
    val = hita.validation_pictures(train)
    made_from |= {"pictures": len(train), "preset": args.preset or earlier.get("preset", preset)}
    if saved:
        hita.check_resume(saved, cfg, recipe, len(train))
    torch.manual_seed(recipe.seed)
    tokenizer, discriminator = hita.HitaTokenizer(cfg), hita.PatchDiscriminator(recipe.gan_width)
    if args.init_from and not saved:
        start_from(tokenizer, discriminator, args.init_from)
    tokenizer.to(device, memory_format=torch.channels_last)
    discriminator.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    ema.attach_dino(hita.add_dino(tokenizer, made_from["dino_file"]).dino)
    perceptual = hita.PerceptualLoss().to(device) if recipe.lpips_weight else None

    # ---- optimizers; what is saved is what has a state
    adam = partial(torch.optim.Adam, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    optimizer, optimizer_d = adam(tokenizer.parameters()), adam(discriminator.parameters())
    parts = {"model": tokenizer, "ema": ema, "discriminator": discriminator,
             "optimizer": optimizer, "optimizer_d": optimizer_d}
    start = hita.restore(saved, parts)
    if recipe.recompute:
        for level in (*tokenizer.encoder.levels, *tokenizer.decoder.levels):
            level.forward = partial(checkpoint, level.forward, use_reentrant=False)
    if hita.use_compile(args.compile, made_from["preset"], device):
        compile_parts(tokenizer, discriminator, perceptual)
    model, critic = hita.distribute(tokenizer), hita.distribute(discriminator)
    tokenizer.train()

    # ---- the loop; random numbers and data follow from (seed, step)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    log, stop = hita.Log(out / "tokenizer.jsonl", recipe.steps, start), hita.Stop()
    todo = range(start + 1, recipe.steps + 1)
    order = (hita.batch(step, len(train), recipe.batch_size, recipe.seed) for step in todo)
    loader = DataLoader(train, batch_sampler=order, num_workers=recipe.workers,
                        worker_init_fn=hita.ignore_signals, pin_memory=device.type == "cuda")
    parameters = sum(p.numel() for p in tokenizer.parameters())
    hita.say(f"tokenizer of {parameters / 1e6:.1f}M parameters, {len(train)} pictures in "
             f"{train.root}, {device} x {hita.world()}\n{cfg}\n{recipe}")
    for step, (images, _) in zip(todo, loader):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        hita.seed_step(recipe.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = hita.learning_rate(step, recipe)
        adversarial = recipe.gan_weight > 0 and step >= recipe.gan_start

        # generator; the discriminator judges, but takes no gradient
        discriminator.requires_grad_(False)
        with hita.autocast(device):
            result = model(images)
            losses = generator_losses(images, result, recipe, perceptual,
                                      discriminator if adversarial else None)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        grad_norm = hita.optimizer_step(optimizer, tokenizer, recipe.clip)
        hita.update_ema(ema, tokenizer, recipe.ema)
        hita.check(not losses.keys() & {"loss", "grad"}, "rename it: the log has a loss and a grad")
        log.add({"loss": loss, **losses, "grad": grad_norm})
        log.add(id_counts(result.global_ids, result.patch_ids, cfg))

        # discriminator, on the same reconstructions
        if adversarial:
            discriminator.requires_grad_(True)
            with hita.autocast(device):
                # two passes: each has batch statistics of its own
                real, fake = critic(images), critic(result.recon.detach())
                loss = hita.discriminator_loss(real, fake)
            optimizer_d.zero_grad()
            (recipe.gan_weight * loss).backward()
            hita.optimizer_step(optimizer_d, discriminator, recipe.clip)
            log.add({"disc": loss, "D(real)": real.mean(), "D(fake)": fake.mean()})

        # what is due after this step
        stopping = stop.asked()
        due = step % recipe.eval_every == 0 or step == recipe.steps
        if step % recipe.log_every == 0 or due or stopping:
            log.write(step, recipe.batch_size)
        if due or stopping or (recipe.keep_every and step % recipe.keep_every == 0):
            hita.save_run(out, "tokenizer", step, cfg, recipe, parts, made_from=made_from)
        if stopping:
            return hita.say(f"stopped after step {step}: continue with --resume")
        if due:
            picture = out / f"tokenizer-{step:06d}.png"
            log.line(step, evaluate(ema, val, picture, recipe.workers))


def generator_losses(images: Tensor, result: hita.TokenizerOutput, recipe: Training,
                     perceptual: nn.Module | None, critic: nn.Module | None) -> dict[str, Tensor]:
    """The terms that the generator minimises, weighted; those that are off are left out."""
    rec = hita.reconstruction_loss(images, result.recon)
    losses = {"rec": rec, "codebook": result.codebook_loss}
    if result.feature_loss is not None:
        losses["feature"] = result.feature_loss
    if perceptual is not None:
        losses["lpips"] = recipe.lpips_weight * perceptual(images, result.recon)
    if critic is not None:
        losses["adv"] = recipe.gan_weight * hita.adversarial_loss(critic(result.recon))
    return losses


def id_counts(global_ids: Tensor, patch_ids: Tensor, cfg: hita.TokenizerConfig) -> dict:
    """Counts (M, V) and (N, V) of ids at each position; without globals those of patches only."""
    counts = {"patch": hita.count_ids(patch_ids, cfg.patch_codebook_size)}
    if cfg.num_global:
        counts["global"] = hita.count_ids(global_ids, cfg.global_codebook_size)
    return counts


def compile_parts(tokenizer: hita.HitaTokenizer, *others: nn.Module | None) -> None:
    """Compile all but centring and quantizers, which stay in float32 and count codes."""
    parts = [tokenizer.encoder, tokenizer.decoder, tokenizer.dino, *others]
    if tokenizer.cfg.num_global:
        parts += [tokenizer.extractor, tokenizer.fusion]
    for norm in tokenizer.modules():
        if isinstance(norm, nn.GroupNorm) and norm.weight.is_cuda:
            norm.forward = partial(hita.norm_by_channel, norm)
    for part in filter(None, parts):
        part.compile()


def start_from(tokenizer: hita.HitaTokenizer, discriminator: nn.Module, path: str) -> None:
    """Fine-tuning: weights of a checkpoint or released model, and its PatchGAN if it has one."""
    data, cfg = hita.read_checkpoint(path, "tokenizer"), tokenizer.cfg
    hita.check_start(path, data["config"], cfg, hita.TOKENIZERS)
    weights, grid = dict(data["ema"]), data["config"].grid
    if grid != cfg.grid and cfg.num_global:
        for name in ("extractor.positions", "fusion.positions"):
            weights[name] = hita.resize_positions(weights[name].float(), cfg.grid, cfg.grid)
        hita.say(f"{path} has positions for {grid} x {grid} patches: resized to {cfg.grid}")
    hita.load_weights(tokenizer, weights, path)
    if "main.0.weight" in data.get("discriminator", {}):
        width = len(data["discriminator"]["main.0.weight"])
        hita.check(width == discriminator.main[0].out_channels, f"{path} needs --gan-width {width}")
        hita.load_weights(discriminator, data["discriminator"], path)
    else:
        hita.say(f"{path} has no PatchGAN discriminator: a new one starts")


@torch.no_grad()
def evaluate(tokenizer: hita.HitaTokenizer, data: hita.Pictures, picture: Path, workers: int,
             perceptual: nn.Module | None = None, arrays: list[np.ndarray] = (),
             others: Tensor | None = None) -> dict[str, float]:
    """PSNR in dB, with a net for it LPIPS; called train_... where there are no validation pictures.

    others: global ids (n, M) of other pictures; then also swap, the PSNR with these. It is the
    plain PSNR where globals hold nothing, and where the decoder does not listen to them. Pictures
    of 336 px are judged at 256, as in the released protocol. Writes originals beside
    reconstructions to `picture` and, where two arrays are given, fills these with both."""
    device = next(tokenizer.parameters()).device
    mine = list(range(hita.rank(), len(data), hita.world()))
    measured = {"psnr": True, "lpips": perceptual is not None, "swap": others is not None}
    sums = {name: torch.zeros((), device=device) for name, x in measured.items() if x}
    loader = DataLoader(data, 16, sampler=[(0, i) for i in mine], num_workers=workers,
                        worker_init_fn=hita.ignore_signals)

    # encoding in float32, or some ids would be others; the decoder may work in bfloat16
    progress = tqdm(loader, "evaluating", disable=hita.rank() > 0, leave=False)
    for n, (images, _) in enumerate(progress):
        images, these = images.to(device, memory_format=torch.channels_last), mine[16 * n:][:16]
        global_ids, patch_ids = tokenizer.encode(images)
        with hita.autocast(device):
            recon = tokenizer.decode(global_ids, patch_ids)
            mixed = None if others is None else tokenizer.decode(others[these], patch_ids)
        images, recon = as_compared(images), as_compared(recon)
        sums["psnr"] += hita.psnr(images, recon).sum()
        if perceptual is not None:
            sums["lpips"] += perceptual(images, recon) * len(images)
        if mixed is not None:
            sums["swap"] += hita.psnr(images, as_compared(mixed)).sum()
        for array, pictures in zip(arrays, (images, recon)):
            array[these] = hita.to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy()

    mark = "train_" if data.split == "train" else ""
    # means over all processes
    figures = {mark + name: hita.all_sum(x).item() / len(data) for name, x in sums.items()}
    if hita.rank() == 0:
        shown = []
        for i in range(24):  # one by one, since large pictures need much memory
            image = data[0, i * len(data) // 24][0][None].to(device)
            shown += [image, tokenizer.decode(*tokenizer.encode(image))]
        hita.picture_grid(torch.cat(shown), columns=12).save(picture)
    return figures


def as_compared(images: Tensor) -> Tensor:
    """Pictures as they are compared: 8 bits, and those of 336 px shrunk to 256 like PIL does."""
    if images.shape[-1] != 336:
        return images.float().clamp(-1, 1)
    images = hita.to_uint8(images) / 127.5 - 1
    return F.interpolate(images, 256, mode="bicubic", antialias=True).clamp(-1, 1)


def evaluate_checkpoint(args) -> None:
    """--eval: print all figures of a tokenizer and add them to eval.jsonl in the run directory."""
    path, out = args.eval or f"{args.out}/tokenizer.pt", Path(args.out)
    device, workers = hita.set_up_device(args.device), getattr(args, "workers", 0)
    hita.check(hita.world() == 1, "--eval works in one process: leave out torchrun")
    files = [Path(f"{args.npz}-{x}.npz") for x in ("originals", "reconstructions") if args.npz]
    for file in (out / "eval.png", out / "eval.jsonl", *files):
        hita.check_writable(file)
    tokenizer = hita.load_tokenizer(path).to(device, memory_format=torch.channels_last)
    (made_from, root), cfg = hita.sources(args, tokenizer.made_from), tokenizer.cfg
    hita.add_dino(tokenizer, made_from["dino_file"])
    train = hita.Pictures(root, "train", cfg.image_size)
    val, perceptual = hita.validation_pictures(train), None
    try:
        if getattr(args, "lpips_weight", 1):
            perceptual = hita.PerceptualLoss().to(device)
    except hita.HitaError as e:
        print(f"without LPIPS: {e}")
    out.mkdir(parents=True, exist_ok=True)
    size = 256 if cfg.image_size == 336 else cfg.image_size
    arrays = [hita.picture_array(file, len(val), size) for file in files]

    # swap is measured with the globals of the picture half the split further on
    found = encode_all(tokenizer, val, 1, workers)
    others = found[1].roll(len(val) // 2, dims=0) if cfg.num_global else None
    figures = evaluate(tokenizer, val, out / "eval.png", workers, perceptual, arrays, others)
    del arrays
    for file in files:
        hita.pack_pictures(file)
    known = encode_all(tokenizer, train, -(-len(train) // 20_000), workers)
    for name, counts in id_counts(*known[1:], cfg).items():
        figures |= hita.usage(name, counts)
    if val.split != "train":  # or probes would be judged on what they were fitted to
        figures |= probes(tokenizer, known, found)
    line = {"tokenizer": str(path), "M": cfg.num_global, "k": cfg.k, "dino": cfg.dino,
            "pictures": len(val), **{name: round(value, 4) for name, value in figures.items()}}
    print(" ".join(f"{name} {value}" for name, value in line.items()))
    with open(out / "eval.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def encode_all(tokenizer: hita.HitaTokenizer, data: hita.Pictures, every: int,
               workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """One of `every` pictures, plain -> classes (n,), global ids (n, M), patch ids (n, N)."""
    device = next(tokenizer.parameters()).device
    items = [(0, i) for i in range(0, len(data), every)]
    rows = []
    loader = DataLoader(data, 16, sampler=items, num_workers=workers)
    for images, classes in tqdm(loader, f"encoding {data.split}", leave=False):
        rows.append((classes.to(device), *tokenizer.encode(images.to(device))))
    return tuple(map(torch.cat, zip(*rows)))


def probes(tokenizer: hita.HitaTokenizer, train: tuple, val: tuple) -> dict[str, float]:
    """Both as encode_all gives them -> the share of val whose class a linear classifier, fitted to
    train, finds in the quantized tokens; by chance it is the share of the most frequent class."""
    figures = {"probe_chance": (val[0] == train[0].mode().values).float().mean().item()}
    kinds = [("patch", tokenizer.patch_quantizer, 2)]
    if tokenizer.cfg.num_global:
        kinds.append(("global", tokenizer.global_quantizer, 1))
    for name, quantizer, place in kinds:
        x, val_x = (quantizer.lookup(some[place]).detach().flatten(1) for some in (train, val))
        guess = linear_probe(x, train[0], val_x)
        figures[f"probe_{name}"] = (guess == val[0]).float().mean().item()
    return figures


def linear_probe(x: Tensor, y: Tensor, val_x: Tensor, decay: float = 0.1) -> Tensor:
    """Classes (m,) that a linear classifier fitted to x (n, D), y (n,) finds for val_x (m, D): a
    ridge regression of standardised features onto the classes as 0 and 1."""
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, val_x = (x - mean) / std, (val_x - mean) / std
    classes = F.one_hot(y).type_as(x)  # (n, classes)
    share = classes.mean(dim=0)
    ridge = x.T @ x / len(x) + decay * torch.eye(x.shape[1], device=x.device)
    W = torch.linalg.solve(ridge, x.T @ (classes - share) / len(x))  # (D, classes)
    return (val_x @ W + share).argmax(dim=1)


if __name__ == "__main__":
    hita.run_script(main, "--compile (where it is not on), --recompute, a smaller --batch-size")
