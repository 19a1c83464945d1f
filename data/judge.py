"""A yardstick for pictures of the embedded classes: are they recognised, near to real ones, varied?

    python data/judge.py                       the pair in out/ or, where there is none, prints
    python data/judge.py out-mine --cfg-scale 6 --top-k 0 --num 12
    python data/judge.py --train               the judge anew, into data/judge.pt

The judge is a small conv net, trained on the training pictures in grey, bent and blurred: it knows
drawings, not palettes. From Python: `from data import judge; judge.score(images, class_ids)`.
"""

import sys
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms as T
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import hita
import sample


def network() -> nn.Sequential:
    """Grey images (B, 1, 64, 64) -> logits (B, 50); without its last layer features (B, 112)."""
    widths = 1, 24, 48, 48, 80, 80, 112, 112  # where they grow, the resolution halves
    convs = [nn.Sequential(nn.Conv2d(a, b, 3, 1 + (a < b), padding=1, bias=False),
                           nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(widths, widths[1:])]
    end = nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(112, 50)
    return nn.Sequential(*convs, *end)


def grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), each with mean 0 and deviation 1."""
    return F.layer_norm(images.clamp(-1, 1).mean(1, keepdim=True), (1, *images.shape[2:]))


@lru_cache
def load() -> nn.Sequential:
    """The network of judge.pt, in eval mode, on the CPU."""
    judge = network()
    judge.load_state_dict(torch.load(HERE / "judge.pt", weights_only=True))
    return judge.eval()


@lru_cache
def real(split: str) -> tuple[Tensor, Tensor, list[str]]:
    """The embedded pictures of a split, (n, 3, 64, 64), their class ids (n,), 50 names."""
    data = hita.Pictures(hita.embedded_data(), split, 64)
    images, class_ids = zip(*(data[i] for i in range(len(data))))
    return torch.stack(images), torch.tensor(class_ids), data.classes


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """What the judge sees in images (B, 3, 64, 64), before its last layer -> (B, 112)."""
    return torch.cat([load()[:-1](grey(part)) for part in images.split(100)])


def colours(images: Tensor) -> Tensor:
    """Means and deviations of the colours of images, and means of 3 x 3 parts -> (B, 33)."""
    parts = F.adaptive_avg_pool2d(images, 3).flatten(1)  # (B, 27)
    return torch.cat([images.mean((2, 3)), images.std((2, 3)), parts], dim=1)


def thumbnails(images: Tensor) -> Tensor:
    """Grey pictures of 16 x 16 as vectors of length 1 (B, 256), whose products are correlations."""
    return F.normalize(F.adaptive_avg_pool2d(grey(images), 16).flatten(1), dim=1)


@lru_cache
def training_thumbnails() -> Tensor:
    """Thumbnails of all training pictures and of their mirror images, since training shows both."""
    known, _, _ = real("train")
    return torch.cat([thumbnails(known), thumbnails(known.flip(-1))])


def nearness(images: Tensor) -> Tensor:
    """The largest correlation of each image with a training picture or its mirror image, (B,)."""
    return (thumbnails(images) @ training_thumbnails().T).amax(dim=1)


def distance_within(images: Tensor, class_ids: Tensor) -> Tensor:
    """Mean distance, 1 - correlation, of two images of the same class."""
    small = thumbnails(images)
    pairs = (class_ids[:, None] == class_ids).triu(1)  # (B, B)
    return (1 - small @ small.T)[pairs].mean()


def training_pictures_like(class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Training pictures, as many of each class as class_ids has, evenly spread, and their ids."""
    known, known_ids, _ = real("train")
    chosen = []
    for c, count in enumerate(class_ids.bincount(minlength=50).tolist()):
        places = (known_ids == c).nonzero()[:, 0]
        chosen.append(places[torch.linspace(0, len(places) - 1, count).round().long()])
    chosen = torch.cat(chosen)
    return known[chosen], known_ids[chosen]


@torch.no_grad()
def score(images: Tensor, class_ids: Tensor, recon: Tensor | None = None) -> dict[str, float]:
    """Figures of images (B, 3, 64, 64) in [-1, 1] that should show class_ids (B,).

    top1, top5: share whose class is the judge's first guess, or among its first five.
    fd: Fréchet distance of its features to those of as many training pictures of each class;
    fd_colours: the same of colours. Both fall as B rises, so compare equal numbers.
    inception_score: exp of the mean KL(p(class | image) || p(class)).
    copies: share nearer to a training picture or its mirror image than 95 % of recon are, or of the
    validation pictures.
    spread: mean distance of two images of a class, 1 as in training.
    Raises HitaError for other shapes."""
    hita.check(images.shape[1:] == (3, 64, 64), f"images are {images.shape}, not (B, 3, 64, 64)")
    hita.check_ids("class_ids", class_ids, (len(images),), 50)
    images = images.clamp(-1, 1)
    like, like_ids = training_pictures_like(class_ids)

    of_images = features(images)  # (B, 112)
    log_p = load()[-1](of_images).log_softmax(dim=1)  # (B, 50)
    hits = log_p.topk(5).indices == class_ids[:, None]  # (B, 5)
    gain = (log_p.exp() * (log_p - log_p.exp().mean(dim=0).log())).sum(dim=1)  # (B,)
    limit = nearness(real("val")[0] if recon is None else recon).quantile(0.95)
    figures = {
        "top1": hits[:, 0].float().mean(),
        "top5": hits.any(dim=1).float().mean(),
        "fd": frechet_distance(of_images, features(like)),
        "inception_score": gain.mean().exp(),
        "fd_colours": frechet_distance(colours(images), colours(like)),
        "copies": (nearness(images) > limit).float().mean(),
        "spread": distance_within(images, class_ids) / distance_within(like, like_ids)}
    return {name: float(x) for name, x in figures.items()}


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """The Fréchet distance of features (n, D) and (m, D), as in FID:
    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2)"""
    C_a, C_b = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(C_a @ C_b).real.clamp(min=0).sqrt().sum()  # its trace
    return (a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * root


def train(seed: int, steps: int = 2000) -> None:
    """Train the judge and write judge.pt in half precision. The same seed gives the same judge."""
    torch.manual_seed(seed)
    (images, class_ids, _), judge = real("train"), network()
    bend = T.Compose([T.RandomHorizontalFlip(), T.RandomAffine(6, (0.1, 0.1), (0.85, 1.2)),
                      T.RandomApply([T.GaussianBlur(9, (0.5, 3.0))], 0.75)])
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in tqdm(range(steps), "training the judge"):
        chosen = torch.randint(len(images), (128,))
        logits = judge(grey(torch.cat([bend(part) for part in images[chosen].split(8)])))
        optimizer.zero_grad()
        F.cross_entropy(logits, class_ids[chosen], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    hita.write_file(HERE / "judge.pt", partial(torch.save, judge.half().state_dict()))


def main() -> None:
    parser = hita.Parser(__doc__)
    add = partial(parser.add_argument, metavar="X")
    add("out", nargs="?", default="out", metavar="OUT", help="run directory [out]")
    add("--llama", help="file or name [llama.pt in OUT or, where nothing was trained, prints]")
    add("--tokenizer", help="file or name [the Llama's own]")
    add("--cfg-scale", type=float, help="guidance [2; prints: 4]")
    add("--top-k", type=int, help="draw from the k likeliest ids, 0 from all [0; prints: 8]")
    add("--num", type=int, default=12, help="samples of each class [12]")
    add("--seed", type=int, default=0, help="of the samples, or of --train [0]")
    parser.add_argument("--train", action="store_true", help="train the judge anew")
    args = parser.parse_args()
    if args.train:
        return train(args.seed)

    own = Path(args.out, "llama.pt")
    path = args.llama
    if path is None:
        path = "prints" if args.out == "out" and not own.exists() else own
    tokenizer, llama = hita.load(path, args.tokenizer)
    hita.add_dino(tokenizer)
    images, class_ids, classes = real("val")
    hita.check(llama.classes == classes, f"{path} draws other classes than the embedded ones")
    settings = (sample.PRINTS if path == "prints" else sample.OTHERS) | {"seed": args.seed}
    for name in ("cfg_scale", "top_k"):
        given = getattr(args, name)
        settings[name] = settings[name] if given is None else given

    asked = torch.arange(50).repeat_interleave(args.num)
    recon = sample.decode(tokenizer, *tokenizer.encode(images))
    drawn = []
    for part in tqdm(asked.split(10 * args.num), "ten classes a step"):
        drawn.append(sample.decode(tokenizer, *llama.generate(part, **settings)))
    columns = [score(images, class_ids, recon), score(recon, class_ids, recon),
               score(torch.cat(drawn), asked, recon)]
    print(f"{path}, {settings}")
    print_table(columns, [len(images), len(images), len(asked)])


def print_table(columns: list[dict], numbers: list[int]) -> None:
    """Print the figures of validation pictures, reconstructions and samples. Shares have standard
    errors."""
    by_chance = {"top1": 0.02, "top5": 0.1, "copies": 0.05}
    print(f"{'':15}{'validation':>16}{'reconstructed':>19}{'samples':>19}{'by chance':>15}")
    for name in columns[0]:
        line = f"{name:15}"
        for column, n in zip(columns, numbers):
            p = column[name]
            error = f"± {(p * (1 - p) / n) ** 0.5:.3f}" if name in by_chance else ""
            line += f"{p:11.3f} {error:7}"
        print(f"{line}{by_chance.get(name, ''):>12}")


if __name__ == "__main__":
    hita.run_script(main)
