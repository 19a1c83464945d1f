"""Train the Hita tokenizer: images <-> global and patch token ids.

    python train_tokenizer.py                                    the demo: embedded emoji pictures, minutes on a laptop CPU
    torchrun --nproc_per_node 8 train_tokenizer.py --preset hita-v --data imagenet      the released model
    python train_tokenizer.py --steps 6000 --out out-long        the demo, longer
    python train_tokenizer.py --k 0                              an ablation: globals may be ignored

--data DIR holds train/<class>/<pictures> and, if there is a validation split, val/<class>/<pictures>.
The run directory gets tokenizer.pt (weights, EMA weights, optimizers), tokenizer.jsonl (one line of figures per log
interval) and tokenizer-<step>.png (originals beside reconstructions).
"""

import dataclasses
import json
import time
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

import hita
from hita import option


@dataclass
class Training:
    """The recipe. The defaults are the released one (50 epochs of ImageNet); one epoch is 5,004 steps there."""
    steps: int = option(250_200, "optimizer steps")
    batch_size: int = option(256, "pictures per step, over all processes")
    lr: float = option(1e-4, "learning rate of generator and discriminator")
    lr_final: float = option(1e-4, "learning rate at the end of the generator's cosine schedule")
    warmup: int = option(20_016, "steps of linear warm-up of the generator")
    clip: float = option(1.0, "gradient norm is clipped to this, separately for generator and discriminator")
    ema: float = option(0.9999, "decay of the averaged weights")
    lpips_weight: float = option(1.0, "weight of the perceptual loss")
    gan_weight: float = option(0.5, "weight of the adversarial loss")
    gan_start: int = option(20_000, "step at which the discriminator and its loss come in")
    gan_width: int = option(64, "channels of the discriminator's first layer")
    crop_range: float = option(0.8, "augmentation: random crops show between this share of a picture's side and all of it")
    seed: int = option(0, "seed of weights, data order and augmentation")
    log_every: int = option(100, "steps between log lines")
    eval_every: int = option(5000, "steps between evaluations, pictures and checkpoints")
    workers: int = option(8, "data loader processes; 0 loads in this one")

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "eval_every", "gan_width", "gan_start", "lr", "lr_final", "clip"):
            hita.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, it must be positive")
        for name in ("warmup", "lpips_weight", "gan_weight", "workers", "seed"):
            hita.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must be 0 or more")
        hita.check(0 < self.crop_range <= 1, f"crop_range is {self.crop_range}, it must be in (0, 1]")
        hita.check(0 <= self.ema < 1, f"ema is {self.ema}, it must be in [0, 1)")


RECIPES = {
    "hita-v": Training(),
    "hita-u": Training(),
    "emoji": Training(steps=600, batch_size=32, lr=1e-3, lr_final=1e-4, warmup=50, ema=0.99, lpips_weight=0.0, gan_weight=0.1,
                      gan_start=400, gan_width=32, crop_range=1.0, log_every=20, eval_every=200, workers=0),
}


def parse_args():
    """Command line -> (arguments, tokenizer configuration, recipe). The preset gives the defaults of all other flags."""
    first = hita.Parser(__doc__)
    first.add_argument("--preset", choices=list(RECIPES), default="emoji", help="model and recipe to start from [emoji]")
    preset = first.parse_known_preset()
    first.add_argument("--data", help="folder with train/<class>/<pictures> and val/... [the embedded emoji pictures]")
    first.add_argument("--out", default="out", help="run directory [out]")
    first.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    first.add_argument("--dino-file", help="DINOv2 weights, the original .pth or timm's .safetensors [from the Hub]")
    first.add_config("model", hita.TOKENIZERS[preset])
    first.add_config("training", RECIPES[preset])
    args = first.parse_args()
    if getattr(args, "num_global", None) == 0 and not hasattr(args, "k"):
        args.k = 0  # nothing to replace patches with
    return args, hita.override(hita.TOKENIZERS[preset], args), hita.override(RECIPES[preset], args)
