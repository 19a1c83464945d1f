"""Train the Hita tokenizer: images <-> global and patch token ids.

    python train_tokenizer.py                                  the demo, minutes on a laptop
    torchrun --nproc_per_node 8 train_tokenizer.py --preset hita-v --data imagenet
    python train_tokenizer.py --resume                         go on with the run in out/
    python train_tokenizer.py --init-from hita-u --data DIR    fine-tune
    python train_tokenizer.py --eval                           figures, also in out/eval.jsonl

--data DIR holds train/<class>/<pictures> and, if there is a validation split, val/<class>/...
The run directory gets tokenizer.pt (the newest state), tokenizer.jsonl (a line of figures per log
interval) and tokenizer-<step>.png (originals beside reconstructions). Ctrl-C or SIGTERM saves.
A run goes on with the command that started it and --resume.
"""

import copy
import json
from dataclasses import dataclass, replace
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
    ema: float = 0.9999  # decay of the averaged weights, at first (1 + step) / (10 + step)
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
    "hita-v": Training(),
    "hita-u": Training(),
    "emoji": Training(
        steps=500, batch_size=28, lr=1.5e-3, warmup=50, ema=0.99, lpips_weight=0.0, gan_weight=0.02,
        gan_start=460, gan_width=32, crop_range=1.0, log_every=20, eval_every=500, keep_every=0,
        workers=0),
}
RECIPES["prints"] = replace(
    RECIPES["emoji"], steps=2041, batch_size=64, gan_start=1796, eval_every=500, workers=4)


def main():
    args = parse_args()
    if args.eval is not None:
        return evaluate_checkpoint(args)
    if args.export is not None:
        return hita.export(args.export, Path(args.out, "tokenizer.pt"), "tokenizer")
    run = set_up(args)
    cfg, recipe, device, out = run.cfg, run.recipe, run.device, run.out
    tokenizer, discriminator, ema = run.tokenizer, run.discriminator, run.ema
    model, d_model = hita.distribute(tokenizer), hita.distribute(discriminator)
    tokenizer.train()

    log = hita.Log(out / "tokenizer.jsonl", recipe.steps, run.start)
    steps = range(run.start + 1, recipe.steps + 1)
    with hita.Stop() as stop:
        for step, (images, _) in zip(steps, batches(run, steps)):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            hita.seed_step(recipe.seed, step)
            lr = hita.learning_rate(step, recipe)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            adversarial = recipe.gan_weight > 0 and step >= recipe.gan_start

            # The generator. The discriminator judges its pictures, but its own weights get no
            # gradient here, so it is called without DDP.
            discriminator.requires_grad_(False)
            with hita.autocast(device):
                result = model(images)
                losses = generator_losses(images, result, recipe, run.perceptual,
                                          discriminator if adversarial else None)
            loss = sum(losses.values())
            run.optimizer.zero_grad()
            loss.backward()
            grad_norm = hita.optimizer_step(run.optimizer, tokenizer, recipe.clip)
            tokenizer.revive(result)
            hita.update_ema(ema, tokenizer, recipe.ema, step)
            log.add({"loss": loss, **losses, "grad": grad_norm})
            for name, counts in id_counts(result.global_ids, result.patch_ids, cfg).items():
                log.count(name, counts)

            # The discriminator, on the same reconstructions.
            if adversarial:
                discriminator.requires_grad_(True)
                with hita.autocast(device):
                    # Two passes, so that each has batch statistics of its own.
                    real, fake = d_model(images), d_model(result.recon.detach())
                    loss = hita.discriminator_loss(real, fake)
                run.optimizer_d.zero_grad()
                (recipe.gan_weight * loss).backward()
                grad_norm = hita.optimizer_step(run.optimizer_d, discriminator, recipe.clip)
                log.add({"D loss": loss, "D(real)": real, "D(fake)": fake, "D grad": grad_norm})

            # What is due after this step. Writing the log asks whether all was finite.
            stopping = stop.asked()
            due = step % recipe.eval_every == 0 or step == recipe.steps
            kept = recipe.keep_every > 0 and step % recipe.keep_every == 0
            if step % recipe.log_every == 0 or due or kept or stopping:
                log.write(step, recipe.batch_size, lr)
            if due or kept or stopping:
                hita.save_run(out, "tokenizer", step, cfg, recipe, run.parts, **run.sources)
            if stopping:
                return hita.print_once(f"stopped after step {step}: continue with --resume")
            if due:
                picture = out / f"tokenizer-{step:06d}.png"
                log.line(step, evaluate(ema, run.val, picture, recipe.workers))


def generator_losses(images: Tensor, result: hita.TokenizerOutput, recipe: Training,
                     perceptual: nn.Module | None,
                     discriminator: nn.Module | None) -> dict[str, Tensor]:
    """The terms that the generator minimises, weighted. Those that are off are left out.
    A loss of your own is one more key; the log shows it under this name."""
    rec = hita.reconstruction_loss(images, result.recon)
    losses = {"rec": rec, "codebook": result.codebook_loss}
    if result.feature_loss is not None:
        losses["feature"] = result.feature_loss
    if perceptual is not None:
        losses["lpips"] = recipe.lpips_weight * perceptual(images, result.recon)
    if discriminator is not None:
        logits = discriminator(result.recon)
        losses["adv"] = recipe.gan_weight * hita.adversarial_loss(logits)
    return losses


def id_counts(global_ids: Tensor, patch_ids: Tensor, cfg: hita.TokenizerConfig) -> dict:
    """Counts (M, V) and (N, V) of ids at each position; without globals those of patches only."""
    counts = {"patch": hita.count_ids(patch_ids, cfg.patch_codebook_size)}
    if cfg.num_global > 0:
        counts["global"] = hita.count_ids(global_ids, cfg.global_codebook_size)
    return counts


# ---- Setting up ----------------------------------------------------------------------------------

@dataclass
class Run:
    """What the loop works with."""
    cfg: hita.TokenizerConfig
    recipe: Training
    device: torch.device
    out: Path
    train: hita.Pictures
    val: hita.Pictures
    sources: dict  # where pictures and DINOv2 come from, for the checkpoint
    tokenizer: hita.HitaTokenizer
    ema: hita.HitaTokenizer
    discriminator: hita.PatchDiscriminator
    perceptual: hita.PerceptualLoss | None
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    parts: dict  # what is saved: all that has a state
    start: int  # steps done


def parse_args():
    """The command line."""
    parser = hita.Parser(__doc__)
    parser.add_run(list(RECIPES))
    parser.add_argument("--eval", nargs="?", const="", metavar="FILE", help="evaluate a tokenizer "
                        "on the validation pictures and stop [tokenizer.pt in the run directory]")
    parser.add_argument("--npz", metavar="PREFIX", help="with --eval: write "
                        "PREFIX-originals.npz and PREFIX-reconstructions.npz")
    parser.add_settings(hita.TOKENIZERS["emoji"])
    parser.add_settings(RECIPES["emoji"])
    args = parser.parse_args()
    hita.check(args.npz is None or args.eval is not None, "--npz is for --eval")
    return args


def choose_settings(args, saved: dict | None, source: dict | None) -> tuple:
    """The settings of the tokenizer and of its training, with the flags that were given.

    A resumed run has those of its checkpoint, and of these only the recipe may change. A run that
    starts from weights has the settings of these, of which some may change, and the recipe of the
    preset with these settings."""
    if saved:
        cfg = hita.TokenizerConfig(**saved["config"])
        recipe = Training(**saved["recipe"])
        # These decide the order of the data, the crops and the shape of the discriminator.
        fixed = {"seed", "batch_size", "crop_range", "gan_width"}
        why = "this run", "start another run with another --out"
        return (hita.choose(cfg, args, set(vars(cfg)), *why),
                hita.choose(recipe, args, fixed, *why))

    if source:
        cfg = hita.TokenizerConfig(**source["config"])
        same = [name for name, preset in hita.TOKENIZERS.items() if preset == cfg]
        recipe = RECIPES[args.preset or (same[0] if same else "emoji")]
        fixed = set(vars(cfg)) - {"image_size", "k", "dropout", "beta"}
        cfg = hita.choose(cfg, args, fixed, args.init_from, "start without --init-from")
        return cfg, hita.choose(recipe, args)

    preset = args.preset or "emoji"
    # Without global tokens there is nothing that could replace patches.
    if getattr(args, "num_global", None) == 0:
        args.k = getattr(args, "k", 0)
    return hita.choose(hita.TOKENIZERS[preset], args), hita.choose(RECIPES[preset], args)


def set_up(args) -> Run:
    """Everything before the first step: settings, pictures, models, optimizers."""
    device = hita.set_up_device(args.device)
    torch.backends.cudnn.benchmark = True
    saved = hita.find_run(args.out, "tokenizer", args.resume)
    source = None
    if args.init_from is not None and not saved:
        source = hita.read_checkpoint(args.init_from, "tokenizer")
    cfg, recipe = choose_settings(args, saved, source)
    hita.check(cfg.image_size >= 24 or recipe.gan_weight == 0,
               f"the discriminator needs pictures of at least 24 pixels, image_size is "
               f"{cfg.image_size}: train with --gan-weight 0")
    warn_of_short(recipe)
    out = hita.make_folder(args.out)

    # The pictures, and where they and DINOv2 come from.
    recorded = saved or {"data": "embedded", "dino_file": None}
    sources, root = hita.find_sources(args, recorded)
    train = hita.Pictures(root, "train", cfg.image_size, augment=True,
                          crop_range=recipe.crop_range, seed=recipe.seed)
    val = hita.validation_pictures(train)

    # The models, the same in every process.
    torch.manual_seed(recipe.seed)
    tokenizer = hita.HitaTokenizer(cfg)
    discriminator = hita.PatchDiscriminator(recipe.gan_width)
    if source:
        start_from(tokenizer, discriminator, source, args.init_from)
    tokenizer.to(device, memory_format=torch.channels_last)
    discriminator.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    hita.add_dino(tokenizer, sources["dino_file"])
    ema.attach_dino(tokenizer.dino)
    perceptual = hita.PerceptualLoss().to(device) if recipe.lpips_weight > 0 else None

    # The optimizers. What is saved is what has a state.
    adam = partial(torch.optim.Adam, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    optimizer = adam(tokenizer.parameters())
    optimizer_d = adam(discriminator.parameters())
    parts = {"model": tokenizer, "ema": ema, "discriminator": discriminator,
             "optimizer": optimizer, "optimizer_d": optimizer_d}
    start = hita.restore(saved, parts)

    if recipe.recompute:
        recompute(tokenizer)
    if hita.use_compile(args.compile, tokenizer, device):
        compile_parts(tokenizer, discriminator, perceptual)

    parameters = sum(p.numel() for p in tokenizer.parameters())
    hita.print_once(
        f"tokenizer of {parameters / 1e6:.1f}M parameters, {len(train)} training and {len(val)} "
        f"validation pictures in {root}, {device} x {hita.world()}\n{cfg}\n{recipe}")
    return Run(cfg, recipe, device, out, train, val, sources, tokenizer, ema, discriminator,
               perceptual, optimizer, optimizer_d, parts, start)


def warn_of_short(recipe: Training) -> None:
    """Print a line for each part of the recipe that never comes, as with a large preset and few
    steps."""
    if recipe.warmup >= recipe.steps:
        hita.print_once(f"note: the learning rate rises for {recipe.warmup} steps (--warmup), and "
                        f"there are {recipe.steps}")
    if recipe.gan_weight > 0 and recipe.gan_start >= recipe.steps:
        hita.print_once(f"note: the discriminator comes in at step {recipe.gan_start} "
                        f"(--gan-start), and there are {recipe.steps}")


def start_from(tokenizer: hita.HitaTokenizer, discriminator: nn.Module, source: dict,
               path: str) -> None:
    """The weights of a checkpoint or released model, with positions for the grid of today, and its
    discriminator where it has one of this width."""
    weights = dict(source["ema"])
    grid = hita.TokenizerConfig(**source["config"]).grid
    if grid != tokenizer.cfg.grid and tokenizer.cfg.num_global > 0:
        hita.print_once(f"{path} has positions for {grid} x {grid} patches: resized to "
                        f"{tokenizer.cfg.grid} x {tokenizer.cfg.grid}")
        for name in ("extractor.positions", "fusion.positions"):
            weights[name] = hita.resize_positions(
                weights[name].float(), tokenizer.cfg.grid, tokenizer.cfg.grid)
    hita.load_weights(tokenizer, weights, path)

    states = source.get("discriminator", {})
    own = discriminator.state_dict()
    if {name: x.shape for name, x in states.items()} == {name: x.shape for name, x in own.items()}:
        discriminator.load_state_dict(states)
    else:
        hita.print_once(f"{path} has no discriminator of this width: a new one starts")


def recompute(tokenizer: hita.HitaTokenizer) -> None:
    """Compute the activations of the conv nets again in the backward pass instead of keeping them:
    those of the encoder as a whole, those of the decoder level by level."""
    for part in (tokenizer.encoder, *tokenizer.decoder.levels):
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def compile_parts(tokenizer: hita.HitaTokenizer, *others: nn.Module | None) -> None:
    """Compile the large parts. Centring and quantizers stay as they are, in float32."""
    parts = [tokenizer.encoder, tokenizer.decoder, tokenizer.dino, *others]
    if tokenizer.cfg.num_global > 0:
        parts += [tokenizer.extractor, tokenizer.fusion]
    for norm in tokenizer.modules():
        if isinstance(norm, nn.GroupNorm) and norm.weight.is_cuda:
            norm.forward = partial(norm_by_channel, norm)
    for part in parts:
        if part is not None:
            part.compile()


def norm_by_channel(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) of x (B, c, H, W), from the moments of each channel. torch's own norm, compiled for a
    GPU, copies x to another layout than that of the convolutions, and back, which took a fifth of
    the time of a training step."""
    each = x.shape[1] // norm.num_groups  # channels of a group
    x = x.float()

    def mean_of_groups(channels: Tensor) -> Tensor:
        """(B, c) -> (B, c, 1, 1), the same for all channels of a group."""
        means = channels.unflatten(1, (-1, each)).mean(dim=2)  # (B, groups)
        return means.repeat_interleave(each, dim=1)[..., None, None]

    # Means first, then squares of what is left: the difference E[x^2] - E[x]^2 of two large
    # numbers would be wrong, and perhaps negative.
    x = x - mean_of_groups(x.mean(dim=(2, 3)))
    var = mean_of_groups(x.square().mean(dim=(2, 3)))
    y = x * (var + norm.eps).rsqrt()
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    return y.type_as(norm.weight)


def batches(run: Run, steps: range) -> DataLoader:
    """The pictures of each step. They follow from the step and the seed alone."""
    recipe = run.recipe
    items = (hita.batch(step, len(run.train), recipe.batch_size, recipe.seed) for step in steps)
    return DataLoader(run.train, batch_sampler=items, num_workers=recipe.workers,
                      worker_init_fn=hita.ignore_signals, pin_memory=run.device.type == "cuda")


# ---- Evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(tokenizer: hita.HitaTokenizer, data: hita.Pictures, picture: Path, workers: int,
             perceptual: nn.Module | None = None, arrays: list[np.ndarray] = (),
             others: Tensor | None = None) -> dict[str, float]:
    """PSNR in dB and, where `perceptual` is given, LPIPS. Their names begin with train_ where there
    are no validation pictures.

    others: global ids (n, M) of other pictures. Then there is also swap, the PSNR with these
    globals, which equals the PSNR where globals hold nothing or the decoder ignores them.
    Pictures of 336 px are judged at 256, as in the released protocol. The file `picture` gets
    originals beside reconstructions. `arrays`, if given, are two and get all originals and all
    reconstructions."""
    device = next(tokenizer.parameters()).device
    own = list(range(hita.rank(), len(data), hita.world()))  # this process's share
    names = ["psnr"] + ["lpips"] * (perceptual is not None) + ["swap"] * (others is not None)
    sums = {name: torch.zeros((), device=device) for name in names}
    loader = DataLoader(data, 16, sampler=own, num_workers=workers,
                        worker_init_fn=hita.ignore_signals)

    # Encoding is done in float32, or some ids would be others. The decoder may work in bfloat16.
    done = 0
    for images, _ in tqdm(loader, "evaluating", disable=hita.rank() > 0, leave=False):
        images = images.to(device, memory_format=torch.channels_last)
        indices = own[done:done + len(images)]
        done += len(images)
        global_ids, patch_ids = tokenizer.encode(images)
        with hita.autocast(device):
            recon = as_compared(tokenizer.decode(global_ids, patch_ids))
        originals = as_compared(images)

        sums["psnr"] += hita.psnr(originals, recon).sum()
        if perceptual is not None:
            sums["lpips"] += perceptual(originals, recon) * len(images)
        if others is not None:
            with hita.autocast(device):
                mixed = as_compared(tokenizer.decode(others[indices], patch_ids))
            sums["swap"] += hita.psnr(originals, mixed).sum()
        for array, pictures in zip(arrays, (originals, recon)):
            array[indices] = hita.to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy()

    if hita.rank() == 0:
        shown = []
        for i in range(24):  # one by one, since large pictures need much memory
            image = data[i * len(data) // 24][0][None].to(device)
            shown += [image, tokenizer.decode(*tokenizer.encode(image))]
        hita.picture_grid(torch.cat(shown), columns=12).save(picture)
    mark = "train_" if data.split == "train" else ""
    return {mark + name: hita.all_sum(x).item() / len(data) for name, x in sums.items()}


def as_compared(images: Tensor) -> Tensor:
    """Pictures as they are compared: in [-1, 1], and those of 336 px with 8 bits and shrunk to 256
    as PIL does it."""
    if images.shape[-1] != 336:
        return images.float().clamp(-1, 1)
    images = hita.to_uint8(images) / 127.5 - 1
    return F.interpolate(images, 256, mode="bicubic", antialias=True).clamp(-1, 1)


def evaluate_checkpoint(args) -> None:
    """--eval: print all figures of a tokenizer, and add them to eval.jsonl in the run directory."""
    path = args.eval or f"{args.out}/tokenizer.pt"
    workers = getattr(args, "workers", 0)
    device = hita.set_up_device(args.device)
    hita.check(hita.world() == 1, "--eval works in one process: leave out torchrun")
    tokenizer = hita.load_tokenizer(path).to(device, memory_format=torch.channels_last)
    cfg = tokenizer.cfg
    sources, root = hita.find_sources(args, tokenizer.sources)
    hita.add_dino(tokenizer, sources["dino_file"])
    train = hita.Pictures(root, "train", cfg.image_size)
    val = hita.validation_pictures(train)
    out = hita.make_folder(args.out)

    perceptual = None
    try:
        if getattr(args, "lpips_weight", 1) > 0:
            perceptual = hita.PerceptualLoss().to(device)
    except hita.HitaError as e:
        print(f"without LPIPS: {e}")
    files, size = [], 256 if cfg.image_size == 336 else cfg.image_size
    if args.npz is not None:
        files = [Path(f"{args.npz}-{kind}.npz") for kind in ("originals", "reconstructions")]
    arrays = [hita.picture_array(file, len(val), size) for file in files]

    # Swap is measured with the globals of the picture half the split further on.
    val_ids = encode_all(tokenizer, val, 1, workers)
    others = val_ids[1].roll(len(val) // 2, dims=0) if cfg.num_global > 0 else None
    figures = evaluate(tokenizer, val, out / "eval.png", workers, perceptual, arrays, others)
    del arrays
    for file in files:
        hita.pack_pictures(file)

    # Of large data sets 20,000 training pictures are enough for the rest.
    train_ids = encode_all(tokenizer, train, -(-len(train) // 20_000), workers)
    for name, counts in id_counts(*train_ids[1:], cfg).items():
        figures |= hita.usage(name, counts)
    # Where there is no val, probes would be judged on the pictures they were fitted to.
    if val.split != "train":
        figures |= probes(tokenizer, train_ids, val_ids)

    line = {"tokenizer": str(path), "M": cfg.num_global, "k": cfg.k, "dino": cfg.dino,
            "pictures": len(val), **{name: round(value, 4) for name, value in figures.items()}}
    print(" ".join(f"{name} {value}" for name, value in line.items()))
    with open(out / "eval.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def encode_all(tokenizer: hita.HitaTokenizer, data: hita.Pictures, every: int,
               workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode every `every`-th picture, plain.
    -> classes (n,), global ids (n, M), patch ids (n, N)"""
    device = next(tokenizer.parameters()).device
    loader = DataLoader(data, 16, sampler=range(0, len(data), every), num_workers=workers)
    rows = []
    for images, classes in tqdm(loader, f"encoding {data.split}", leave=False):
        rows.append((classes.to(device), *tokenizer.encode(images.to(device))))
    return tuple(torch.cat(parts) for parts in zip(*rows))


def probes(tokenizer: hita.HitaTokenizer, train_ids: tuple, val_ids: tuple) -> dict[str, float]:
    """train_ids and val_ids are what encode_all gives. -> the share of validation pictures whose
    class a linear classifier, fitted to the training pictures, finds in the quantized tokens.
    probe_chance is the share of the most frequent class."""
    classes, val_classes = train_ids[0], val_ids[0]
    chance = (val_classes == classes.mode().values).float().mean()
    figures = {"probe_chance": chance.item()}
    kinds = [("patch", tokenizer.patch_quantizer, 2)]
    if tokenizer.cfg.num_global > 0:
        kinds.append(("global", tokenizer.global_quantizer, 1))
    for name, quantizer, place in kinds:
        x = quantizer.lookup(train_ids[place]).detach().flatten(1)  # (n, T * C)
        val_x = quantizer.lookup(val_ids[place]).detach().flatten(1)
        guess = linear_probe(x, classes, val_x)
        figures[f"probe_{name}"] = (guess == val_classes).float().mean().item()
    return figures


def linear_probe(x: Tensor, y: Tensor, val_x: Tensor, decay: float = 0.1) -> Tensor:
    """Classes (m,) that a linear classifier, fitted to x (n, D) and y (n,), finds for val_x (m, D):
    a ridge regression of standardised features onto the classes as 0 and 1."""
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, val_x = (x - mean) / std, (val_x - mean) / std
    classes = F.one_hot(y).type_as(x)  # (n, classes)
    share = classes.mean(dim=0)
    ridge = x.T @ x / len(x) + decay * torch.eye(x.shape[1], device=x.device)
    W = torch.linalg.solve(ridge, x.T @ (classes - share) / len(x))  # (D, classes)
    return (val_x @ W + share).argmax(dim=1)


if __name__ == "__main__":
    hita.run_script(main)
