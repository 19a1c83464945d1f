"""Generate pictures of a class with a trained Llama and its tokenizer, yours or the authors'.

    python sample.py --class face-happy                   eight pictures, as one grid, with the model in the run directory
    python sample.py --class 3 flag weather --num 16      several classes, one after another
    python sample.py --class fruit --cfg-scale 3 --temperature 0.9 --top-k 200 --top-p 0.95 --seed 7 --single
    python sample.py --list                               the released ImageNet models
    python sample.py --model hita-u-l-250e --class 207 "tabby"
    python sample.py --bench XL 336 --num 64 --compile    speed of size XL at 336 px, with random weights

    python sample.py --reconstruct a.jpg b.png            pictures beside their reconstructions
    python sample.py --style a.jpg b.jpg --from c.jpg     patch tokens of a and b with the global tokens of c
    python sample.py --complete a.jpg --keep 0.5 --class cat      the lower half anew, several times
    python sample.py --keep-globals --class fruit         what the global and what the patch tokens of a sample carry
    torchrun --nproc_per_node 8 sample.py --count 50000 --npz samples.npz      for evaluation, the same number of each class
    python sample.py --fd samples.npz DIR                 Fréchet distance on DINOv2 features of two sets of pictures

Where nothing has been trained, a released model that runs on a laptop is downloaded and used.
"""

import difflib
import re
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

import hita

DEFAULT = "hita-u-b-250e"  # the best of the smallest size
CHUNK = 64  # pictures generated at once, so that memory does not grow with --num
DECODED = 8  # pictures decoded at once, since at 336 px the decoder needs about 0.5 GB for each


def parse_args():
    """Command line -> arguments."""
    parser = hita.Parser(__doc__)
    parser.add_argument("--class", dest="classes", nargs="+", metavar="CLASS",
                        help="class names or indices [twelve classes, spread over all]")
    parser.add_argument("--num", type=int, default=8, help="pictures per class [8]")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="strength of classifier-free guidance, 1 is without [2.0]")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above 1 more varied [1.0]")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k most likely ids, 0 from all [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely ids that reach probability p [1.0]")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures on the same device [0]")
    parser.add_argument("--model", metavar="NAME", help=f"released model [what is in the run directory, else {DEFAULT}]")
    parser.add_argument("--list", action="store_true", help="list the released models and stop")
    parser.add_argument("--native", action="store_true", help="keep 336 px pictures at 336 px [256, as the published figures]")
    parser.add_argument("--released-sampling", action="store_true", help="make the released sampling code's mistake at the "
                        "last global token; only for comparison with published figures")
    parser.add_argument("--out", help="run directory with tokenizer.pt and llama.pt [out]")
    parser.add_argument("--tokenizer", help="tokenizer checkpoint or name [tokenizer.pt in the run directory]")
    parser.add_argument("--llama", help="Llama checkpoint or name [llama.pt in the run directory]")
    parser.add_argument("--image", help="grid to write [samples.png in the run directory]")
    parser.add_argument("--single", action="store_true", help="also write each picture, into a folder beside the grid")
    parser.add_argument("--keep-globals", action="store_true", help="one sample of the first class, with other patch tokens and "
                        "with other global tokens")
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    parser.add_argument("--compile", action="store_true", help="torch.compile first, which takes a minute; for many pictures")
    use = parser.add_argument_group("pictures you have (any size and kind; they are brought to the model's square)")
    use.add_argument("--reconstruct", nargs="+", metavar="IMG", help="encode and decode these")
    use.add_argument("--style", nargs="+", metavar="IMG", help="decode these with the global tokens of those of --from")
    use.add_argument("--from", nargs="+", metavar="IMG", dest="styles", help="see --style")
    use.add_argument("--complete", nargs="+", metavar="IMG", help="generate the lower part of these, --num times each")
    use.add_argument("--keep", type=float, default=0.5, help="share of the height that is given to --complete [0.5]")
    use.add_argument("--globals", choices=("visible", "sampled", "full"), default="visible", help="where --complete takes the "
                     "global tokens from: the given part, the class, or the whole picture, which is an upper bound [visible]")
    use.add_argument("--dino-file", help="DINOv2 weights, the original .pth or timm's .safetensors [from the Hub]")
    many = parser.add_argument_group("evaluation")
    many.add_argument("--count", type=int, help="so many pictures over all classes, the same number of each; with --npz")
    many.add_argument("--random-labels", action="store_true", help="with --count: classes at random, as in the released protocol")
    many.add_argument("--npz", metavar="FILE", help="write the pictures as uint8 (n, H, W, 3) under arr_0, instead of a grid")
    many.add_argument("--fd", nargs=2, metavar=("A", "B"), help="Fréchet distance of the pictures in two folders or .npz files")
    many.add_argument("--features", nargs="+", metavar=("NAME", "FILE"), default=[hita.TokenizerConfig.dino], help="timm model "
                      "whose class token is the feature of --fd, and a file with its weights [DINOv2-L with registers, from the Hub]")
    parser.add_argument("--bench", nargs="*", metavar=("SIZE", "PX"), help="measure the speed of a size (B, L, XL, XXL, 2B) for "
                        "pictures of so many pixels, --num at once, with random weights, and stop [B 336]")
    return parser.parse_args()


def list_models() -> None:
    """Print the released generators."""
    print("name             size   parameters  epochs  FID   on this machine")
    for name, m in hita.RELEASED.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in hita.Llama(hita.LlamaConfig(**hita.LLAMA_SIZES[m.size])).parameters())
        here = "yes" if hita.local_copy(name) and hita.local_copy(m.tokenizer) else "no"
        print(f"{name:16} {m.size:5} {parameters / 1e6:8.1f} M {m.epochs:9}  {m.fid:.2f}  {here}"
              + ("  (the default)" if name == DEFAULT else ""))
    print("FID: published by the authors, of 50,000 pictures with guidance, resized to 256 px.")


def class_indices(asked: list[str] | None, names: list[str]) -> list[int]:
    """Class names or indices as typed -> indices. Raises HitaError for one that the model does not have."""
    if asked is None:
        return hita.spread(len(names))
    other = "" if len(names) == 1000 else f"; for the 1,000 classes of ImageNet add --model {DEFAULT}"
    plain = [name.lower().replace("_", " ") for name in names]
    indices = []
    for word in asked:
        typed = word.lower().replace("_", " ")
        same = ([i for i, name in enumerate(names) if name == word]
                or [i for i, name in enumerate(plain) if name == typed])
        hita.check(len(same) < 2, f"several classes are called {word}; choose by index: "
                                  + ", ".join(f"{i} ({names[i]})" for i in same))
        if same:
            indices += same
        elif word.lstrip("-").isdecimal():
            hita.check(0 <= int(word) < len(names),
                       f"class {word} is out of range, this model has classes 0 to {len(names) - 1}{other}")
            indices.append(int(word))
        else:
            near = difflib.get_close_matches(typed, plain, n=3, cutoff=0.4) or plain[:3]
            near += [name for name in plain if typed in name.split() and name not in near][:3]
            raise hita.HitaError(f"no class is called {word}; near it: {', '.join(near)} (of {len(names)} classes{other})")
    return indices


def choose(args) -> tuple[str, str, str]:
    """-> tokenizer, Llama (each a file or the name of a released model), and why these."""
    out = Path(args.out or "out")
    own = out / "tokenizer.pt", out / "llama.pt"
    if args.model:
        hita.check(not (args.tokenizer or args.llama), "--model chooses tokenizer and Llama; leave out --tokenizer and --llama")
        near = difflib.get_close_matches(args.model, hita.RELEASED, n=1, cutoff=0)
        hita.check(args.model in hita.RELEASED,
                   f"no released model is called {args.model}; did you mean {near[0]}? `python sample.py --list` shows all")
        return hita.RELEASED[args.model].tokenizer, args.model, "released models, as --model says"
    if args.tokenizer or args.llama:
        return args.tokenizer or str(own[0]), args.llama or str(own[1]), "as --tokenizer and --llama say"
    if args.out or any(path.exists() for path in own):
        return str(own[0]), str(own[1]), f"what was trained in {out}"
    return hita.RELEASED[DEFAULT].tokenizer, DEFAULT, f"released models, since nothing was trained in {out}"


def load(args) -> tuple[hita.HitaTokenizer, hita.Llama, list[str], list[int]]:
    """-> tokenizer, Llama, names of all classes, indices of those asked for. Raises HitaError if the two do not belong together
    or have no such class; what can be said before a download is."""
    tokenizer_path, llama_path, reason = choose(args)
    print(f"using {tokenizer_path} and {llama_path}: {reason}", flush=True)
    imagenet = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    if llama_path in hita.RELEASED:
        class_indices(args.classes, imagenet)
    hita.fetch(*(path for path in (tokenizer_path, llama_path) if path in hita.TOKENIZER_FILES | hita.LLAMA_FILES),
               otherwise="train the demo with `python train_tokenizer.py && python train_ar.py`")
    tokenizer, data = hita.load_tokenizer(tokenizer_path), hita.read_checkpoint(llama_path, "llama")
    names = [str(i) for i in range(data["config"].num_classes)] if data["config"].num_classes != len(imagenet) else imagenet
    names = data.get("classes", names)
    chosen = class_indices(args.classes, names)
    llama = hita.load_model(data, llama_path)
    same = all(getattr(tokenizer.cfg, name) == getattr(llama.cfg, name) for name in ("num_global", "grid", "codebook_size"))
    hita.check(same and data.get("tokenizer") in (None, hita.fingerprint(tokenizer)),
               f"{llama_path} was trained on another tokenizer than {tokenizer_path}; train it again with `python train_ar.py`")
    llama.cfg.released_sampling |= args.released_sampling
    return tokenizer, llama, names, chosen


def prepare(tokenizer: hita.HitaTokenizer, llama: hita.Llama, device: torch.device, compiled: bool) -> None:
    """Move both to the device; on CUDA the Llama's weights become bfloat16."""
    tokenizer.to(device, memory_format=torch.channels_last)
    for p in llama.to(device).parameters():  # not the buffers: rotations stay in float32
        p.data = p.data.bfloat16() if device.type == "cuda" else p.data
    for block in llama.blocks if compiled else ():
        block.compile()


def load_encoder(args, device: torch.device) -> hita.HitaTokenizer:
    """The tokenizer alone, with the DINOv2 that encoding needs."""
    path, _, reason = choose(args)
    print(f"using {path}: {reason}", flush=True)
    tokenizer = hita.load_tokenizer(path)
    hita.attach_dino(tokenizer, args.dino_file)
    return tokenizer.to(device, memory_format=torch.channels_last)


def read_pictures(paths: list[str], tokenizer: hita.HitaTokenizer, device: torch.device) -> torch.Tensor:
    """Files -> (B, 3, S, S) at the size that the tokenizer was trained with."""
    return torch.stack([hita.read_picture(path, tokenizer.cfg.image_size) for path in paths]).to(device)


def encode(tokenizer: hita.HitaTokenizer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tokenizer.encode for any number of pictures."""
    global_ids, patch_ids = zip(*map(tokenizer.encode, images.split(DECODED)))
    return torch.cat(global_ids), torch.cat(patch_ids)


def render(tokenizer: hita.HitaTokenizer, global_ids: torch.Tensor, patch_ids: torch.Tensor) -> torch.Tensor:
    """tokenizer.decode for any number of pictures."""
    return torch.cat([tokenizer.decode(*ids) for ids in zip(global_ids.split(DECODED), patch_ids.split(DECODED))])


def reconstruct(args, device: torch.device) -> tuple[torch.Tensor, int]:
    """--reconstruct -> pictures and columns of the grid: original, reconstruction; original, reconstruction; ..."""
    tokenizer = load_encoder(args, device)
    images = read_pictures(args.reconstruct, tokenizer, device)
    recon = render(tokenizer, *encode(tokenizer, images))
    for path, value in zip(args.reconstruct, hita.psnr(images, recon)):
        print(f"{path}: PSNR {value:.2f} dB")
    return torch.stack([images, recon], dim=1).flatten(0, 1), 2


def transfer_style(args, device: torch.device) -> tuple[torch.Tensor, int]:
    """--style --from -> matrix: the styles above, the contents on the left, and each content with the globals of each style."""
    tokenizer = load_encoder(args, device)
    hita.check(tokenizer.cfg.num_global > 0, "this tokenizer has no global tokens, so there is no style to take")
    contents, styles = (read_pictures(paths, tokenizer, device) for paths in (args.style, args.styles))
    (_, patch_ids), (global_ids, _) = encode(tokenizer, contents), encode(tokenizer, styles)
    rows = [torch.cat([torch.ones_like(styles[:1]), styles])]                     # a white corner, and the styles
    for content, ids in zip(contents, patch_ids):
        rows.append(torch.cat([content[None], render(tokenizer, global_ids, ids.expand(len(styles), -1))]))
    return torch.cat(rows), len(rows[0])


def complete(args, device: torch.device) -> tuple[torch.Tensor, int]:
    """--complete -> a row for each picture: the original, what is given of it, and --num completions. A red line ends the part
    that is given.

    Cell i of the patch grid is decoded from the global tokens and the patch tokens up to i - k. So of R given cells the first
    R - k patch tokens are kept: these, and no others, decide how the given cells look, and the k tokens after them, which
    describe cells below the line, are generated.
    """
    tokenizer, llama, _, chosen = load(args)
    hita.check(len(chosen) in (1, len(args.complete)), f"{len(chosen)} classes for {len(args.complete)} pictures; --class wants one "
               "for all, or one for each")
    hita.attach_dino(tokenizer, args.dino_file)
    prepare(tokenizer, llama, device, args.compile)
    cfg, images = tokenizer.cfg, read_pictures(args.complete, tokenizer, device)
    lines = round(args.keep * cfg.grid)                                           # rows of cells that are given
    hita.check(0 < lines < cfg.grid, f"--keep {args.keep} of {cfg.grid} rows of patches gives {lines}, it must be 1 to {cfg.grid - 1}")
    line = lines * cfg.stride
    given = images.clone()
    given[:, :, line:] = images[:, :, :line].mean(dim=(2, 3), keepdim=True)
    sampler = hita.Sampler(llama, args.num, args.cfg_scale, args.temperature, args.top_k, args.top_p)
    generator, rows = torch.Generator(device).manual_seed(args.seed), []
    ids = encode(tokenizer, images if args.globals == "full" else given)
    for i, image in enumerate(images):
        class_ids = torch.full((args.num,), chosen[i % len(chosen)], device=device)
        global_ids, patch_ids = (part[i].expand(args.num, -1) for part in ids)
        if args.globals == "sampled" and cfg.num_global:
            global_ids, _ = sampler(class_ids, generator)
        kept = torch.cat([global_ids, patch_ids[:, :max(0, lines * cfg.grid - cfg.k)]], dim=1)
        completed = render(tokenizer, *sampler(class_ids, generator, kept))
        row = torch.cat([image[None], given[i:i + 1], completed])
        quality = hita.psnr(image[None, :, :line].expand(args.num, -1, -1, -1), completed[:, :, :line]).mean()
        print(f"{args.complete[i]}: PSNR of the given part {quality:.2f} dB, global tokens: {args.globals}"
              + (", an upper bound since they know the whole picture" if args.globals == "full" else ""))
        row[1:, :, line:line + max(1, cfg.image_size // 128)] = row.new_tensor([1, -1, -1])[:, None, None]
        rows.append(row)
    return torch.cat(rows), 2 + args.num


def keep_globals(args, device: torch.device) -> tuple[torch.Tensor, int]:
    """--keep-globals -> two rows of --num: one sample, with its global tokens and other patch tokens; the same sample, with its
    patch tokens and other global tokens."""
    tokenizer, llama, names, chosen = load(args)
    M = llama.cfg.num_global
    hita.check(M > 0, "this model has no global tokens that could be kept")
    prepare(tokenizer, llama, device, args.compile)
    class_ids, generator = torch.full((args.num,), chosen[0], device=device), torch.Generator(device).manual_seed(args.seed)
    sampler = hita.Sampler(llama, args.num, args.cfg_scale, args.temperature, args.top_k, args.top_p)
    global_ids, patch_ids = sampler(class_ids, generator)
    same = global_ids[:1].expand(args.num, -1)
    _, other_patches = sampler(class_ids, generator, same)
    other_patches[0] = patch_ids[0]
    both = torch.cat([same, global_ids]), torch.cat([other_patches, patch_ids[:1].expand(args.num, -1)])
    print(f"{names[chosen[0]]}: a sample with its global tokens and other patch tokens; with its patch tokens and other global tokens")
    return decode(tokenizer, *both, args.native), args.num


def features(source: str, dino: hita.DINOv2, device: torch.device) -> torch.Tensor:
    """Class tokens (n, D) of the pictures in a folder (and those below it) or in an .npz file, brought to 224 px by the evaluation
    crop."""
    if Path(source).is_dir():
        paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in hita.IMAGE_TYPES and path.is_file())
        read, count = lambda i: hita.read_picture(paths[i], dino.SIZE), len(paths)
    else:
        pixels = hita.read_npz(source)
        read, count = lambda i: hita.to_tensor(hita.fit(Image.fromarray(pixels[i]), dino.SIZE)), len(pixels)
    hita.check(count > 1, f"{source} has {count} pictures, at least two are needed")
    parts = torch.arange(count).split(CHUNK)
    return torch.cat([dino(torch.stack([read(int(i)) for i in part]).to(device))[:, 0].float().cpu()
                      for part in hita.bar(parts, source, scale=CHUNK)])


def print_distance(args, device: torch.device) -> None:
    """--fd A B."""
    name, *file = args.features
    hita.check(len(file) <= 1, "--features takes the name of a timm model and at most one file")
    for source in args.fd:
        hita.check(Path(source).exists(), f"there is neither a folder nor a file {source}")
    dino = hita.DINOv2(name, *file).to(device)
    a, b = (features(source, dino, device) for source in args.fd)
    print(f"FD-DINOv2 {hita.frechet_distance(a, b):.4g} between {args.fd[0]} ({len(a)} pictures) and {args.fd[1]} ({len(b)}), "
          f"{a.shape[1]} features of {' from '.join(args.features)}"
          + ("; with fewer pictures than features it is much too large" if min(len(a), len(b)) <= a.shape[1] else ""))


def decode(tokenizer: hita.HitaTokenizer, global_ids: torch.Tensor, patch_ids: torch.Tensor, native: bool) -> torch.Tensor:
    """Ids (B, M), (B, N) -> pictures (B, 3, S, S) as uint8 on the CPU; of 336 px S becomes 256 unless native."""
    pictures = []
    for ids in zip(global_ids.split(DECODED), patch_ids.split(DECODED)):
        with torch.autocast(global_ids.device.type, torch.bfloat16, enabled=global_ids.is_cuda):
            x = tokenizer.decode(*ids).float()
        pictures.append(hita.to_uint8(x if native else hita.at_published_size(x, antialias=False)).cpu())
    return torch.cat(pictures)


def bench(args, device: torch.device) -> None:
    """Print the speed of generating and decoding pictures with random weights."""
    size, px = (args.bench + ["B", "336"][len(args.bench):])[:2]
    hita.check(size in hita.LLAMA_SIZES and px.isdecimal() and int(px) % 16 == 0 and 16 <= int(px) <= 1024,
               f"--bench {size} {px}: the sizes are {', '.join(hita.LLAMA_SIZES)}, the pixels multiples of 16 up to 1024")
    cfg = hita.LlamaConfig(**hita.LLAMA_SIZES[size], grid=int(px) // 16)
    with device:
        llama, tokenizer = hita.Llama(cfg).eval(), hita.HitaTokenizer(hita.TokenizerConfig(image_size=int(px))).eval()
    prepare(tokenizer, llama, device, args.compile)
    sampler = hita.Sampler(llama, args.num, args.cfg_scale, args.temperature, args.top_k, args.top_p)
    class_ids, T = torch.zeros(args.num, dtype=torch.int64, device=device), sampler.total
    weights = sum(p.numel() for p in llama.blocks.parameters()) + cfg.dim * cfg.codebook_size           # read at each step
    cache = sum(x.numel() for x in sampler.caches) / sampler.caches[0].shape[3] * (T + 1) / 2           # the filled half
    title = f"{size}, {px} px, {llama.norm.weight.dtype}, batch {args.num}, guidance {args.cfg_scale}"
    hita.measure(f"generate {title}", lambda: sampler(class_ids), device, args.num, T,
                 read=T * (weights + cache) * llama.norm.weight.element_size())
    ids = sampler(class_ids)
    hita.measure(f"decode {px} px, batch {args.num}", lambda: decode(tokenizer, *ids, native=True), device, args.num)


def write_pictures(pictures: torch.Tensor, labels: list[str], image: Path, columns: int, single: bool) -> None:
    """Write the grid and, if asked, each picture as <image>/<class>-<number>.png. Raises HitaError if that is impossible."""
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        hita.save_grid(pictures, image, columns)
        if single:
            image.with_suffix("").mkdir(exist_ok=True)
            for i, (picture, label) in enumerate(zip(pictures, labels)):
                name = re.sub(r"[^\w.-]", "_", label)[:60]
                hita.save_grid(picture[None], image.with_suffix("") / f"{name}-{i:04d}.png", 1)
    except OSError as e:
        raise hita.HitaError(f"cannot write {image} ({hita.short(e)}); choose another place with --image x.png") from e


def main():
    args = parse_args()
    if args.list:
        return list_models()
    hita.check(1 <= args.num <= 10_000, f"--num is {args.num}, it must lie between 1 and 10000")
    hita.check(0 <= args.seed < 2 ** 32, f"--seed is {args.seed}, it must lie between 0 and {2 ** 32 - 1}")
    hita.check_sampling(args.cfg_scale, args.temperature, args.top_k, args.top_p)
    if args.bench is not None:
        return bench(args, hita.start(args.device))
    hita.check(0 < args.keep < 1, f"--keep is {args.keep}, it must lie between 0 and 1")
    for path in sum((x for x in (args.reconstruct, args.style, args.styles, args.complete) if x), []):
        hita.check(Path(path).is_file(), f"there is no picture {path}")
    hita.check(not args.complete or args.classes, "--complete needs --class: one for all pictures, or one for each")
    hita.check(not (args.complete or args.keep_globals) or args.num <= CHUNK, f"--num is {args.num}, here at most {CHUNK} are made")
    hita.check(not args.random_labels or args.count, "--random-labels is for --count")
    hita.check(bool(args.style) == bool(args.styles), "--style and --from belong together: contents and styles")
    hita.check(args.count is None or args.npz and 1 <= args.count <= 10 ** 7, "--count is 1 to 10000000 and needs --npz FILE")
    uses = {"reconstruct": reconstruct, "style": transfer_style, "complete": complete, "keep_globals": keep_globals}
    asked = [name for name in uses if getattr(args, name)]
    hita.check(len(asked) + bool(args.npz) + bool(args.fd) <= 1, "one thing at a time: --reconstruct, --style, --complete, "
               "--keep-globals, --npz or --fd")
    image = Path(args.image or Path(args.out or "out") / f"{(asked + ['samples'])[0].replace('_', '-')}.png")
    hita.check(image.suffix.lower() in hita.IMAGE_TYPES, f"--image is {image}, its ending must be that of a picture, as .png")
    device = hita.start(args.device)
    hita.check(args.npz or hita.world() == 1, "several processes are for --npz FILE; without it leave out torchrun")
    if args.fd:
        return print_distance(args, device)
    if not asked:
        return generate(args, device, image)
    pictures, columns = uses[asked[0]](args, device)
    write_pictures(pictures, [], image, columns, single=False)
    print(image)


def generate(args, device: torch.device, image: Path) -> None:
    """Pictures of classes: a grid of --num of each, or with --npz a file. The processes share the chunks, and each chunk has a
    seed of its own, so that the pictures do not depend on the number of processes."""
    tokenizer, llama, names, chosen = load(args)
    prepare(tokenizer, llama, device, args.compile)
    class_ids = torch.tensor(chosen).repeat_interleave(args.num)
    if args.count:
        classes = chosen if args.classes else range(len(names))
        order = torch.arange(args.count) % len(classes)
        if args.random_labels:
            order = torch.randint(len(classes), (args.count,), generator=torch.Generator().manual_seed(args.seed))
        class_ids = torch.tensor(classes)[order]
    side = tokenizer.cfg.image_size if args.native else hita.published_size(tokenizer.cfg.image_size)
    file = hita.PictureFile(Path(args.npz), len(class_ids), side) if args.npz else None
    start, pictures, sampler = time.time(), [], None
    generator, chunks = torch.Generator(device), class_ids.to(device).split(CHUNK)
    mine = range(hita.rank(), len(chunks), hita.world())
    for c in hita.bar(mine, "pictures", hita.rank() == 0 and len(mine) > 1, CHUNK * hita.world()):
        if sampler is None or len(chunks[c]) < CHUNK:
            sampler = hita.Sampler(llama, len(chunks[c]), args.cfg_scale, args.temperature, args.top_k, args.top_p)
        generator.manual_seed((args.seed + c * 2654435761) % 2 ** 32)  # the CPU's generator heeds 32 bits only
        made = decode(tokenizer, *sampler(chunks[c], generator, progress=hita.rank() == 0), args.native)
        file.put(c * CHUNK, made) if file else pictures.append(made)
    if file:
        file.close()
    else:
        write_pictures(torch.cat(pictures), [names[i] for i in class_ids], image, args.num, args.single)
    seconds = time.time() - start
    if hita.rank() == 0:
        what = f"{len(class_ids)} pictures" if args.count else f"{', '.join(names[i] for i in chosen)}, {args.num} each,"
        print(f"{what} in {seconds:.1f} s ({len(class_ids) / seconds:.2f} images/s): {args.npz or image}")


if __name__ == "__main__":
    hita.run(main)
