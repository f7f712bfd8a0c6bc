"""Train the digits model and write everything that stands beside this file except config.pbtxt.

    python models/digits/train.py          # from the checkout's root; about a minute on two cores

Writes 1/model.pt2 (the model, exported), labels.txt, samples/ (pictures of held-out digits) and README.md (the card).
Every figure on the card is measured here, on the archive as it was saved and loaded again, not on the net in memory.
Seeded: the same versions on the same machine give the same archive, byte for byte.
"""

import datetime as dt
import hashlib
import io
import json
import platform
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import sklearn
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
# A script's own folder is on the path, the checkout's root is not; the pictures are read by the server's own code.
sys.path.insert(0, str(HERE.parent.parent))

from asgi_app.pictures import ink, open_picture  # noqa: E402

SEED = 20
HELD_OUT = 0.2
DRAWINGS = 4  # per training digit
EPOCHS = 40
BATCH = 64
MAX_BATCH = 32  # what config.pbtxt promises
SIDES = (16, 400)  # of a drawn digit, in pixels
PAPERS = (190, 255)  # grey levels, dark on light; the other way round they are mirrored
INKS = (0, 89)
QUALITIES = (50, 95)  # of JPEG and WebP
BAR = 0.98
MAX_BYTES = 300_000
MAX_PIXELS = 4_000_000
COMMAND = "python models/digits/train.py"

Array = NDArray[np.float32]


class Digits(nn.Module):
    """float32 [batch, 1, 8, 8], 0 = paper to 1 = ink -> float32 [batch, 10], the probability of each digit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def logits(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.layers(pixels)
        return scores

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits(pixels).softmax(dim=1)


# -- pictures of digits ------------------------------------------------------------------------------------------------


def draw(
    digit: Array, side: int, margins: tuple[int, int, int, int], paper: int, colour: int, pen: bool
) -> Image.Image:
    """A digit, float32 [8, 8], enlarged to `side` pixels with margins (left, top, right, bottom), as a grey picture.

    A cell of paper is put around it first: strokes end inside the picture. `pen` draws with hard edges, as a pen does,
    instead of the soft ones that enlarging leaves.
    """
    cells = Image.fromarray(np.uint8(np.round(255 * np.pad(digit, 1))))
    soft = cells.resize((side, side), Image.Resampling.BICUBIC)
    left, top, right, bottom = margins
    mask = Image.new("L", (side + left + right, side + top + bottom), 0)
    mask.paste(soft, (left, top))
    strength = np.asarray(mask, dtype=np.float32) / 255
    if pen:
        strength = np.clip((strength - 0.4) * 6 + 0.5, 0, 1)
    return Image.fromarray(np.uint8(np.round(paper + (colour - paper) * strength)))


def draw_at_random(digit: Array, light_on_dark: bool, random: np.random.Generator) -> Image.Image:
    """Any size and margin, soft or hard edges, paper and ink of any grey that leaves contrast, a little noise."""
    side = int(random.integers(*SIDES, endpoint=True))
    left, top, right, bottom = (int(margin) for margin in random.integers(0, side // 2, 4, endpoint=True))
    paper, colour = (int(random.integers(*levels, endpoint=True)) for levels in (PAPERS, INKS))
    if light_on_dark:
        paper, colour = 255 - paper, 255 - colour
    grey = np.asarray(
        draw(digit, side, (left, top, right, bottom), paper, colour, bool(random.integers(2))), dtype=np.float32
    )
    noisy = grey + random.normal(0, random.uniform(0, 4), grey.shape)
    return Image.fromarray(np.uint8(np.clip(np.round(noisy), 0, 255)))


def encode(picture: Image.Image, form: str, quality: int) -> bytes:
    body = io.BytesIO()
    picture.save(body, form, **({} if form == "PNG" else {"quality": quality}))
    return body.getvalue()


def seen(body: bytes) -> Array:
    """What the server makes of a picture's bytes: float32 [1, 8, 8]."""
    return ink(open_picture(body, MAX_PIXELS), 8, 8)


# -- training ----------------------------------------------------------------------------------------------------------


def augment(pixels: Tensor) -> Tensor:
    """Shifted, turned, stretched and re-inked at random, each a little: float32 [n, 1, 8, 8] -> the same."""
    n = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high)

    turn, across, down = uniform(-0.2, 0.2), uniform(0.85, 1.15), uniform(0.92, 1.08)
    # Half the box is 1 in affine_grid's measure, so a cell is 0.25.
    right, below = uniform(-0.2, 0.2), uniform(-0.1, 0.1)
    cos, sin = turn.cos(), turn.sin()
    maps = torch.stack(
        (torch.stack((cos / across, -sin, right), 1), torch.stack((sin, cos / down, below), 1)),
        1,
    )
    grid = functional.affine_grid(maps, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, align_corners=False)
    inked = moved.clamp(1e-6, 1) ** uniform(0.6, 1.5).view(n, 1, 1, 1)  # a thin pen to a thick one
    return (inked + 0.03 * torch.randn_like(inked)).clamp(0, 1)


def train(pixels: Tensor, labels: Tensor) -> Digits:
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    started = time.monotonic()
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        order = torch.randperm(len(pixels))[: len(pixels) // BATCH * BATCH]
        for rows in order.split(BATCH):
            loss = functional.cross_entropy(model.logits(augment(pixels[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * BATCH
        if epoch == 1 or epoch % 5 == 0:
            say(f"epoch {epoch:3} of {EPOCHS}: loss {total / len(order):.4f}, {time.monotonic() - started:.0f} s")
    return model.eval().requires_grad_(False)


# -- the archive -------------------------------------------------------------------------------------------------------


def save(model: Digits, path: Path) -> Callable[[Tensor], Tensor]:
    """Export, save, check what was saved; returns the archive's model, loaded again."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    # Three rows: an example of one row or none would fix the batch at that.
    program = torch.export.export(model, (torch.rand(3, 1, 8, 8),), dynamic_shapes={"pixels": {0: batch}})
    # The example is the one thing that torch.export.save pickles, and the traces hold this machine's paths.
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    path.parent.mkdir(exist_ok=True)
    torch.export.save(program, path)

    check(path.stat().st_size < MAX_BYTES, f"{path.name} is {path.stat().st_size} bytes, more than {MAX_BYTES}")
    check(not pickles(path), f"{path.name} holds pickles: {pickles(path)}")
    saved = torch.export.load(path).module()
    for rows in (1, 2, 3, MAX_BATCH):
        pixels = torch.rand(rows, 1, 8, 8)
        apart = float((saved(pixels) - model(pixels)).abs().max())
        check(apart < 1e-5, f"at batch {rows} the archive is {apart} from the net in memory")
    return saved


def pickles(path: Path) -> list[str]:
    """The archive's members that torch.export.load would unpickle."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if "/data/sample_inputs/" in member.filename and member.file_size:
                found.append(member.filename)
            if member.filename.endswith("_config.json"):
                payloads = json.loads(archive.read(member))["config"]
                found += [name for name, payload in payloads.items() if payload["use_pickle"]]
    return found


def probabilities(model: Callable[[Tensor], Tensor], pixels: Array) -> Array:
    """float32 [n, 1, 8, 8] -> float32 [n, 10], in batches such as the server makes."""
    return torch.cat([model(batch) for batch in torch.from_numpy(pixels).split(MAX_BATCH)]).numpy()


def answers(model: Callable[[Tensor], Tensor], pixels: Array) -> NDArray[np.int64]:
    """float32 [n, 1, 8, 8] -> int64 [n], the likeliest digit of each."""
    likeliest: NDArray[np.int64] = probabilities(model, pixels).argmax(axis=1)
    return likeliest


# -- what stands beside it ---------------------------------------------------------------------------------------------


def write_samples(folder: Path, model: Callable[[Tensor], Tensor], digits: Array, labels: NDArray[np.int64]) -> None:
    """One picture per digit, 200 x 200: of the held-out digits of each kind the one that the model is surest of."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    forms = {3: ("JPEG", ".jpg"), 8: ("WEBP", ".webp")}
    for label in range(10):
        paper, colour = (20, 235) if label in (4, 6) else (255, 20)
        form, suffix = forms.get(label, ("PNG", ".png"))
        pictures = [draw(digit, 180, (10, 10, 10, 10), paper, colour, pen=True) for digit in digits[labels == label]]
        bodies = [encode(picture, form, 80) for picture in pictures]
        certainty = probabilities(model, np.stack([seen(body) for body in bodies]))
        best = int(certainty[:, label].argmax())
        check(certainty[best].argmax() == label, f"not one held-out {label} is read right from its picture")
        (folder / f"{label}{suffix}").write_bytes(bodies[best])


CARD = """\
# digits: which digit is in the picture

*Written by `{command}`, every figure measured by it; do not edit.*

A small convolutional net that reads one handwritten digit. Input `pixels`, float32 [batch, 1, 8, 8], 0 = paper to
1 = ink; output `probabilities`, float32 [batch, 10], the digits 0 to 9 (`labels.txt`). `asgi_app/pictures.py` makes
the pixels out of a PNG, JPEG or WebP picture.

## How good it is

On {held_out} digits that it was not trained on, by the saved archive, loaded again:

| held-out digits | right | accuracy |
| --- | --- | --- |
| (a) as they are, 8 x 8 | {raw_right} of {held_out} | {raw:.4f} |
| (b) as pictures, read from their bytes | {drawn_right} of {held_out} | {drawn:.4f} |
{parts}

(b) draws each digit once: {sides[0]} to {sides[1]} pixels high, with margins of its own on each side, hard or soft
edges, paper and ink of any grey at least {contrast} of 255 levels apart, a little noise; dark on light and light on
dark; as PNG, or as JPEG or WebP of quality {qualities[0]} to {qualities[1]}.

What these figures do not say: the split is by digit, not by writer, so the same hands wrote both parts, and the
pictures are enlarged from 8 x 8, not photographed. How `asgi_app/pictures.py` places a digit in its box was taken from
all of the data, held-out digits included. It knows digits and nothing else: a letter gets a digit's name.

## How it was made

| | |
| --- | --- |
| data | scikit-learn's `load_digits`: {total} digits, the test part of UCI's *Optical Recognition of Handwritten \
Digits* (E. Alpaydin, C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0) |
| split | {trained} to train, {held_out} held out ({share:.0%}), stratified by digit, seed {seed} |
| training | each training digit as it is and as {drawings} drawn pictures; shifted, turned, stretched and re-inked a \
little at random; {epochs} epochs, the last one kept; the held-out digits were looked at after each of a few \
runs while the script was written, so the figures may flatter a little |
| size | {parameters} parameters; `1/model.pt2` has {bytes} bytes, no pickle among them |
| sha256 of `1/model.pt2` | `{sha256}` |
| versions | Python {python}, torch {torch}, scikit-learn {sklearn}, Pillow {pillow}, numpy {numpy} |
| command | `{command}` |
| seed | {seed} |
| date | {date} |
| the whole run took | {seconds:.0f} s |

`samples/` holds one picture for each of the ten, drawn from the held-out digits, each the one of its kind that the
model is surest of: they show the way, they prove nothing. The file's name is the answer.
"""


def main() -> None:
    started = time.monotonic()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)  # sums depend on how they are divided
    torch.use_deterministic_algorithms(True)
    random = np.random.default_rng(SEED)

    data = load_digits()
    digits, labels = (data.images / 16).astype(np.float32), data.target.astype(np.int64)
    trained, held_out, trained_labels, held_out_labels = train_test_split(
        digits, labels, test_size=HELD_OUT, stratify=labels, random_state=SEED
    )
    say(f"{len(trained)} digits to train, {len(held_out)} held out; drawing {DRAWINGS} pictures of each")
    pixels, targets = [trained[:, np.newaxis]], [trained_labels]
    for number in range(DRAWINGS):
        pictures = (draw_at_random(digit, number % 2 == 1, random) for digit in trained)
        pixels.append(np.stack([ink(picture, 8, 8) for picture in pictures]))
        targets.append(trained_labels)
    net = train(torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(targets)))

    path = HERE / "1" / "model.pt2"
    model = save(net, path)
    say(f"saved {path.relative_to(HERE)}, {path.stat().st_size} bytes")

    raw = answers(model, held_out[:, np.newaxis]) == held_out_labels
    light_on_dark = random.permutation(np.arange(len(held_out)) % 2 == 1)
    forms = random.permutation(np.resize(np.array(["PNG", "JPEG", "WEBP"]), len(held_out)))
    bodies = [
        encode(draw_at_random(digit, bool(light), random), str(form), int(random.integers(*QUALITIES, endpoint=True)))
        for digit, light, form in zip(held_out, light_on_dark, forms, strict=True)
    ]
    drawn = answers(model, np.stack([seen(body) for body in bodies])) == held_out_labels
    say(f"accuracy on the held-out digits: {raw.mean():.4f} as they are, {drawn.mean():.4f} as pictures")
    check(raw.mean() >= BAR and drawn.mean() >= BAR, f"an accuracy is below {BAR}")

    (HERE / "labels.txt").write_text("".join(f"{label}\n" for label in range(10)))
    write_samples(HERE / "samples", model, held_out, held_out_labels)
    parts = {
        "dark on light": ~light_on_dark,
        "light on dark": light_on_dark,
        **{form: forms == form for form in ("PNG", "JPEG", "WEBP")},
    }
    card = CARD.format(
        command=COMMAND,
        held_out=len(held_out),
        raw_right=raw.sum(),
        raw=raw.mean(),
        drawn_right=drawn.sum(),
        drawn=drawn.mean(),
        parts="\n".join(
            f"| (b), only {name} | {drawn[part].sum()} of {part.sum()} | {drawn[part].mean():.4f} |"
            for name, part in parts.items()
        ),
        sides=SIDES,
        contrast=PAPERS[0] - INKS[1],
        qualities=QUALITIES,
        total=len(digits),
        trained=len(trained),
        share=HELD_OUT,
        seed=SEED,
        drawings=DRAWINGS,
        epochs=EPOCHS,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        python=platform.python_version(),
        torch=torch.__version__,
        sklearn=sklearn.__version__,
        pillow=PIL.__version__,
        numpy=np.__version__,
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        seconds=time.monotonic() - started,
    )
    (HERE / "README.md").write_text(card)
    say("wrote labels.txt, samples/ and README.md")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"train.py: {otherwise}")


if __name__ == "__main__":
    main()
