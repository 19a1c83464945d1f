"""Train the generator: a Llama that predicts the token ids of a picture from its class.

    python train_ar.py                              the demo, on the tokenizer that train_tokenizer.py left in out/
    torchrun --nproc_per_node 8 train_ar.py --preset B --tokenizer hita-tok.pt --data imagenet      size B on ImageNet
    python train_ar.py --steps 5000 --out out-long  the demo, longer
    python train_ar.py --resume                     go on with the run in out/
    python train_ar.py --preset B --tokenizer hita-u --init-from hita-u-b-250e --data DIR           fine-tune a released one
    python train_ar.py --preset XL --batch-size 64 --accumulate 2 --bench      speed and memory, with random weights and ids

The pictures are encoded once, into tokens-train.npy in the run directory: memory-mapped rows of [class, M global ids,
N patch ids], the plain centre crop and its mirror image, and more augmented copies with --copies; an encoding that was
interrupted goes on where it was. The Llama trains on ids alone. The run directory gets llama.pt (the newest state of the
run), llama.jsonl (one line of figures per log interval) and llama-<step>.png (samples). SIGTERM or Ctrl-C while it trains: the
step is finished, the run saved.
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

BLOCK = 64  # pictures encoded at once
# Not to be chosen here: the data and the tokenizer decide, and the last is for sample.py.
NO_FLAGS = ("num_classes", "num_global", "grid", "codebook_size", "released_sampling")


@dataclass
class Training(hita.Settings):
    """The recipe. The defaults are the released one (300 epochs of ImageNet)."""
    steps: int = option(1_501_200, "optimizer steps", high=10 ** 9)
    batch_size: int = option(256, "pictures per step, over all processes")
    accumulate: int = option(1, "parts in which each batch is worked on, one after another, to save memory")
    lr: float = option(1e-4, "learning rate", 1e-12)
    lr_final: float = option(1e-4, "learning rate at the end of the cosine schedule", 1e-12)
    warmup: int = option(0, "steps of linear warm-up", 0, 10 ** 9)
    weight_decay: float = option(0.05, "weight decay of matrices and embeddings", 0)
    clip: float = option(1.0, "gradient norm is clipped to this", 1e-12)
    ema: float = option(0.9999, "decay of the averaged weights", 0, 0.999999)
    copies: int = option(2, "versions of each picture in the token cache: 1 plain, 2 and mirrored, more are augmented", high=1000)
    crop_range: float = option(0.8, "augmented copies show between this share of a picture's side and all of it", 0.01, 1)
    sample_cfg: float = option(1.5, "guidance scale of the sample grids", 0)
    seed: int = option(0, "seed of weights, data order and dropout", 0, 2 ** 32 - 1)
    log_every: int = option(100, "steps between log lines", high=10 ** 9)
    eval_every: int = option(5000, "steps between evaluations, samples and checkpoints", high=10 ** 9)
    keep_every: int = option(100_000, "checkpoints of multiples of this step are kept, 0 keeps only the newest", 0, 10 ** 9)
    workers: int = option(8, "data loader processes while encoding; 0 loads in this one", 0, 1024)


RECIPES = {size: Training() for size in hita.LLAMA_SIZES if size != "emoji"} | {
    "emoji": Training(steps=2000, batch_size=32, lr=3e-3, lr_final=1e-4, warmup=100, ema=0.99, sample_cfg=2.0, log_every=50,
                      eval_every=500, keep_every=0, workers=0)}


def parse_args():
    """Command line -> (arguments, Llama configuration but for what data and tokenizer decide, recipe, checkpoint to resume or
    None). Flags that are not given have the values of the checkpoint, without one those of the preset."""
    parser = hita.Parser(__doc__)
    preset = parser.add_choice("--preset", list(RECIPES), "emoji", "size of the Llama and recipe to start from")
    parser.add_argument("--tokenizer", help="tokenizer checkpoint, or hita-v or hita-u [tokenizer.pt in the run directory]")
    parser.add_run("fine-tune: start from the weights of this file or released model (`python sample.py --list`), with its --preset "
                   "[random weights]")
    parser.add_config("model", hita.LlamaConfig(**hita.LLAMA_SIZES[preset]), skip=NO_FLAGS)
    parser.add_config("training", RECIPES[preset])
    args = parser.parse_args()
    cfg, recipe = hita.LlamaConfig(**hita.LLAMA_SIZES[preset]), RECIPES[preset]
    saved = None if args.bench else hita.find_run(args, "llama", Training)
    if saved and not hasattr(args, "preset"):
        cfg, recipe = saved["config"], saved["recipe"]
    return args, hita.override(cfg, args), hita.override(recipe, args), saved


@torch.no_grad()
def token_cache(path: Path, tokenizer: hita.HitaTokenizer, data: hita.ImageFolder, copies: int, device: torch.device,
                recipe: Training) -> np.memmap:
    """Rows [class, M global ids, N patch ids] of all pictures in `copies` versions, encoded now or read from the cache.
    The cache is used if neither tokenizer, pictures nor preparation changed. The processes share the work, in float32: in
    bfloat16 or TF32 some ids would be others."""
    rows, cfg = copies * len(data), tokenizer.cfg
    width = 1 + cfg.num_global + cfg.grid ** 2
    small = max(cfg.codebook_size, len(data.classes)) <= 65536
    models = [tokenizer] if tokenizer.dino is None else [tokenizer, tokenizer.dino]
    signature = hita.fingerprint(*models, data.signature(copies))
    note = path.with_suffix(".txt")  # written last: without it, or with another signature, the ids are made anew
    try:
        known = note.read_text() == signature and np.load(path, mmap_mode="r").shape == (rows, width)
    except (OSError, ValueError):  # missing or damaged
        known = False
    if hita.all_sum(torch.tensor(float(known))) < hita.world():  # all must agree
        # blocks of rows; a byte for each says whether it is on the disk, so that an interrupted encoding can go on
        temporary, done = (path.with_suffix(f".{signature}.{kind}") for kind in ("tmp", "done"))
        if hita.rank() == 0:
            for old in (note, *path.parent.glob(f"{path.stem}.*.*")):
                if old not in (temporary, done):
                    old.unlink(missing_ok=True)
            if not (temporary.exists() and done.exists()):
                np.lib.format.open_memmap(temporary, "w+", np.uint16 if small else np.int32, (rows, width)).flush()
                done.write_bytes(bytes(-(-rows // BLOCK)))
        hita.barrier()
        empty, left = np.load(temporary, mmap_mode="r"), np.flatnonzero(np.fromfile(done, np.uint8) == 0)[hita.rank()::hita.world()]
        hita.barrier()  # all have read what is left before the first of it is done
        items = [[divmod(row, len(data)) for row in range(b * BLOCK, min((b + 1) * BLOCK, rows))] for b in left]
        loader = DataLoader(data, batch_sampler=items, num_workers=recipe.workers)
        with open(temporary, "r+b") as f, open(done, "r+b") as marks:  # not through the map, where a full disk would be a crash
            for b, (images, labels) in zip(left.tolist(), hita.bar(loader, f"encoding {path.stem}", hita.rank() == 0, BLOCK)):
                ids = tokenizer.encode(images.to(device, memory_format=torch.channels_last))
                f.seek(empty.offset + b * BLOCK * width * empty.itemsize)
                f.write(torch.cat([labels[:, None], *(x.cpu() for x in ids)], dim=1).numpy().astype(empty.dtype).tobytes())
                f.flush()
                os.fsync(f.fileno())
                marks.seek(b)
                marks.write(b"\1")
                marks.flush()
        hita.barrier()
        if hita.rank() == 0:
            os.replace(temporary, path)
            note.write_text(signature)
            done.unlink()
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


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Rows of the cache as int64."""
    return torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)


def split(rows: torch.Tensor, M: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (B, 1 + M + N) -> class ids (B,), global ids (B, M), patch ids (B, N)."""
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
        class_ids, global_ids, patch_ids = split(to_device(mine[i:i + 64], device), ema.cfg.num_global)
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


def make_step(recipe: Training, llama: hita.Llama, ema: hita.Llama, compiled: bool):
    """-> optimizer, and a function (step, rows of ids (B, 1 + M + N) on the device) -> figures, which trains for a step."""
    optimizer = make_optimizer(llama, recipe)
    model = DDP(llama, broadcast_buffers=False) if hita.world() > 1 else llama
    for block in llama.blocks if compiled else ():  # one by one, since they are alike: compiled once for all
        block.compile()
    losses = torch.compile(hita.llama_losses) if compiled else hita.llama_losses
    llama.train()

    def train_step(step: int, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = hita.learning_rate(step, recipe.steps, recipe.warmup, recipe.lr, recipe.lr_final)
        optimizer.zero_grad()
        total = rows.new_zeros(2, dtype=torch.float32)                            # global and patch loss of the whole batch
        for i, part in enumerate(rows.chunk(recipe.accumulate)):
            model.require_backward_grad_sync = i == recipe.accumulate - 1         # DDP: only the last sums over processes
            class_ids, global_ids, patch_ids = split(part, llama.cfg.num_global)
            with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
                logits = model(class_ids, global_ids, patch_ids)
            both = torch.stack(losses(*logits, global_ids, patch_ids)) / recipe.accumulate
            both.sum().backward()
            total += both.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), recipe.clip)
        hita.careful_step(optimizer, total.sum(), grad_norm)
        hita.update_ema(ema, llama, recipe.ema)
        return ({"global": total[0]} if llama.cfg.num_global else {}) | {"patch": total[1], "grad": grad_norm}

    return optimizer, train_step


def bench(args, cfg: hita.LlamaConfig, recipe: Training, device: torch.device) -> None:
    """Print the speed of training with random weights and ids, of ImageNet's classes and 336 px unless the preset is emoji."""
    if getattr(args, "preset", "emoji") == "emoji":
        cfg = dataclasses.replace(cfg, num_classes=12, num_global=16, grid=8, codebook_size=512)
    with device:
        llama = hita.Llama(cfg)
    ema = copy.deepcopy(llama).eval().requires_grad_(False)
    _, train_step = make_step(recipe, llama, ema, hita.compiled(args, device))
    rows = torch.randint(min(cfg.num_classes, cfg.codebook_size), (recipe.batch_size, 1 + cfg.num_global + cfg.num_patches), device=device)
    title = f"{getattr(args, 'preset', 'emoji')}, {rows.shape[1] - 1} tokens, batch {recipe.batch_size} in {recipe.accumulate}"
    hita.measure(f"train {title}, {'bfloat16' if rows.is_cuda else 'float32'}", lambda: train_step(1, rows), device,
                 recipe.batch_size, count_flops=True)


def main():
    args, cfg, recipe, saved = parse_args()
    device = hita.start(args.device)
    hita.check(recipe.batch_size % (hita.world() * recipe.accumulate) == 0, f"the batch of {recipe.batch_size} pictures cannot be "
               f"divided among {hita.world()} processes in {recipe.accumulate} parts; change --batch-size or --accumulate")
    if args.bench:
        return bench(args, cfg, recipe, device)
    tokenizer_file = args.tokenizer or str(Path(args.out) / "tokenizer.pt")
    tokenizer = hita.load_tokenizer(tokenizer_file).to(device, memory_format=torch.channels_last)
    train = hita.ImageFolder(args.data or hita.embedded_data(), "train", tokenizer.cfg.image_size, False, recipe.crop_range, recipe.seed)
    val = hita.validation_data(train)
    cfg = dataclasses.replace(cfg, num_classes=len(train.classes), num_global=tokenizer.cfg.num_global, grid=tokenizer.cfg.grid,
                              codebook_size=tokenizer.cfg.codebook_size)
    identity = hita.fingerprint(tokenizer)
    if saved:
        hita.check_settings(saved, cfg, recipe, train)
        hita.check(saved.get("tokenizer") == identity, f"{saved['path']} was trained on another tokenizer than "
                   f"{tokenizer_file}; give the same --tokenizer, or start a new run in another directory")
    hita.attach_dino(tokenizer, args.dino_file)
    torch.manual_seed(recipe.seed)
    llama = hita.Llama(cfg)
    if args.init_from and not saved:
        start_llama(llama, args.init_from, train.classes)
    llama = llama.to(device)
    out = hita.run_directory(args.out)
    tokens = token_cache(out / "tokens-train.npy", tokenizer, train, recipe.copies, device, recipe)
    val_tokens = token_cache(out / "tokens-val.npy", tokenizer, val, 1, device, recipe)

    ema = copy.deepcopy(llama).eval().requires_grad_(False)
    optimizer, train_step = make_step(recipe, llama, ema, hita.compiled(args, device))
    log = hita.Log(out / "llama.jsonl", recipe.steps, device)
    parts = {"model": llama, "ema": ema, "optimizer": optimizer, "log": log, "random": hita.RandomState(device)}
    facts = {"config": dataclasses.asdict(cfg), "recipe": dataclasses.asdict(recipe), "pictures": train.fingerprint(),
             "classes": train.classes, "tokenizer": identity,
             "files": {"data": args.data, "tokenizer": args.tokenizer, "dino_file": args.dino_file}}
    torch.manual_seed(recipe.seed + hita.rank())  # dropout differs between the processes
    if hita.rank() == 0:
        report_usage(tokens, tokenizer.cfg)
        print(f"llama {sum(p.numel() for p in llama.parameters()) / 1e6:.1f}M parameters, {len(tokens)} rows of ids, "
              f"{device} x {hita.world()}\n{cfg}\n{recipe}", flush=True)
    batches = iter(hita.Shuffled(len(tokens), recipe.batch_size, recipe.seed, first_step=saved["step"] if saved else 0))

    def look(step: int) -> dict[str, float]:
        """Evaluation: pictures and figures."""
        if hita.rank() == 0:
            sample_grid(ema, tokenizer, recipe, device, out / f"llama-{step:06d}.png")
        hita.barrier()
        return evaluate(ema, val_tokens, device)

    for step in hita.steps(out, "llama", recipe, parts, facts, saved, look):
        log.add(step, train_step(step, to_device(tokens[[index for _, index in next(batches)]], device)))


if __name__ == "__main__":
    hita.run(main)
