"""Generate pictures of a class with a trained Llama and its tokenizer, yours or the authors'.

    python sample.py --class face-happy                   eight pictures, as one grid, with the model in the run directory
    python sample.py --class 3 flag weather --num 16      several classes, one after another
    python sample.py --class fruit --cfg-scale 3 --temperature 0.9 --top-k 200 --top-p 0.95 --seed 7 --single
    python sample.py --list                               the released ImageNet models
    python sample.py --model hita-u-l-250e --class 207 "tabby"
    python sample.py --bench XL 336 --num 64 --compile    speed of size XL at 336 px, with random weights

Where nothing has been trained, a released model that runs on a laptop is downloaded and used.
"""

import difflib
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
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
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    parser.add_argument("--compile", action="store_true", help="torch.compile first, which takes a minute; for many pictures")
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


def decode(tokenizer: hita.HitaTokenizer, global_ids: torch.Tensor, patch_ids: torch.Tensor, native: bool) -> torch.Tensor:
    """Ids (B, M), (B, N) -> pictures (B, 3, S, S) as uint8 on the CPU; of 336 px S becomes 256 unless native."""
    pictures = []
    for ids in zip(global_ids.split(DECODED), patch_ids.split(DECODED)):
        with torch.autocast(global_ids.device.type, torch.bfloat16, enabled=global_ids.is_cuda):
            x = tokenizer.decode(*ids).float()
        if x.shape[-1] == 336 and not native:
            x = F.interpolate(x, 256, mode="bicubic")  # without antialiasing, as for the published figures
        pictures.append(hita.to_uint8(x).cpu())
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
    image = Path(args.image or Path(args.out or "out") / "samples.png")
    hita.check(image.suffix.lower() in hita.IMAGE_TYPES, f"--image is {image}, its ending must be that of a picture, as .png")
    device = hita.start(args.device)
    tokenizer, llama, names, chosen = load(args)
    prepare(tokenizer, llama, device, args.compile)
    class_ids = torch.tensor(chosen, device=device).repeat_interleave(args.num)
    generator = torch.Generator(device).manual_seed(args.seed)
    start, pictures, sampler = time.time(), [], None
    chunks = class_ids.split(CHUNK)
    for chunk in hita.bar(chunks, "pictures", len(chunks) > 1, CHUNK):
        if sampler is None or len(chunk) < CHUNK:
            sampler = hita.Sampler(llama, len(chunk), args.cfg_scale, args.temperature, args.top_k, args.top_p)
        pictures.append(decode(tokenizer, *sampler(chunk, generator, progress=True), args.native))
    seconds = time.time() - start
    write_pictures(torch.cat(pictures), [names[i] for i in class_ids], image, args.num, args.single)
    print(f"{', '.join(names[i] for i in chosen)}, {args.num} each, in {seconds:.1f} s "
          f"({len(class_ids) / seconds:.2f} images/s): {image}")


if __name__ == "__main__":
    hita.run(main)
