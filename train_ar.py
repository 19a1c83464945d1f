"""Train the generator: a Llama that predicts the token ids of a picture from its class.

    python train_ar.py                       the demo, on the tokenizer that is in out/
    python train_ar.py --tokenizer prints --out out-ar         on the tokenizer of prints
    torchrun --nproc_per_node 8 train_ar.py --preset B --tokenizer hita-v --data imagenet
    python train_ar.py --resume              go on with the run in out/
    python train_ar.py --init-from hita-u-b-250e --data DIR    fine-tune

The pictures are encoded once, into tokens-train.npy in the run directory: the plain centre crop,
its mirror image and, with --copies, augmented ones. The run directory gets llama.pt (the newest
state, with the tokenizer in it), llama.jsonl (figures) and llama-<step>.png (samples). Ctrl-C or
SIGTERM while it trains: the step is finished and the run saved. An encoding stops at once, and goes
on with what is left. A run goes on with the command that started it and --resume.
"""

import copy
import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import hita


@dataclass
class Training:
    """The recipe. The defaults are the released one, 300 epochs of ImageNet."""
    steps: int = 1_501_200  # optimizer steps
    batch_size: int = 256  # pictures per step, over all processes
    accumulate: int = 1  # parts in which a batch is worked on one after another, to save memory
    lr: float = 1e-4  # learning rate
    lr_final: float = 1e-4  # where the cosine schedule ends
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.05  # weight decay of matrices and embeddings
    clip: float = 1.0  # gradient norm is clipped to this
    global_weight: float = 1.0  # weight of the loss of global tokens; that of patch tokens has 1
    ema: float = 0.9999  # decay of the averaged weights, at first (1 + step) / (10 + step)
    copies: int = 2  # versions of each picture: 1 plain, 2 and mirrored, more are augmented
    crop_range: float = 0.8  # augmented copies show between this share of a picture and all of it
    sample_cfg: float = 1.5  # guidance scale of the sample grids
    seed: int = 0  # seed of weights, data order and dropout
    log_every: int = 100  # steps between log lines
    eval_every: int = 5000  # steps between evaluations, samples and checkpoints
    keep_every: int = 100_000  # checkpoints of multiples of this stay; 0 keeps only the newest
    workers: int = 8  # data loader processes while encoding; 0 loads in this one


RECIPES = {size: Training() for size in hita.LLAMA_SIZES}
RECIPES["emoji"] = Training(
    steps=1400, batch_size=30, lr=3e-3, warmup=100, ema=0.99, global_weight=1 / 16, copies=1,
    sample_cfg=6.0, log_every=50, eval_every=1400, keep_every=0, workers=0)
RECIPES["prints"] = replace(
    RECIPES["emoji"], steps=3300, batch_size=128, lr=1.5e-3, warmup=200, ema=0.998, copies=8,
    global_weight=0.25, crop_range=0.85, sample_cfg=4.0, eval_every=500, workers=4)


def main():
    args = parse_args()
    if args.export is not None:
        return hita.export(args.export, Path(args.out, "llama.pt"), "llama")
    run = set_up(args)
    cfg, recipe, device, out = run.cfg, run.recipe, run.device, run.out
    llama, ema, tokens = run.llama, run.ema, run.tokens
    model = hita.distribute(llama)
    llama.train()

    log = hita.Log(out / "llama.jsonl", recipe.steps, run.start)
    with hita.Stop() as stop:
        for step in range(run.start + 1, recipe.steps + 1):
            items = hita.batch(step, len(tokens), recipe.batch_size, recipe.seed)
            rows = to_device(tokens[[index for _, index in items]], device)  # (B, 1 + M + N)
            hita.seed_step(recipe.seed, step)
            lr = hita.learning_rate(step, recipe)
            for group in run.optimizer.param_groups:
                group["lr"] = lr

            # The gradients of all parts of the batch add up.
            run.optimizer.zero_grad()
            for i, part in enumerate(rows.chunk(recipe.accumulate)):
                # DDP need not average before the last part.
                model.require_backward_grad_sync = i == recipe.accumulate - 1
                class_ids, global_ids, patch_ids = split(part, cfg.num_global)
                with hita.autocast(device):
                    global_logits, patch_logits = model(class_ids, global_ids, patch_ids)
                global_loss, patch_loss = run.losses(
                    global_logits, patch_logits, global_ids, patch_ids)
                loss = recipe.global_weight * global_loss + patch_loss
                (loss / recipe.accumulate).backward()
                log.add({"global": global_loss, "patch": patch_loss})
            log.add({"grad": hita.optimizer_step(run.optimizer, llama, recipe.clip)})
            hita.update_ema(ema, llama, recipe.ema, step)

            # What is due after this step. Writing the log asks whether all was finite.
            stopping = stop.asked()
            due = step % recipe.eval_every == 0 or step == recipe.steps
            kept = recipe.keep_every > 0 and step % recipe.keep_every == 0
            if step % recipe.log_every == 0 or due or kept or stopping:
                log.write(step, recipe.batch_size, lr)
            if due or kept or stopping:
                hita.save_run(out, "llama", step, cfg, recipe, run.parts, **run.facts)
            if stopping:
                return hita.print_once(f"stopped after step {step}: continue with --resume")
            if due:
                sample_grid(ema, run.tokenizer, recipe, out / f"llama-{step:06d}.png")
                log.line(step, evaluate(ema, run.val_tokens, device, run.val_name))


# ---- Setting up ----------------------------------------------------------------------------------

@dataclass
class Run:
    """What the loop works with."""
    cfg: hita.LlamaConfig
    recipe: Training
    device: torch.device
    out: Path
    tokenizer: hita.HitaTokenizer
    tokens: np.ndarray  # (rows, 1 + M + N): class and ids of each picture
    val_tokens: np.ndarray
    val_name: str  # "val", or "train" where there are no validation pictures
    facts: dict  # for the checkpoint: the tokenizer, the classes, where pictures come from
    llama: hita.Llama
    ema: hita.Llama
    losses: object  # llama_losses, perhaps compiled
    optimizer: torch.optim.Optimizer
    parts: dict  # what is saved: all that has a state
    start: int  # steps done


# These settings of the Llama are those of its tokenizer. num_classes follows from the pictures.
OF_THE_TOKENIZER = ("num_global", "grid", "global_codebook_size", "patch_codebook_size")


def parse_args():
    """The command line."""
    parser = hita.Parser(__doc__)
    parser.add_run(list(RECIPES))
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer or pair, file or name "
                        "[tokenizer.pt in the run directory, else that of --init-from]")
    parser.add_settings(hita.LlamaConfig(**hita.LLAMA_SIZES["emoji"]),
                        skip=("num_classes", *OF_THE_TOKENIZER))
    parser.add_settings(RECIPES["emoji"])
    return parser.parse_args()


def choose_settings(args, saved: dict | None, source: dict | None) -> tuple:
    """The settings of the Llama and of its training, with the flags that were given.

    A resumed run has those of its checkpoint, and of these only the recipe may change. A run that
    starts from weights has the settings of these, of which the dropouts may change, and the recipe
    of the preset with these settings."""
    if saved:
        cfg, recipe = hita.LlamaConfig(**saved["config"]), Training(**saved["recipe"])
        # These decide the order of the data and the versions of the pictures.
        fixed = {"seed", "batch_size", "copies", "crop_range"}
        why = "this run", "start another run with another --out"
        return (hita.choose(cfg, args, set(vars(cfg)), *why),
                hita.choose(recipe, args, fixed, *why))

    if source:
        cfg = hita.LlamaConfig(**source["config"])
        same = [name for name, size in hita.LLAMA_SIZES.items() if replace(cfg, **size) == cfg]
        recipe = RECIPES[args.preset or (same[0] if same else "emoji")]
        fixed = set(vars(cfg)) - {"dropout", "token_dropout", "class_dropout"}
        cfg = hita.choose(cfg, args, fixed, args.init_from, "start without --init-from")
        return cfg, hita.choose(recipe, args)

    preset = args.preset or "emoji"
    cfg = hita.LlamaConfig(**hita.LLAMA_SIZES[preset])
    return hita.choose(cfg, args), hita.choose(RECIPES[preset], args)


def choose_tokenizer(args, resuming: bool) -> hita.HitaTokenizer:
    """A resumed run goes on with the tokenizer in its checkpoint. A new one takes that of
    --tokenizer, else the one in the run directory, else that of the weights it starts from."""
    own = Path(args.out, "tokenizer.pt")
    path = own
    if resuming:
        path = Path(args.out, "llama.pt")
    elif args.tokenizer is not None:
        path = args.tokenizer
    elif args.init_from is not None and not own.exists():
        path = args.init_from
    hita.print_once(f"token ids are those of the tokenizer in {path}")
    return hita.load_tokenizer(path)


def set_up(args) -> Run:
    """Everything before the first step: settings, tokenizer, ids, models, optimizer."""
    device = hita.set_up_device(args.device)
    torch.backends.cudnn.benchmark = True
    saved = hita.find_run(args.out, "llama", args.resume)
    source = None
    if args.init_from is not None and not saved:
        source = hita.read_checkpoint(args.init_from, "llama")
    cfg, recipe = choose_settings(args, saved, source)
    if recipe.warmup >= recipe.steps:
        hita.print_once(f"note: the learning rate rises for {recipe.warmup} steps (--warmup), and "
                        f"there are {recipe.steps}")
    if cfg.class_dropout == 0:
        hita.print_once("note: class_dropout is 0, so the sample grids are drawn without guidance")
    shares = hita.world() * recipe.accumulate
    hita.check(recipe.batch_size % shares == 0, f"batch_size must be a multiple of {shares}")
    out = hita.make_folder(args.out)

    # The tokenizer and the pictures decide what the Llama has to predict.
    tokenizer = choose_tokenizer(args, saved is not None)
    sources, root = hita.find_sources(args, tokenizer.sources)
    train = hita.Pictures(root, "train", tokenizer.cfg.image_size, crop_range=recipe.crop_range,
                          seed=recipe.seed)
    val = hita.validation_pictures(train)
    if saved:
        hita.check(saved["classes"] == train.classes, f"the classes in {train.root} are not those "
                   "of this run: give the right --data")
    sizes = {name: getattr(tokenizer.cfg, name) for name in OF_THE_TOKENIZER}
    cfg = replace(cfg, num_classes=len(train.classes), **sizes)

    # The Llama, the same in every process.
    torch.manual_seed(recipe.seed)
    llama = hita.Llama(cfg)
    if source:
        start_from(llama, source, train.classes, args.init_from)
    llama.to(device)
    ema = copy.deepcopy(llama).eval().requires_grad_(False)

    # All pictures become ids, once.
    facts = {"classes": train.classes, **sources,
             "tokenizer": {"config": vars(tokenizer.cfg), "ema": tokenizer.state_dict()}}
    hita.add_dino(tokenizer, sources["dino_file"])
    tokenizer.to(device, memory_format=torch.channels_last)
    encode = partial(token_cache, tokenizer=tokenizer, workers=recipe.workers)
    tokens = encode(out / "tokens-train.npy", data=train, copies=recipe.copies)
    file = "tokens-val.npy" if val.split == "val" else "tokens-train-plain.npy"
    val_tokens = encode(out / file, data=val, copies=1)
    tokenizer.attach_dino(None)  # it has done its work

    # The optimizer. What is saved is what has a state.
    parameters = list(llama.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2]},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, recipe.lr, (0.9, 0.95), weight_decay=recipe.weight_decay,
                                  fused=True)
    parts = {"model": llama, "ema": ema, "optimizer": optimizer}
    start = hita.restore(saved, parts)

    losses = hita.llama_losses
    if hita.use_compile(args.compile, llama, device):
        losses = torch.compile(losses)
        # One by one: the blocks are alike, so this compiles once for all of them.
        for block in llama.blocks:
            block.compile()

    hita.print_once(
        f"llama of {sum(p.numel() for p in parameters) / 1e6:.1f}M parameters, {len(train)} "
        f"training and {len(val)} validation pictures in {root}, {device} x {hita.world()}\n{cfg}\n"
        f"{recipe}")
    return Run(cfg, recipe, device, out, tokenizer, tokens, val_tokens, val.split, facts, llama,
               ema, losses, optimizer, parts, start)


def start_from(llama: hita.Llama, source: dict, classes: list[str], path: str) -> None:
    """The weights of a checkpoint or released model. Classes that it does not know start anew."""
    weights, name = dict(source["ema"]), "class_embedding.weight"
    theirs = weights[name]
    known = source.get("classes")
    if known is None and len(theirs) == len(classes) + 1:
        hita.print_once(f"{path} does not name its classes: those here are taken to be the same, "
                        "in the order of their names")
    elif known != classes:
        ours = llama.class_embedding.weight.detach().clone()
        ours[-1] = theirs[-1]  # the last row means "no class" in both
        same = [c for c in classes if c in (known or [])]
        for c in same:
            ours[classes.index(c)] = theirs[known.index(c)]
        weights[name] = ours
        hita.print_once(f"{path} knows {len(same)} of the {len(classes)} classes: the others start "
                        "anew")
    hita.load_weights(llama, weights, path)


# ---- Token ids of all pictures -------------------------------------------------------------------

@torch.no_grad()
def token_cache(path: Path, tokenizer: hita.HitaTokenizer, data: hita.Pictures, copies: int,
                workers: int) -> np.ndarray:
    """Rows [class, M global ids, N patch ids] of each picture in `copies` versions, encoded once.

    On the disk the first column is class + 1, and 0 where a row is still to be encoded, so that an
    encoding that was interrupted goes on. A note beside the file says what it was made from; where
    the note differs, it is made anew.
    Raises HitaError if it cannot be written, or if rows are missing."""
    note, cfg = path.with_suffix(".txt"), tokenizer.cfg
    device = next(tokenizer.parameters()).device
    if hita.rank() == 0:
        source = fingerprint(tokenizer, data, copies)
        shape = copies * len(data), 1 + cfg.num_global + cfg.grid ** 2
        try:
            fits = note.read_text() == source and np.load(path, mmap_mode="r").shape == shape
        except (OSError, ValueError, EOFError):  # not there, empty, cut, damaged
            fits = False
        if not fits:
            note.unlink(missing_ok=True)
            largest = max(cfg.global_codebook_size, cfg.patch_codebook_size, len(data.classes) + 1)
            dtype = np.uint16 if largest <= 65536 else np.int32
            # Zeros are written in full: with a hole in the file, a full disk would end the process
            # without a word later.
            hita.write_file(path, lambda f: np.save(f, np.zeros(shape, dtype)))
            note.write_text(source)
    hita.barrier()

    # The processes take turns, 16 rows each. Row version * len(data) + i is a version of picture i.
    rows = np.lib.format.open_memmap(path, "r+")
    todo = np.flatnonzero(rows[:, 0] == 0)
    hita.barrier()  # now all have seen what is left to do
    blocks = [todo[i:i + 16].tolist() for i in range(0, len(todo), 16)]
    blocks = blocks[hita.rank()::hita.world()]
    items = [[divmod(row, len(data)) for row in block] for block in blocks]
    loader = DataLoader(data, batch_sampler=items, num_workers=workers)
    progress = tqdm(loader, f"encoding {path.stem}", disable=hita.rank() > 0, leave=False)
    for (images, classes), block in zip(progress, blocks):
        images = images.to(device, memory_format=torch.channels_last)
        global_ids, patch_ids = tokenizer.encode(images)
        rows[block, 1:] = torch.cat([global_ids, patch_ids], dim=1).cpu().numpy()
        rows[block, 0] = classes.numpy() + 1  # last, so that a row cut short does not look done
    rows.flush()
    hita.barrier()
    left = np.count_nonzero(rows[:, 0] == 0)
    hita.check(left == 0, f"{left} rows of {path} are missing: can all nodes write --out at once?")
    return rows


def fingerprint(tokenizer: hita.HitaTokenizer, data: hita.Pictures, copies: int) -> str:
    """A short hash of what token ids depend on: the weights of the tokenizer and its DINOv2, its
    configuration, and the names, sizes and dates of the pictures. It does not see the code: where
    that changed and the weights did not, remove the files of tokens."""
    digest = hashlib.sha256()
    for model in (tokenizer, tokenizer.dino):
        for name, x in model.state_dict().items() if model is not None else ():
            digest.update(name.encode() + x.cpu().contiguous().numpy().tobytes())
    files = []
    for path, label in data.samples:
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # links may lead nowhere
        name = os.path.relpath(path, data.root)
        files.append([name, label, stat.st_size, stat.st_mtime_ns])
    facts = [vars(tokenizer.cfg), files, data.crop_range, data.seed, copies]
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows of the cache -> int64 with the class first."""
    tensor = torch.from_numpy(rows.astype(np.int64))
    tensor[:, 0] -= 1  # 0 was "not encoded"
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # or the copy would wait for the device
    return tensor.to(device, non_blocking=True)


def split(rows: Tensor, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, 1 + M + N) -> class ids (B,), global ids (B, M), patch ids (B, N)."""
    return rows[:, 0], rows[:, 1:1 + M], rows[:, 1 + M:]


# ---- Evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(ema: hita.Llama, tokens: np.ndarray, device: torch.device,
             name: str = "val") -> dict[str, float]:
    """Mean losses in nats over the ids of a split: of a global token, of a patch token and of all
    tokens of a picture, beside what a guess without any knowledge costs for a picture."""
    total = torch.zeros(3, device=device)  # global, patch, number of pictures
    own = tokens[hita.rank()::hita.world()]  # this process's share
    for i in range(0, len(own), 16):
        rows = to_device(own[i:i + 16], device)
        class_ids, global_ids, patch_ids = split(rows, ema.cfg.num_global)
        logits = ema(class_ids, global_ids, patch_ids)
        global_loss, patch_loss = hita.llama_losses(*logits, global_ids, patch_ids)
        total += len(rows) * torch.stack([global_loss, patch_loss, torch.ones_like(patch_loss)])
    global_loss, patch_loss, _ = (hita.all_sum(total) / total[2]).tolist()

    cfg, M, N = ema.cfg, ema.cfg.num_global, ema.cfg.grid ** 2
    figures = {f"{name}_global": global_loss} if M > 0 else {}
    figures[f"{name}_patch"] = patch_loss
    figures[f"{name}_picture"] = M * global_loss + N * patch_loss
    figures["guess_picture"] = (
        M * math.log(cfg.global_codebook_size) + N * math.log(cfg.patch_codebook_size))
    return figures


def sample_grid(ema: hita.Llama, tokenizer: hita.HitaTokenizer, recipe: Training,
                path: Path) -> None:
    """Six samples of each of up to twelve classes, spread over all, two classes a row. They are
    guided, unless the Llama never saw pictures without their class."""
    if hita.rank() == 0:
        count = min(12, ema.cfg.num_classes)
        class_ids = torch.arange(count, device=ema.norm.weight.device)
        class_ids = class_ids * ema.cfg.num_classes // count
        scale = recipe.sample_cfg if ema.cfg.class_dropout > 0 else 1.0
        images = []
        for part in class_ids.repeat_interleave(6).split(12):
            ids = ema.generate(part, scale, seed=recipe.seed)
            images.append(tokenizer.decode(*ids).cpu())
        hita.picture_grid(torch.cat(images), columns=12).save(path)
    hita.barrier()


if __name__ == "__main__":
    hita.run_script(main)
