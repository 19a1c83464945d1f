"""Generate pictures of a class with a trained Llama and its tokenizer, yours or the authors'.

    python sample.py --class face-happy flag clock     grids of eight, with the models in out/
    python sample.py --class 3 --num 16 --cfg-scale 3 --top-k 200 --top-p 0.95 --seed 7 --single
    python sample.py --llama hita-u-l-250e --class 207 "tabby"       a released model

    python sample.py --reconstruct a.jpg b.png         pictures beside their reconstructions
    python sample.py --style a.jpg b.jpg c.jpg         patch tokens of each, globals of each
    python sample.py --complete a.jpg --keep 0.5 --class flag       the lower half anew
    python sample.py --keep-globals --class fruit      what the tokens of a sample carry

    torchrun --nproc_per_node 8 sample.py --count 50000 --npz samples.npz     for evaluation

Where nothing has been trained, prints, a small pair in data/, draws the embedded classes, and a
released model, which is downloaded, those of ImageNet. The random numbers of a picture follow from
(seed, class, its number): the pictures of --num 4 are the first of --num 8.
"""

import difflib
import io
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import hita

IMAGENET = "hita-u-b-250e"  # the default for its classes: the best of the smallest size
PRINTS = {"cfg_scale": 4.0, "top_k": 8}  # recognised: 44 %, without top_k 41 %
OTHERS = {"cfg_scale": 2.0, "top_k": 0}
CHUNK = 64  # pictures generated at once, so that memory does not grow with --num
DECODED = 8  # pictures decoded at once: at 336 px the decoder needs about 0.5 GB for each


def parse_args():
    """Command line -> arguments. Raises HitaError where they make no sense."""
    parser = hita.Parser(__doc__)
    add = parser.add_argument

    # what to draw, and how
    add("--class", dest="classes", nargs="+", action="extend", metavar="CLASS",
        help="names or indices [twelve]")
    add("--num", type=int, default=8, help="pictures per class [8]")
    add("--cfg-scale", type=float, help="classifier-free guidance, 1 is without [2; prints: 4]")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 more varied [1]")
    add("--top-k", type=int, help="draw from the k likeliest ids, 0 from all [0; prints: 8]")
    add("--top-p", type=float, default=1.0, help="from the likeliest that reach probability p [1]")
    add("--seed", type=int, default=0, help="the same seed gives the same pictures [0]")

    # with which models
    add("--list", action="store_true", help="list the released models and stop")
    add("--llama", metavar="FILE", help="checkpoint or released name [llama.pt in the run "
        f"directory or, where there is none, prints or {IMAGENET}, as the classes say]")
    add("--tokenizer", metavar="FILE", help="checkpoint or name [the one that the Llama goes with]")
    add("--out", default="out", help="run directory [out]")
    add("--dino-file", metavar="FILE", help="DINOv2 weights, .pth or .safetensors [the Hub's]")
    add("--device", help="cuda, mps or cpu [the best there is]")
    add("--compile", action="store_true", help="torch.compile, takes a minute; for many pictures")

    # where to
    add("--image", help="grid to write [in the run directory]")
    add("--single", action="store_true", help="write each picture, too, in a folder")
    add("--native", action="store_true", help="keep 336 px [256, as the published figures]")
    add("--released-sampling", action="store_true", help="make the released code's mistake at the "
        "last global token; for comparison with published figures only")

    # details of the uses below
    add("--keep", type=float, default=0.5, help="share of the height given to --complete [0.5]")
    add("--globals", choices=("visible", "sampled", "full"), default="visible", help="global "
        "tokens of --complete: of the given part, the class, or (upper bound) all [visible]")
    add("--from", nargs="+", metavar="IMG", dest="styles", help="globals of --style [the same]")
    add("--count", type=int, help="so many pictures over all classes, with --npz")
    add("--random-labels", action="store_true", help="of --count: classes at random [in turn]")

    # one thing at a time
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--reconstruct", nargs="+", metavar="IMG", help="encode and decode these")
    use.add_argument("--style", nargs="+", metavar="IMG", help="decode with the globals of others")
    use.add_argument("--complete", nargs="+", metavar="IMG", help="draw the lower part anew")
    use.add_argument("--keep-globals", action="store_true", help="a sample with other patch "
                     "tokens, and with other global tokens")
    use.add_argument("--npz", metavar="FILE", help="pictures as uint8 (n, H, W, 3), no grid")
    args = parser.parse_args()
    hita.check_range(0, 10**6, cfg_scale=args.cfg_scale or 1, temperature=args.temperature)
    hita.check_range(0, 1, top_p=args.top_p, keep=args.keep)
    hita.check_range(0, np.inf, top_k=args.top_k or 0, seed=args.seed)
    hita.check_range(1, 10_000, num=args.num)
    hita.check(args.style or not args.styles, "--from is for --style")
    hita.check(args.count is None or args.count > 0 and args.npz, "--count is positive, for --npz")
    hita.check(not args.complete or args.classes, "--complete needs --class: one, or one for each")
    return args


def main():
    args = parse_args()
    if args.list:
        return print(*(f"{name:16} {file}" for name, file in hita.RELEASED.items()), sep="\n")
    device = hita.set_up_device(args.device)
    hita.check(args.npz or hita.world() == 1, "several processes are for --npz FILE only")
    uses = {"reconstruct": reconstruct, "style": transfer_style, "complete": complete,
            "keep_globals": keep_globals}
    use = next((name for name in uses if getattr(args, name)), "samples")
    args.image = Path(args.image or Path(args.out) / f"{use.replace('_', '-')}.png")
    hita.check_writable(Path(args.npz or args.image))
    check_format(args)
    if args.single:
        hita.check_writable(args.image.with_suffix(""), folder=True)
    made = uses.get(use, generate)(args, device)
    if made:
        kind = Image.registered_extensions()[args.image.suffix.lower()]
        hita.write_file(args.image, partial(hita.picture_grid(*made).save, format=kind))
    hita.say(args.npz or args.image)


def check_format(args, size: int = 0) -> None:
    """HitaError, before the work, if --image cannot hold a grid of pictures of this size."""
    lists = args.classes, args.reconstruct, args.style, args.styles, args.complete
    most = 2 + max(12, args.num, *(len(words or ()) for words in lists))  # rows or columns
    try:
        kind = Image.registered_extensions()[args.image.suffix.lower()]
        Image.new("RGB", (most * (size + 2), 16)).save(io.BytesIO(), kind)
        hita.check(kind not in ("ICO", "ICNS"), "these would be made smaller")
    except Exception as e:  # KeyError; or each format's own
        raise hita.HitaError(f"--image {args.image} cannot hold {most} in a row: use .png") from e


def default_llama(args) -> str:
    """What was trained in the run directory; else by the classes ImageNet's model or prints."""
    own = Path(args.out) / "llama.pt"
    if own.exists() or args.out != "out":
        return str(own)
    names = {name.lower() for name in hita.IMAGENET}
    asked = [word.lower().replace("_", " ") for word in args.classes or []]
    theirs = [word for word in asked if word in names or re.fullmatch(r"-?\d+", word)]
    hita.check(len(theirs) in (0, len(asked)), f"{', '.join(theirs)}: drawn by {IMAGENET}, the "
               "others by prints: ask for them one after the other")
    return IMAGENET if theirs else "prints"


def class_indices(asked: list[str] | None, names: list[str]) -> list[int]:
    """Class names or indices as typed -> indices; twelve, spread over all, where none is asked.

    A number is a name where there is such a name. HitaError for a class that there is not."""
    if asked is None:
        count = min(12, len(names))
        return [i * len(names) // count for i in range(count)]
    hint = "" if len(names) >= 1000 else f"; for ImageNet's 1,000 add --llama {IMAGENET}"
    plain = [name.lower().replace("_", " ") for name in names]
    indices = []
    for word in asked:
        typed = word.lower().replace("_", " ")
        same = [i for i, name in enumerate(names) if name == word]
        same = same or [i for i, name in enumerate(plain) if name == typed]
        hita.check(len(same) < 2, f"several classes are called {word}; choose by index: {same}")
        if not same and re.fullmatch(r"-?\d+", word):
            hita.check(0 <= int(word) < len(names),
                       f"class {word} is out of range, 0 to {len(names) - 1}{hint}")
            same = [int(word)]
        near = difflib.get_close_matches(typed, plain, n=5, cutoff=0.4) or plain[:5]
        hita.check(same, f"no class is called {word}; near it: {', '.join(near)}{hint}")
        indices += same
    return indices


def load(args, device: torch.device) -> tuple[hita.HitaTokenizer, hita.Llama, list[int]]:
    """-> tokenizer, Llama, indices of the classes asked for. HitaError if they do not fit."""
    path = args.llama or default_llama(args)
    for name, value in (PRINTS if path == "prints" else OTHERS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    llama = hita.load_llama(path)
    chosen = class_indices(args.classes, llama.classes)
    beside = Path(path).with_name("tokenizer.pt")
    found, tokenizer = hita.find_tokenizer(llama.made_from, args.tokenizer, beside)
    for name in ("num_global", "grid", "global_codebook_size", "patch_codebook_size"):
        theirs, ours = getattr(tokenizer.cfg, name), getattr(llama.cfg, name)
        hita.check(theirs == ours, f"{name} is {theirs} in {found}, {ours} in {path}: --tokenizer?")
    hita.say(f"using {path} and {found}")
    check_format(args, tokenizer.cfg.image_size)
    tokenizer.to(device, memory_format=torch.channels_last)

    # weights in bfloat16 on CUDA, but not the buffers: rotations stay in float32
    for p in llama.to(device).parameters():
        p.data = p.data.bfloat16() if hita.has_bfloat16(device) else p.data
    if args.compile:
        llama.compile_step()
    return tokenizer, llama, chosen


def drawing(args, llama: hita.Llama):
    """llama.generate with the settings of the command line."""
    return partial(llama.generate, cfg_scale=args.cfg_scale, temperature=args.temperature,
                   top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                   released_sampling=args.released_sampling, progress=hita.rank() == 0)


def decode(tokenizer: hita.HitaTokenizer, global_ids: Tensor, patch_ids: Tensor) -> Tensor:
    """tokenizer.decode, a few pictures at a time -> (B, 3, S, S) float32."""
    pictures = []
    for ids in zip(global_ids.split(DECODED), patch_ids.split(DECODED)):
        with hita.autocast(global_ids.device):
            pictures.append(tokenizer.decode(*ids).float())
    return torch.cat(pictures)


def published_size(images: Tensor, native: bool) -> Tensor:
    """336 px -> 256, unless native: without antialiasing, as in the released protocol."""
    stays = images.shape[-1] != 336 or native
    return images if stays else F.interpolate(images, 256, mode="bicubic")


def generate(args, device: torch.device) -> tuple[Tensor, int] | None:
    """Pictures of classes, for a grid or, with --npz, in a file; the processes share chunks."""
    tokenizer, llama, chosen = load(args, device)
    class_ids = torch.tensor(chosen).repeat_interleave(args.num)
    if args.count:
        classes = torch.tensor(chosen if args.classes else range(llama.cfg.num_classes))
        n, rng = len(classes), np.random.default_rng(args.seed)
        order = rng.integers(n, size=args.count) if args.random_labels else range(args.count)
        class_ids = classes[np.asarray(order) % n]

    length = llama.cfg.num_global + llama.cfg.grid ** 2
    random = hita.random_numbers(class_ids, length, args.seed)  # of all, whoever makes which

    # a grid is kept in memory, a file for evaluation is not
    count, size = len(class_ids), tokenizer.cfg.image_size
    size = 256 if size == 336 and not args.native else size
    array = (hita.picture_array(Path(args.npz), count, size) if args.npz
             else np.empty((count, size, size, 3), np.uint8))
    start, draw = time.time(), drawing(args, llama)
    for first in range(hita.rank() * CHUNK, count, hita.world() * CHUNK):
        chunk = torch.arange(first, min(first + CHUNK, count))
        more = min(CHUNK, count) - len(chunk) if args.compile else 0
        filled = F.pad(chunk, (0, more))  # all of one size, or the last would be compiled anew
        ids = draw(class_ids[filled].to(device), random=random[filled].to(device))
        ids = [kind[:len(chunk)] for kind in ids]
        images = published_size(decode(tokenizer, *ids), args.native)
        array[chunk] = hita.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    seconds = time.time() - start
    hita.say(f"{count} pictures in {seconds:.1f} s ({count / seconds:.2f} images/s)")
    if args.npz:
        del array
        return hita.pack_pictures(Path(args.npz), class_ids.numpy())
    if args.single:
        write_single(array, class_ids.tolist(), llama.classes, args.image.with_suffix(""))
    return torch.from_numpy(array).permute(0, 3, 1, 2), args.num


def write_single(array, class_ids: list[int], classes: list[str], folder: Path) -> None:
    """Each picture as <number>-<class>.png, instead of what was there under such names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [re.sub(r"[^\w.-]", "_", name)[:60] for name in classes]  # that do not lead elsewhere
    for old in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*.png"):
        if old.stem[6:] in names:
            old.unlink()
    for i, (pixels, c) in enumerate(zip(array, class_ids)):
        Image.fromarray(pixels).save(folder / f"{i:05d}-{names[c]}.png")


# ---- Uses of pictures that you have; each gives (pictures, columns of the grid)

def load_encoder(args, device: torch.device) -> hita.HitaTokenizer:
    """The tokenizer alone, with the DINOv2 that encoding needs."""
    own, llama = Path(args.out) / "tokenizer.pt", Path(args.out) / "llama.pt"
    path, made_from = own if own.exists() or args.out != "out" else "prints", {}
    if not args.tokenizer and not own.exists() and llama.exists():  # its tokenizer is elsewhere
        made_from = hita.read_checkpoint(llama, "llama")["made_from"]
    path, tokenizer = hita.find_tokenizer(made_from, args.tokenizer, path)
    print(f"using {path}", flush=True)
    check_format(args, tokenizer.cfg.image_size)
    hita.add_dino(tokenizer, args.dino_file or tokenizer.made_from.get("dino_file"))
    return tokenizer.to(device, memory_format=torch.channels_last)


def read(paths: list[str], tokenizer: hita.HitaTokenizer, device: torch.device) -> Tensor:
    """Picture files -> (B, 3, S, S) at the size that the tokenizer was trained with."""
    return torch.cat([hita.load_picture(p, tokenizer.cfg.image_size) for p in paths]).to(device)


def reconstruct(args, device: torch.device) -> tuple[Tensor, int]:
    """--reconstruct: original, reconstruction; original, reconstruction; ..."""
    tokenizer = load_encoder(args, device)
    images = read(args.reconstruct, tokenizer, device)
    recon = decode(tokenizer, *tokenizer.encode(images))
    for path, value in zip(args.reconstruct, hita.psnr(images, recon)):
        print(f"{path}: PSNR {value:.2f} dB")
    return torch.stack([images, recon], dim=1).flatten(0, 1), 2


def transfer_style(args, device: torch.device) -> tuple[Tensor, int]:
    """--style: a square with the pictures on top and at the left; inside it patch tokens of the
    left picture, global tokens of the one on top. With --from the ones on top are others."""
    tokenizer = load_encoder(args, device)
    hita.check(tokenizer.cfg.num_global > 0, "this tokenizer has no global tokens to take")
    contents = read(args.style, tokenizer, device)
    styles = read(args.styles or args.style, tokenizer, device)
    global_ids, patch_ids = tokenizer.encode(styles)[0], tokenizer.encode(contents)[1]
    rows = [torch.ones_like(styles[:1]), styles]  # a white corner
    for content, ids in zip(contents, patch_ids):
        mixed = decode(tokenizer, global_ids, ids.expand(len(styles), -1))
        rows += [content[None], mixed]
    return torch.cat(rows), 1 + len(styles)


def complete(args, device: torch.device) -> tuple[Tensor, int]:
    """--complete: in a row a picture, what is given of it, and --num completions.

    Of R given cells the first R - k patch tokens are kept: these and the globals decide how the
    given cells look (see Fusion). The k tokens after them describe cells below the line. With
    --globals sampled a whole picture is drawn first, of which the globals are used."""
    tokenizer, llama, chosen = load(args, device)
    hita.check(len(chosen) in (1, len(args.complete)), f"{len(chosen)} classes for "
               f"{len(args.complete)} pictures; --class wants one, or one for each")
    hita.add_dino(tokenizer, args.dino_file or tokenizer.made_from.get("dino_file"))
    cfg, images = tokenizer.cfg, read(args.complete, tokenizer, device)
    lines = round(args.keep * cfg.grid)  # rows of cells that are given
    hita.check(0 < lines < cfg.grid, f"--keep {args.keep} gives {lines} of {cfg.grid} rows of "
               "patches; at least one must be given and one drawn")

    # what is below the line is unknown; its mean does not surprise the encoder
    line, kept = lines * cfg.stride, max(0, lines * cfg.grid - cfg.k)
    given = images.clone()
    given[:, :, line:] = images[:, :, :line].mean(dim=(2, 3), keepdim=True)
    all_ids = tokenizer.encode(images if args.globals == "full" else given)
    draw, rows = drawing(args, llama), []
    for i in range(len(images)):
        class_ids = torch.full((args.num,), chosen[i % len(chosen)], device=device)
        global_ids = all_ids[0][i].expand(args.num, -1)
        patch_ids = all_ids[1][i].expand(args.num, -1)
        if args.globals == "sampled" and cfg.num_global:
            global_ids, _ = draw(class_ids)
        known = torch.cat([global_ids, patch_ids[:, :kept]], dim=1)  # (num, M + R - k)
        ids = draw(class_ids, given=known)
        row = torch.cat([images[i:i + 1], given[i:i + 1], decode(tokenizer, *ids)])

        # a red line ends the part that is given
        red = row.new_tensor([1, -1, -1])[:, None, None]
        row[1:, :, line:line + max(1, cfg.image_size // 128)] = red
        rows.append(row)
    return torch.cat(rows), 2 + args.num


def keep_globals(args, device: torch.device) -> tuple[Tensor, int]:
    """--keep-globals: a sample with its globals and other patch tokens; below with its patch tokens
    and other globals. The first column is the sample itself."""
    tokenizer, llama, chosen = load(args, device)
    hita.check(llama.cfg.num_global > 0, "this model has no global tokens that could be kept")
    class_ids = torch.full((args.num,), chosen[0], device=device)
    draw = drawing(args, llama)
    global_ids, patch_ids = draw(class_ids)
    same = global_ids[:1].expand(args.num, -1)
    _, others = draw(class_ids, given=same)
    others[0] = patch_ids[0]  # on a GPU rounding may have changed it
    upper = decode(tokenizer, same, others)
    lower = decode(tokenizer, global_ids, patch_ids[:1].expand(args.num, -1))
    return published_size(torch.cat([upper, lower]), args.native), args.num


if __name__ == "__main__":
    hita.run_script(main, "fewer pictures at a time (--num), or --device cpu")
