"""Generate pictures of a class with a trained Llama and its tokenizer, yours or the authors'.

    python sample.py --class face-happy flag clock     grids of eight, with the models in out/
    python sample.py --class 3 --num 16 --cfg-scale 3 --top-k 200 --top-p 0.95 --seed 7 --single
    python sample.py --llama hita-u-l-250e --class 207 "tabby"       a released model

    python sample.py --reconstruct a.jpg b.png         pictures beside their reconstructions
    python sample.py --style a.jpg b.jpg c.jpg         patch tokens of each, globals of each
    python sample.py --complete a.jpg --keep 0.5 --class flag       the lower half anew

    torchrun --nproc_per_node 8 sample.py --count 50000 --npz samples.npz     for evaluation

Where nothing has been trained, prints, a small pair in data/, draws the embedded classes, and a
released model, which is downloaded, those of ImageNet. The random numbers of a picture follow from
(seed, class, its number): the pictures of --num 4 are the first of --num 8.
"""

import difflib
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

IMAGENET = "hita-u-b-250e"  # released model for ImageNet's classes: the best of the smallest size
PRINTS = {"cfg_scale": 4.0, "top_k": 8}  # 44 % of its samples are recognised, without top_k 41 %
OTHERS = {"cfg_scale": 2.0, "top_k": 0}
FILTERS = ("temperature", "top_k", "top_p")  # flags that are arguments of hita.filter_logits
CHUNK = 64  # pictures generated at once, so that memory does not grow with --num
DECODED = 8  # pictures decoded at once: at 336 px the decoder needs about 0.5 GB for each


def parse_args():
    """The command line. Raises HitaError where flags contradict each other."""
    parser = hita.Parser(__doc__)
    add = parser.add_argument

    # What to draw, and how.
    add("--class", dest="classes", nargs="+", action="extend", metavar="CLASS",
        help="names or indices [twelve]")
    add("--num", type=int, default=8, help="pictures per class [8]")
    add("--cfg-scale", type=float, help="classifier-free guidance, 1 is without [2; prints: 4]")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 more varied [1]")
    add("--top-k", type=int, help="draw from the k likeliest ids, 0 from all [0; prints: 8]")
    add("--top-p", type=float, default=1.0, help="from the likeliest that reach probability p [1]")
    add("--seed", type=int, default=0, help="the same seed gives the same pictures [0]")

    # With which models.
    add("--list", action="store_true", help="list the released models and stop")
    add("--llama", metavar="FILE", help="file or released name [llama.pt in the run directory or, "
        f"where nothing was trained, prints or {IMAGENET}, as the classes say]")
    add("--tokenizer", metavar="FILE", help="file or released name [the Llama's own]")
    add("--out", default="out", help="run directory [out]")
    add("--dino-file", metavar="FILE", help="DINOv2 weights, .pth or .safetensors [the Hub's]")
    add("--device", help="cuda, mps or cpu [the best there is]")
    add("--compile", action="store_true", help="torch.compile, takes a minute; for many pictures")

    # Where to.
    add("--image", help="grid to write [in the run directory]")
    add("--single", action="store_true", help="write each picture, too, into a folder")
    add("--native", action="store_true", help="keep 336 px [256, as the published figures]")
    add("--released-sampling", action="store_true", help="make the released code's mistake at the "
        "last global token; for comparison with published figures only")

    # Details of the uses below.
    add("--keep", type=float, default=0.5, help="share of the height given to --complete [0.5]")
    add("--from", nargs="+", metavar="IMG", dest="styles", help="globals of --style [the same]")
    add("--count", type=int, help="so many pictures over all classes, with --npz")
    add("--random-labels", action="store_true", help="of --count: classes at random [in turn]")

    # One thing at a time.
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--reconstruct", nargs="+", metavar="IMG", help="encode and decode these")
    use.add_argument("--style", nargs="+", metavar="IMG", help="decode with the globals of others")
    use.add_argument("--complete", nargs="+", metavar="IMG", help="draw the lower part anew")
    use.add_argument("--npz", metavar="FILE", help="pictures as uint8 (n, H, W, 3), no grid")
    args = parser.parse_args()
    hita.check(args.num > 0, f"--num is {args.num}, it must be positive")
    hita.check(args.styles is None or args.style is not None, "--from is for --style")
    hita.check(args.count is None or args.npz is not None, "--count is for --npz")
    hita.check(args.complete is None or args.classes is not None,
               "--complete needs --class: one, or one for each picture")
    return args


def main():
    args = parse_args()
    if args.list:
        for name, file in hita.RELEASED.items():
            print(f"{name:16} {file}")
        return
    device = hita.set_up_device(args.device)
    hita.check(args.npz is not None or hita.world() == 1, "several processes are for --npz only")
    uses = {"reconstruct": reconstruct, "style": transfer_style, "complete": complete}
    name = next((name for name in uses if getattr(args, name) is not None), "samples")
    image = Path(args.out, f"{name}.png") if args.image is None else Path(args.image)
    # What cannot be written should show before the drawing, which may take long.
    kind = Image.registered_extensions().get(image.suffix.lower())
    hita.check(kind in Image.SAVE, f"--image {image} has no suffix that Pillow writes: use .png")
    hita.make_folder(image.parent)
    if name != "samples":
        hita.embedded_data()  # the pictures that the README names may still be packed

    if args.npz is not None:
        generate_npz(args, device)
        return hita.print_once(args.npz)
    if name == "samples":
        pictures, columns = generate_grid(args, device, image)
    else:
        pictures, columns = uses[name](args, device)
    hita.write_file(image, partial(hita.picture_grid(pictures, columns).save, format=kind))
    print(image)


# ---- Models and classes --------------------------------------------------------------------------

def default_llama(args) -> str:
    """What was trained in the run directory. Where nothing was, and a class is a number or one of
    ImageNet's names, a released model, else prints."""
    own = Path(args.out, "llama.pt")
    if own.exists() or args.out != "out":
        return str(own)
    names = {name.lower() for name in hita.IMAGENET}
    asked = [word.lower().replace("_", " ") for word in args.classes or []]
    of_imagenet = any(word in names or re.fullmatch(r"-?\d+", word) for word in asked)
    return IMAGENET if of_imagenet else "prints"


def class_indices(asked: list[str] | None, names: list[str]) -> list[int]:
    """Class names or indices as typed -> indices; twelve, spread over all, where none is asked.

    A number is a name where there is such a name.
    Raises HitaError for a class that there is not."""
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
        hita.check(len(same) == 1, f"no class is called {word}; near it: {', '.join(near)}{hint}")
        indices += same
    return indices


def load_pair(args, device: torch.device) -> tuple[hita.HitaTokenizer, hita.Llama, list[int]]:
    """-> tokenizer, Llama, and the indices of the classes that were asked for."""
    path = default_llama(args) if args.llama is None else args.llama
    tokenizer, llama = hita.load(path, args.tokenizer)
    classes = class_indices(args.classes, llama.classes)
    print_models(path, args.tokenizer)

    # Settings that depend on the model, where no flag says anything else.
    usual = dict(PRINTS if path == "prints" else OTHERS)
    if llama.cfg.class_dropout == 0 and args.cfg_scale is None:
        hita.print_once("this Llama was trained with class_dropout 0: drawing without guidance")
        usual["cfg_scale"] = 1.0
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    tokenizer.to(device, memory_format=torch.channels_last)
    llama.to(device)
    if hita.has_bfloat16(device):
        llama.bfloat16()
    if args.compile:
        llama.compile_step()
    return tokenizer, llama, classes


def load_encoder(args, device: torch.device) -> hita.HitaTokenizer:
    """The tokenizer alone, with the DINOv2 that encoding needs. It is that of --tokenizer, else
    that of --llama, else what was trained in the run directory, else that of prints."""
    path = args.llama if args.tokenizer is None else args.tokenizer
    if path is None:
        own = [Path(args.out, f"{kind}.pt") for kind in ("tokenizer", "llama")]
        trained = [file for file in own if file.exists()]
        path = trained[0] if trained else "prints" if args.out == "out" else own[0]
    tokenizer = hita.load_tokenizer(path)
    print_models(path)
    hita.add_dino(tokenizer, args.dino_file)
    return tokenizer.to(device, memory_format=torch.channels_last)


def print_models(path: str | Path, tokenizer: str | None = None) -> None:
    """A line that says which models are used."""
    hita.print_once(f"using {path}" + (f" and {tokenizer}" if tokenizer is not None else ""))


# ---- Drawing -------------------------------------------------------------------------------------

def drawing(args, llama: hita.Llama):
    """llama.generate with the settings of the command line."""
    filters = {name: getattr(args, name) for name in FILTERS}
    return partial(llama.generate, cfg_scale=args.cfg_scale, seed=args.seed,
                   released_sampling=args.released_sampling, progress=hita.rank() == 0, **filters)


def decode(tokenizer: hita.HitaTokenizer, global_ids: Tensor, patch_ids: Tensor) -> Tensor:
    """tokenizer.decode, a few pictures at a time -> (B, 3, S, S) float32."""
    pictures = []
    for ids in zip(global_ids.split(DECODED), patch_ids.split(DECODED)):
        with hita.autocast(global_ids.device):
            pictures.append(tokenizer.decode(*ids).float())
    return torch.cat(pictures)


def published_size(images: Tensor, native: bool) -> Tensor:
    """336 px -> 256, unless native: without antialiasing, as in the released protocol."""
    if images.shape[-1] != 336 or native:
        return images
    return F.interpolate(images, 256, mode="bicubic")


def generate(args, tokenizer: hita.HitaTokenizer, llama: hita.Llama, class_ids: Tensor,
             array: np.ndarray) -> None:
    """Draw pictures of classes (n,) into an array (n, S, S, 3). The processes share the chunks."""
    device = llama.norm.weight.device
    # Random numbers of all pictures, so that it does not matter which process makes which.
    random = hita.random_numbers(class_ids, llama.cfg.num_tokens, args.seed)
    start, draw, count = time.time(), drawing(args, llama), len(class_ids)
    for first in range(hita.rank() * CHUNK, count, hita.world() * CHUNK):
        chunk = torch.arange(first, min(first + CHUNK, count))
        # Compiled, chunks are filled up to one size, or the last would be compiled anew.
        more = min(CHUNK, count) - len(chunk) if args.compile else 0
        filled = F.pad(chunk, (0, more))
        global_ids, patch_ids = draw(class_ids[filled].to(device), random=random[filled].to(device))
        images = decode(tokenizer, global_ids[:len(chunk)], patch_ids[:len(chunk)])
        images = published_size(images, args.native)
        array[chunk] = hita.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    seconds = time.time() - start
    hita.print_once(f"{count} pictures in {seconds:.1f} s ({count / seconds:.2f} images/s)")


def shown_size(tokenizer: hita.HitaTokenizer, native: bool) -> int:
    """Pixels per side of what generate makes."""
    size = tokenizer.cfg.image_size
    return 256 if size == 336 and not native else size


def generate_grid(args, device: torch.device, image: Path) -> tuple[Tensor, int]:
    """--num pictures of each class, a row for each. With --single also one file for each picture,
    in a folder beside the grid."""
    tokenizer, llama, classes = load_pair(args, device)
    class_ids = torch.tensor(classes).repeat_interleave(args.num)
    size = shown_size(tokenizer, args.native)
    array = np.empty((len(class_ids), size, size, 3), np.uint8)
    generate(args, tokenizer, llama, class_ids, array)
    if args.single:
        write_single(array, class_ids.tolist(), llama.classes, image.with_suffix(""))
    return torch.from_numpy(array).permute(0, 3, 1, 2), args.num


def generate_npz(args, device: torch.device) -> None:
    """--npz: pictures for evaluation, in a file that need not fit into memory."""
    tokenizer, llama, classes = load_pair(args, device)
    class_ids = torch.tensor(classes).repeat_interleave(args.num)
    if args.count is not None:
        among = torch.tensor(classes if args.classes else range(llama.cfg.num_classes))
        order = np.arange(args.count) % len(among)
        if args.random_labels:
            order = np.random.default_rng(args.seed).integers(len(among), size=args.count)
        class_ids = among[order]

    array = hita.picture_array(Path(args.npz), len(class_ids), shown_size(tokenizer, args.native))
    generate(args, tokenizer, llama, class_ids, array)
    del array
    hita.pack_pictures(Path(args.npz), class_ids.numpy())


def write_single(array, class_ids: list[int], classes: list[str], folder: Path) -> None:
    """Write each picture as <number>-<class>.png."""
    hita.make_folder(folder)
    names = [re.sub(r"[^\w.-]", "_", name)[:60] for name in classes]  # must not lead elsewhere
    for i, (pixels, c) in enumerate(zip(array, class_ids)):
        Image.fromarray(pixels).save(folder / f"{i:05d}-{names[c]}.png")


# ---- Uses of pictures that you have; each gives pictures and the columns of their grid -----------

def read(paths: list[str], tokenizer: hita.HitaTokenizer, device: torch.device) -> Tensor:
    """Picture files -> (B, 3, S, S) at the size that the tokenizer was trained with."""
    size = tokenizer.cfg.image_size
    return torch.cat([hita.load_picture(path, size) for path in paths]).to(device)


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

    The global tokens are those of the given part. Patch token j first shows in cell j + k (see
    Fusion). So of the R given cells the first R - k tokens are kept. The k tokens after them belong
    to cells below the line, and are drawn."""
    tokenizer, llama, classes = load_pair(args, device)
    hita.check(len(classes) in (1, len(args.complete)), f"{len(classes)} classes for "
               f"{len(args.complete)} pictures; --class wants one, or one for each")
    hita.add_dino(tokenizer, args.dino_file)
    cfg, images = tokenizer.cfg, read(args.complete, tokenizer, device)
    lines = round(args.keep * cfg.grid)  # rows of cells that are given
    hita.check(0 < lines < cfg.grid, f"--keep {args.keep} gives {lines} of {cfg.grid} rows of "
               "patches; at least one must be given and one drawn")

    # What is below the line is unknown. The mean of the given part does not surprise the encoder.
    line, kept = lines * cfg.stride, max(0, lines * cfg.grid - cfg.k)
    given = images.clone()
    given[:, :, line:] = images[:, :, :line].mean(dim=(2, 3), keepdim=True)
    global_ids, patch_ids = tokenizer.encode(given)
    known = torch.cat([global_ids, patch_ids[:, :kept]], dim=1)  # (B, M + R - k)

    draw, rows = drawing(args, llama), []
    for i in range(len(images)):
        class_ids = torch.full((args.num,), classes[i % len(classes)], device=device)
        ids = draw(class_ids, given=known[i].expand(args.num, -1))
        row = torch.cat([images[i:i + 1], given[i:i + 1], decode(tokenizer, *ids)])
        # A red line ends the part that is given.
        red = row.new_tensor([1, -1, -1])[:, None, None]
        row[1:, :, line:line + max(1, cfg.image_size // 128)] = red
        rows.append(row)
    return torch.cat(rows), 2 + args.num


if __name__ == "__main__":
    hita.run_script(main)
