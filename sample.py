"""Generate pictures of a class with a trained Llama and its tokenizer.

    python sample.py --class face-happy                   eight pictures, as one grid
    python sample.py --class 3 flag weather --num 16      several classes, one after another
    python sample.py --class fruit --cfg-scale 3 --temperature 0.9 --top-k 200 --top-p 0.95 --seed 7 --single

The checkpoints are those that train_tokenizer.py and train_ar.py left in the run directory.
"""

import difflib
import time
from pathlib import Path

import torch

import hita

CHUNK = 64  # pictures made at once, so that the memory of the models does not grow with --num


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
    parser.add_argument("--out", default="out", help="run directory with tokenizer.pt and llama.pt [out]")
    parser.add_argument("--tokenizer", help="tokenizer checkpoint [tokenizer.pt in the run directory]")
    parser.add_argument("--llama", help="Llama checkpoint [llama.pt in the run directory]")
    parser.add_argument("--image", help="grid to write [samples.png in the run directory]")
    parser.add_argument("--single", action="store_true", help="also write each picture, into a folder beside the grid")
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    return parser.parse_args()


def class_indices(asked: list[str] | None, names: list[str]) -> list[int]:
    """Class names or indices as typed -> indices. Raises HitaError for one that the model does not have."""
    if asked is None:
        return hita.spread(len(names))
    indices = []
    for word in asked:
        if word in names:
            indices.append(names.index(word))
        elif word.lstrip("-").isdecimal():
            hita.check(0 <= int(word) < len(names),
                       f"class {word} is out of range, this model has classes 0 to {len(names) - 1}")
            indices.append(int(word))
        else:
            near = difflib.get_close_matches(word, names, n=3, cutoff=0.4) or names[:3]
            raise hita.HitaError(f"no class is called {word}; near it: {', '.join(near)} (of {len(names)} classes)")
    return indices


def load(args) -> tuple[hita.HitaTokenizer, hita.Llama, list[str]]:
    """-> tokenizer, Llama, class names. Raises HitaError if the two do not belong together."""
    tokenizer_path = Path(args.tokenizer or Path(args.out) / "tokenizer.pt")
    llama_path = Path(args.llama or Path(args.out) / "llama.pt")
    tokenizer, llama = hita.load_tokenizer(tokenizer_path), hita.load_llama(llama_path)
    data = hita.read_checkpoint(llama_path, "llama")
    hita.check(data.get("tokenizer") in (None, hita.fingerprint(tokenizer)),
               f"{llama_path} was trained on another tokenizer than {tokenizer_path}; train it again with `python train_ar.py`")
    print(f"using {tokenizer_path} and {llama_path} ({data.get('step', 'unknown number of')} steps)", flush=True)
    return tokenizer, llama, data.get("classes") or [str(i) for i in range(llama.cfg.num_classes)]


def write_pictures(images: torch.Tensor, labels: list[str], image: Path, columns: int, single: bool) -> None:
    """Write the grid and, if asked, each picture as <image>/<class>-<number>.png. Raises HitaError if that is impossible."""
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        hita.save_grid(images, image, columns)
        if single:
            image.with_suffix("").mkdir(exist_ok=True)
            for i, (picture, label) in enumerate(zip(images, labels)):
                hita.save_grid(picture[None], image.with_suffix("") / f"{label}-{i:04d}.png", 1)
    except OSError as e:
        raise hita.HitaError(f"cannot write {image} ({hita.short(e)}); choose another place with --image x.png") from e


def main():
    args = parse_args()
    hita.check(args.num >= 1, f"--num is {args.num}, it must be at least 1")
    image = Path(args.image or Path(args.out) / "samples.png")
    hita.check(image.suffix.lower() in hita.IMAGE_TYPES, f"--image is {image}, its ending must be that of a picture, as .png")
    device = hita.start(args.device, args.seed)
    tokenizer, llama, names = load(args)
    tokenizer, llama = tokenizer.to(device), llama.to(device)
    chosen = class_indices(args.classes, names)
    class_ids = torch.tensor(chosen, device=device).repeat_interleave(args.num)
    generator = torch.Generator(device).manual_seed(args.seed)
    start, images = time.time(), []
    chunks = class_ids.split(CHUNK)
    for chunk in hita.bar(chunks, "pictures", len(chunks) > 1, CHUNK):
        ids = llama.generate(chunk, args.cfg_scale, args.temperature, args.top_k, args.top_p, generator,
                             progress=len(chunks) == 1)
        images.append(tokenizer.decode(*ids).clamp(-1, 1).cpu())
    seconds = time.time() - start
    write_pictures(torch.cat(images), [names[i] for i in class_ids], image, args.num, args.single)
    print(f"{len(class_ids)} pictures of {', '.join(names[i] for i in chosen)} in {seconds:.1f} s "
          f"({len(class_ids) / seconds:.2f} images/s): {image}")


if __name__ == "__main__":
    hita.run(main)
