"""Train the generator: a Llama that predicts the token ids of a picture from its class.

    python train_ar.py                              the demo, on the tokenizer that train_tokenizer.py left in out/
    torchrun --nproc_per_node 8 train_ar.py --preset B --tokenizer hita-tok.pt --data imagenet      size B on ImageNet
    python train_ar.py --steps 5000 --out out-long  the demo, longer
    python train_ar.py --preset B --tokenizer hita-u --init-from hita-u-b-250e --data DIR           fine-tune a released one

The pictures are encoded once, into tokens-train.npy in the run directory: memory-mapped rows of [class, M global ids,
N patch ids], the plain centre crop and its mirror image, and more augmented copies with --copies. The Llama trains on ids
alone. The run directory gets llama.pt, llama.jsonl (one line of figures per log interval) and llama-<step>.png (samples).
"""

import copy
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

import hita
from hita import option

# Not to be chosen here: the data and the tokenizer decide, and the last is for sample.py.
NO_FLAGS = ("num_classes", "num_global", "grid", "codebook_size", "released_sampling")


@dataclass
class Training:
    """The recipe. The defaults are the released one (300 epochs of ImageNet)."""
    steps: int = option(1_501_200, "optimizer steps")
    batch_size: int = option(256, "pictures per step, over all processes")
    lr: float = option(1e-4, "learning rate")
    lr_final: float = option(1e-4, "learning rate at the end of the cosine schedule")
    warmup: int = option(0, "steps of linear warm-up")
    weight_decay: float = option(0.05, "weight decay of matrices and embeddings")
    clip: float = option(1.0, "gradient norm is clipped to this")
    ema: float = option(0.9999, "decay of the averaged weights")
    copies: int = option(2, "versions of each picture in the token cache: 1 plain, 2 and mirrored, more are augmented")
    crop_range: float = option(0.8, "augmented copies show between this share of a picture's side and all of it")
    sample_cfg: float = option(1.5, "guidance scale of the sample grids")
    seed: int = option(0, "seed of weights, data order and dropout")
    log_every: int = option(100, "steps between log lines")
    eval_every: int = option(5000, "steps between evaluations, samples and checkpoints")
    workers: int = option(8, "data loader processes while encoding; 0 loads in this one")

    def __post_init__(self):
        for name in ("steps", "batch_size", "lr", "lr_final", "clip", "copies", "log_every", "eval_every"):
            hita.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, it must be positive")
        for name in ("warmup", "weight_decay", "sample_cfg", "workers", "seed"):
            hita.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must be 0 or more")
        hita.check(0 < self.crop_range <= 1, f"crop_range is {self.crop_range}, it must be in (0, 1]")
        hita.check(0 <= self.ema < 1, f"ema is {self.ema}, it must be in [0, 1)")


RECIPES = {size: Training() for size in hita.LLAMA_SIZES if size != "emoji"} | {
    "emoji": Training(steps=2000, batch_size=32, lr=3e-3, lr_final=1e-4, warmup=100, ema=0.99, sample_cfg=2.0, log_every=50,
                      eval_every=500, workers=0)}


def parse_args():
    """Command line -> (arguments, Llama configuration but for what the tokenizer decides, recipe)."""
    parser = hita.Parser(__doc__)
    preset = parser.add_choice("--preset", list(RECIPES), "emoji", "size of the Llama and recipe to start from")
    parser.add_argument("--data", help="folder with train/<class>/<pictures> and val/... [the embedded emoji pictures]")
    parser.add_argument("--tokenizer", help="tokenizer checkpoint, or hita-v or hita-u [tokenizer.pt in the run directory]")
    parser.add_argument("--out", default="out", help="run directory [out]")
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    parser.add_argument("--init-from", metavar="CHECKPOINT", help="fine-tune: start from the weights of this file or released "
                        "model (`python sample.py --list`), with its --preset [random weights]")
    parser.add_argument("--dino-file", help="DINOv2 weights, the original .pth or timm's .safetensors [from the Hub]")
    parser.add_config("model", hita.LlamaConfig(**hita.LLAMA_SIZES[preset]), skip=NO_FLAGS)
    parser.add_config("training", RECIPES[preset])
    args = parser.parse_args()
    return args, hita.override(hita.LlamaConfig(**hita.LLAMA_SIZES[preset]), args), hita.override(RECIPES[preset], args)


@torch.no_grad()
def token_cache(path: Path, tokenizer: hita.HitaTokenizer, data: hita.ImageFolder, copies: int, device: torch.device,
                recipe: Training) -> np.memmap:
    """Rows [class, M global ids, N patch ids] of all pictures in `copies` versions, encoded now or read from the cache.
    The cache is used if neither tokenizer, pictures nor preparation changed. The processes share the work."""
    rows, cfg = copies * len(data), tokenizer.cfg
    width = 1 + cfg.num_global + cfg.grid ** 2
    small = max(cfg.codebook_size, len(data.classes)) <= 65536
    models = [tokenizer] if tokenizer.dino is None else [tokenizer, tokenizer.dino]
    signature = hita.fingerprint(*models, data.signature(copies))
    note = path.with_suffix(".txt")  # written last: without it, or with another signature, the ids are made anew
    known = note.is_file() and path.is_file() and note.read_text() == signature
    hita.barrier()
    if not known:
        temporary = path.with_suffix(".tmp")
        if hita.rank() == 0:
            note.unlink(missing_ok=True)
            np.lib.format.open_memmap(temporary, "w+", np.uint16 if small else np.int32, (rows, width)).flush()
        hita.barrier()
        ids = np.lib.format.open_memmap(temporary, "r+")
        mine = range(hita.rank(), rows, hita.world())
        loader = DataLoader(data, 64, sampler=[divmod(row, len(data)) for row in mine], num_workers=recipe.workers)
        done = 0
        for images, labels in hita.bar(loader, f"encoding {path.stem}", hita.rank() == 0, 64):
            batch = torch.cat([labels[:, None], *(x.cpu() for x in tokenizer.encode(images.to(device)))], dim=1)  # (B, 1+M+N)
            ids[mine[done: done + len(batch)]] = batch.numpy()
            done += len(batch)
        ids.flush()
        hita.barrier()
        if hita.rank() == 0:
            os.replace(temporary, path)
            note.write_text(signature)
        hita.barrier()
    return np.load(path, mmap_mode="r")


def report_usage(tokens: np.memmap, cfg: hita.TokenizerConfig) -> None:
    """Print the share of each codebook that the training set uses."""
    M = cfg.num_global
    for name, ids in (("global", tokens[:, 1:1 + M]), ("patch", tokens[:, 1 + M:])):
        if ids.size:
            hits = sum(hita.count_ids(torch.from_numpy(ids[i:i + 4096].astype(np.int64)), cfg.codebook_size)
                       for i in range(0, len(ids), 4096))
            use, perplexity = hita.usage_and_perplexity(hits)
            print(f"training set: {name} codebook {use:.1%} in use, perplexity {perplexity:.0f} of {cfg.codebook_size}")


def split(rows: np.ndarray, M: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cache rows (B, 1 + M + N) -> class ids (B,), global ids (B, M), patch ids (B, N)."""
    rows = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
    return rows[:, 0], rows[:, 1:1 + M], rows[:, 1 + M:]


def start_llama(llama: hita.Llama, path: str, classes: list[str]) -> None:
    """Fine-tuning: the weights of a checkpoint or released model. Where its classes are others than those of the data, they
    start anew, and only the embedding of "no class" is kept."""
    data = hita.read_checkpoint(path, "llama")
    old, new = data["ema"].get("class_embedding.weight"), llama.class_embedding.weight.detach()     # (classes + 1, dim) each
    others = data["config"].num_classes != len(classes) or data.get("classes", classes) != classes
    if others and old is not None and old.shape[1:] == new.shape[1:]:
        data["ema"]["class_embedding.weight"] = torch.cat([new[:-1], old[-1:]])
        if hita.rank() == 0:
            print(f"{path} has other classes: the embeddings of the {len(classes)} classes here start anew")
    hita.start_from(llama, data, path)


def make_optimizer(llama: hita.Llama, recipe: Training) -> torch.optim.AdamW:
    """AdamW; matrices and embeddings decay, norm weights do not."""
    parameters = list(llama.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(ema: hita.Llama, tokens: np.memmap, device: torch.device) -> dict[str, float]:
    """Mean loss per token in nats of both parts over the validation ids, with the EMA weights, beside ln V."""
    total = torch.zeros(3, device=device)                                         # global, patch, number of pictures
    mine = tokens[hita.rank()::hita.world()]
    for i in range(0, len(mine), 64):
        class_ids, global_ids, patch_ids = split(mine[i:i + 64], ema.cfg.num_global, device)
        losses = hita.llama_losses(*ema(class_ids, global_ids, patch_ids), global_ids, patch_ids)
        total += len(class_ids) * torch.stack([*losses, torch.ones_like(losses[0])])
    total = hita.all_sum(total)
    global_loss, patch_loss = (total[:2] / total[2]).tolist()
    both = {"val_global": global_loss} if ema.cfg.num_global else {}
    return both | {"val_patch": patch_loss, "ln_V": math.log(ema.cfg.codebook_size)}


def sample_grid(ema: hita.Llama, tokenizer: hita.HitaTokenizer, recipe: Training, device: torch.device, path: Path) -> None:
    """Six samples of each of up to twelve classes, spread over all, two classes a row; always the same seed."""
    class_ids = torch.tensor(hita.spread(ema.cfg.num_classes), device=device).repeat_interleave(6)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    images = [tokenizer.decode(*ema.generate(ids, recipe.sample_cfg, generator=generator)).cpu() for ids in class_ids.split(12)]
    hita.save_grid(torch.cat(images), path, columns=12)


def main():
    args, llama_cfg, recipe = parse_args()
    device = hita.start(args.device, recipe.seed)
    tokenizer = hita.load_tokenizer(args.tokenizer or Path(args.out) / "tokenizer.pt").to(device)
    out = hita.run_directory(args.out)
    hita.attach_dino(tokenizer, args.dino_file)
    root, cfg = args.data or hita.embedded_data(), tokenizer.cfg
    train = hita.ImageFolder(root, "train", cfg.image_size, False, recipe.crop_range, recipe.seed)
    val = hita.validation_data(root, cfg.image_size)
    torch.manual_seed(recipe.seed)
    llama = hita.Llama(dataclasses.replace(llama_cfg, num_classes=len(train.classes), num_global=cfg.num_global, grid=cfg.grid,
                                           codebook_size=cfg.codebook_size))
    if args.init_from:
        start_llama(llama, args.init_from, train.classes)
    llama = llama.to(device)
    tokens = token_cache(out / "tokens-train.npy", tokenizer, train, recipe.copies, device, recipe)
    val_tokens = token_cache(out / "tokens-val.npy", tokenizer, val, 1, device, recipe)

    ema = copy.deepcopy(llama).eval().requires_grad_(False)
    model = DDP(llama, broadcast_buffers=False) if hita.world() > 1 else llama
    optimizer = make_optimizer(llama, recipe)
    torch.manual_seed(recipe.seed + hita.rank())  # dropout differs between the processes
    if hita.rank() == 0:
        report_usage(tokens, cfg)
        print(f"llama {sum(p.numel() for p in llama.parameters()) / 1e6:.1f}M parameters, {len(tokens)} rows of ids, "
              f"{device} x {hita.world()}\n{llama.cfg}\n{recipe}", flush=True)
    batches = iter(hita.Shuffled(len(tokens), recipe.batch_size, recipe.seed))
    log = hita.Log(out / "llama.jsonl", recipe.steps)
    llama.train()
    for step in range(1, recipe.steps + 1):
        rows = tokens[[index for _, index in next(batches)]]
        class_ids, global_ids, patch_ids = split(rows, cfg.num_global, device)
        for group in optimizer.param_groups:
            group["lr"] = hita.learning_rate(step, recipe.steps, recipe.warmup, recipe.lr, recipe.lr_final)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(class_ids, global_ids, patch_ids)
        global_loss, patch_loss = hita.llama_losses(*logits, global_ids, patch_ids)
        optimizer.zero_grad()
        (global_loss + patch_loss).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), recipe.clip)
        optimizer.step()
        hita.update_ema(ema, llama, recipe.ema)
        log.add(({"global": global_loss} if cfg.num_global else {}) | {"patch": patch_loss, "grad": grad_norm})
        evaluating = step % recipe.eval_every == 0 or step == recipe.steps
        if step % recipe.log_every == 0 or evaluating:  # before a checkpoint too: a diverged run stops here
            log.write(step, recipe.batch_size, {})
        if evaluating:
            figures = evaluate(ema, val_tokens, device)
            if hita.rank() == 0:
                sample_grid(ema, tokenizer, recipe, device, out / f"llama-{step:06d}.png")
                hita.save_checkpoint(out / "llama.pt", {
                    "kind": "llama", "config": dataclasses.asdict(llama.cfg), "recipe": dataclasses.asdict(recipe),
                    "classes": train.classes, "tokenizer": hita.fingerprint(tokenizer), "step": step,
                    "model": llama.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})
            hita.barrier()
            log.line(step, figures)


if __name__ == "__main__":
    hita.run(main)
