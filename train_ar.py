"""Train the generator: a Llama that predicts the token ids of a picture from its class.

    python train_ar.py                       the demo, on the tokenizer that is in out/
    python train_ar.py --tokenizer prints --out out-ar         on the tokenizer that is in data/
    torchrun --nproc_per_node 8 train_ar.py --preset B --tokenizer hita-v --data imagenet
    python train_ar.py --resume              go on with the run in out/
    python train_ar.py --preset B --tokenizer hita-u --init-from hita-u-b-250e --data DIR

The pictures are encoded once, into tokens-train.npy in the run directory: the plain centre crop,
its mirror image and, with --copies, augmented ones. The run directory gets llama.pt (the newest
state), llama.jsonl (figures) and llama-<step>.png (samples). Ctrl-C or SIGTERM while it trains: the
step is finished, the run saved; an encoding stops at once, and goes on with what is left.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
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
    global_weight: float = 1.0  # weight of the global tokens' loss; that of the patch tokens has 1
    ema: float = 0.9999  # decay of the averaged weights
    copies: int = 2  # versions of each picture: 1 plain, 2 and mirrored, more are augmented
    crop_range: float = 0.8  # augmented ones show between this share of a picture and all of it
    sample_cfg: float = 1.5  # guidance scale of the sample grids
    seed: int = 0  # seed of weights, data order and dropout
    log_every: int = 100  # steps between log lines
    eval_every: int = 5000  # steps between evaluations, samples and checkpoints
    keep_every: int = 100_000  # checkpoints of multiples of this stay; 0 keeps only the newest
    workers: int = 8  # data loader processes while encoding; 0 loads in this one


RECIPES = {size: Training() for size in hita.LLAMA_SIZES} | {
    "emoji": Training(
        steps=1400, batch_size=30, lr=3e-3, warmup=100, ema=0.99, global_weight=1 / 16, copies=1,
        sample_cfg=6.0, log_every=50, eval_every=1400, keep_every=0, workers=0)}
RECIPES["prints"] = dataclasses.replace(
    RECIPES["emoji"], steps=3300, batch_size=128, lr=1.5e-3, warmup=200, ema=0.998, copies=8,
    global_weight=0.25, crop_range=0.85, sample_cfg=4.0, eval_every=500, workers=4)
OF_THE_DATA = "num_classes num_global grid global_codebook_size patch_codebook_size".split()


def main():
    # ---- settings: of the checkpoint or else the preset, then the flags
    parser = hita.Parser(__doc__)
    parser.add_run(list(RECIPES))
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer checkpoint, prints, "
                        "hita-v or hita-u [tokenizer.pt in the run directory]")
    parser.add_settings(hita.LlamaConfig(**hita.LLAMA_SIZES["emoji"]), skip=OF_THE_DATA)
    parser.add_settings(RECIPES["emoji"])
    args = parser.parse_args()
    if args.export:
        return hita.export(args, "llama")
    saved, preset = hita.find_run(args, "llama", Training), args.preset or "emoji"
    cfg, recipe = hita.LlamaConfig(**hita.LLAMA_SIZES[preset]), RECIPES[preset]
    if saved and not args.preset:
        cfg, recipe = saved["config"], saved["recipe"]
    cfg, recipe = hita.override(cfg, args), hita.override(recipe, args)

    # ---- tokenizer and data; they decide what the Llama has to predict
    device = hita.set_up_device(args.device)
    torch.backends.cudnn.benchmark = True
    shares = hita.world() * recipe.accumulate
    hita.check(recipe.batch_size % shares == 0, f"batch_size must be a multiple of {shares}")
    out = Path(args.out)
    earlier = saved["made_from"] if saved else {}
    beside = (saved["path"].parent if saved else out) / "tokenizer.pt"
    path, tokenizer = hita.find_tokenizer(earlier, args.tokenizer, beside)
    made_from, root = hita.sources(args, earlier or tokenizer.made_from)
    train = hita.Pictures(root, "train", tokenizer.cfg.image_size, False, recipe.crop_range,
                          recipe.seed)
    val = hita.validation_pictures(train)
    made_from |= {
        "pictures": len(train), "preset": args.preset or earlier.get("preset", preset),
        "tokenizer": path if path in hita.RELEASED else str(Path(path).resolve()),
        "tokenizer_hash": hita.fingerprint(tokenizer)}
    same = {name: getattr(tokenizer.cfg, name) for name in OF_THE_DATA[1:]}
    cfg = dataclasses.replace(cfg, num_classes=len(train.classes), **same)
    if saved:
        hita.check_resume(saved, cfg, recipe, len(train))
        hita.check(saved["classes"] == train.classes, f"the classes in {train.root} are not those "
                   f"of {saved['path']}: give the right --data")
    torch.manual_seed(recipe.seed)
    llama = hita.Llama(cfg)
    if args.init_from and not saved:
        start_from(llama, args.init_from, train.classes, made_from["tokenizer_hash"])
    llama.to(device)
    ema = copy.deepcopy(llama).eval().requires_grad_(False)

    # ---- all pictures become ids
    hita.add_dino(tokenizer, made_from["dino_file"])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.to(device, memory_format=torch.channels_last)
    cache = partial(token_cache, tokenizer=tokenizer, workers=recipe.workers)
    tokens = cache(out / "tokens-train.npy", data=train, copies=recipe.copies)
    held_out = val.split != "train"
    place = out / f"tokens-{'val' if held_out else 'train-plain'}.npy"
    val_tokens = cache(place, data=val, copies=1)
    tokenizer.attach_dino(None)  # it has done its work

    # ---- optimizer; what is saved is what has a state
    parameters = list(llama.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2]},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, recipe.lr, (0.9, 0.95), weight_decay=recipe.weight_decay, fused=True)
    parts = {"model": llama, "ema": ema, "optimizer": optimizer}
    start = hita.restore(saved, parts)
    losses = hita.llama_losses
    if hita.use_compile(args.compile, made_from["preset"], device):
        losses = torch.compile(losses)
        for block in llama.blocks:  # one by one: they are alike, so this compiles once for all
            block.compile()
    model = hita.distribute(llama)
    llama.train()

    # ---- the loop; random numbers and data follow from (seed, step)
    log, stop = hita.Log(out / "llama.jsonl", recipe.steps, start), hita.Stop()
    facts = {"classes": train.classes, "made_from": made_from}
    hita.say(f"llama of {sum(p.numel() for p in parameters) / 1e6:.1f}M parameters, {len(tokens)} "
             f"rows of ids of {train.root} by {path}, {device} x {hita.world()}\n{cfg}\n{recipe}")
    for step in range(start + 1, recipe.steps + 1):
        items = hita.batch(step, len(tokens), recipe.batch_size, recipe.seed)
        rows = to_device(tokens[[index for _, index in items]], device)  # (B, 1 + M + N)
        hita.seed_step(recipe.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = hita.learning_rate(step, recipe)

        # gradients of all parts of the batch add up
        optimizer.zero_grad()
        for i, part in enumerate(rows.chunk(recipe.accumulate)):
            model.require_backward_grad_sync = i == recipe.accumulate - 1  # DDP: once is enough
            class_ids, global_ids, patch_ids = split(part, cfg.num_global)
            with hita.autocast(device):
                global_logits, patch_logits = model(class_ids, global_ids, patch_ids)
            global_loss, patch_loss = losses(global_logits, patch_logits, global_ids, patch_ids)
            loss = recipe.global_weight * global_loss + patch_loss
            (loss / recipe.accumulate).backward()
            log.add({"global": global_loss, "patch": patch_loss})
        log.add({"grad": hita.optimizer_step(optimizer, llama, recipe.clip)})
        hita.update_ema(ema, llama, recipe.ema)

        # what is due after this step
        stopping = stop.asked()
        due = step % recipe.eval_every == 0 or step == recipe.steps
        if step % recipe.log_every == 0 or due or stopping:
            log.write(step, recipe.batch_size)
        if due or stopping or (recipe.keep_every and step % recipe.keep_every == 0):
            hita.save_run(out, "llama", step, cfg, recipe, parts, **facts)
        if stopping:
            return hita.say(f"stopped after step {step}: continue with --resume")
        if due:
            log.line(step, evaluate(ema, val_tokens, device, "val" if held_out else "train"))
            sample_grid(ema, tokenizer, recipe, out / f"llama-{step:06d}.png")


@torch.no_grad()
def token_cache(path: Path, tokenizer: hita.HitaTokenizer, data: hita.Pictures, copies: int,
                workers: int) -> np.ndarray:
    """Rows [class, M global ids, N patch ids] of each picture in `copies` versions, encoded once.

    On the disk the first column is class + 1, and 0 where a row is still to be encoded, so an
    encoding that was interrupted goes on. A note beside the file says what it was made from; with
    another note it is made anew."""
    note, cfg = path.with_suffix(".txt"), tokenizer.cfg
    device = next(tokenizer.parameters()).device
    if hita.rank() == 0:
        models = [tokenizer, tokenizer.dino] if cfg.uses_dino else [tokenizer]
        source = hita.fingerprint(*models, data.signature(), copies)
        shape = copies * len(data), 1 + cfg.num_global + cfg.grid ** 2
        try:
            fits = note.read_text() == source and np.load(path, mmap_mode="r").shape == shape
        except (OSError, ValueError, EOFError):  # not there, empty, cut, damaged
            fits = False
        if not fits:
            note.unlink(missing_ok=True)
            largest = max(cfg.global_codebook_size, cfg.patch_codebook_size, len(data.classes) + 1)
            hita.new_array(path, np.uint16 if largest <= 65536 else np.int32, shape)
            note.write_text(source)
    hita.barrier()

    # the processes take turns, 16 rows each, in float32; row = version * len(data) + index
    rows = np.lib.format.open_memmap(path, "r+")
    todo = np.flatnonzero(rows[:, 0] == 0)
    hita.barrier()  # all have seen what is left to do
    blocks = [todo[i:i + 16].tolist() for i in range(0, len(todo), 16)][hita.rank()::hita.world()]
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


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows of the cache -> int64 with the class first."""
    tensor = torch.from_numpy(rows.astype(np.int64))
    tensor[:, 0] -= 1  # 0 was "not encoded"
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor  # or the copy would wait
    return tensor.to(device, non_blocking=True)


def split(rows: Tensor, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, 1 + M + N) -> class ids (B,), global ids (B, M), patch ids (B, N)."""
    return rows[:, 0], rows[:, 1:1 + M], rows[:, 1 + M:]


def start_from(llama: hita.Llama, path: str, classes: list[str], tokenizer_hash: str) -> None:
    """Fine-tuning: weights of a checkpoint or released model; other classes start anew."""
    data = hita.read_checkpoint(path, "llama")
    known = data["made_from"].get("tokenizer_hash", tokenizer_hash)  # the authors' files have none
    if known != tokenizer_hash:
        hita.say(f"{path} was trained with another tokenizer: to it ids mean something else")
    cfg, theirs = llama.cfg, data["config"]
    presets = {name: dataclasses.replace(cfg, **size) for name, size in hita.LLAMA_SIZES.items()}
    hita.check_start(path, theirs, cfg, presets)
    weights, name = dict(data["ema"]), "class_embedding.weight"
    if data.get("classes", classes) != classes or theirs.num_classes != len(classes):
        # only the embedding of "no class", the last row, means the same
        own = llama.class_embedding.weight.detach()
        weights[name] = torch.cat([own[:-1], weights[name][-1:]])
        hita.say(f"{path} has other classes: those here start anew")
    hita.load_weights(llama, weights, path)


@torch.no_grad()
def evaluate(ema: hita.Llama, tokens: np.ndarray, device: torch.device,
             name: str = "val") -> dict[str, float]:
    """Mean losses in nats over the ids of a split: of a global token, of a patch token and of all
    tokens of a picture, beside what a guess without any knowledge costs for a picture."""
    total = torch.zeros(3, device=device)  # global, patch, number of pictures
    mine = tokens[hita.rank()::hita.world()]
    for i in range(0, len(mine), 16):
        rows = to_device(mine[i:i + 16], device)
        class_ids, global_ids, patch_ids = split(rows, ema.cfg.num_global)
        logits = ema(class_ids, global_ids, patch_ids)
        global_loss, patch_loss = hita.llama_losses(*logits, global_ids, patch_ids)
        total += len(rows) * torch.stack([global_loss, patch_loss, torch.ones_like(patch_loss)])
    global_loss, patch_loss, _ = (hita.all_sum(total) / total[2]).tolist()
    cfg, M, N = ema.cfg, ema.cfg.num_global, ema.cfg.grid ** 2
    guess = M * math.log(cfg.global_codebook_size) + N * math.log(cfg.patch_codebook_size)
    figures = {"global": global_loss} if M else {}
    figures |= {"patch": patch_loss, "picture": M * global_loss + N * patch_loss}
    return {f"{name}_{key}": x for key, x in figures.items()} | {"guess_picture": guess}


def sample_grid(ema: hita.Llama, tokenizer: hita.HitaTokenizer, recipe: Training,
                path: Path) -> None:
    """Six samples of each of up to twelve classes, spread over all, two classes a row."""
    if hita.rank() == 0:
        count = min(12, ema.cfg.num_classes)
        spread = torch.arange(count, device=ema.cos.device) * ema.cfg.num_classes // count
        images = []
        for class_ids in spread.repeat_interleave(6).split(12):
            ids = ema.generate(class_ids, recipe.sample_cfg, seed=recipe.seed)
            images.append(tokenizer.decode(*ids).cpu())
        hita.picture_grid(torch.cat(images), columns=12).save(path)
    hita.barrier()


if __name__ == "__main__":
    hita.run_script(main, "--compile (where it is not on), --accumulate 4, a smaller --batch-size")
