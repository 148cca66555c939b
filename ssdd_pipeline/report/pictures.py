"""Pictures of a report: strips of the same samples through several decoders, and their differences, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssdd.engine.png import png_bytes
from ssdd.images.pixels import PEAK, grid
from ssdd_pipeline.report.results import FinishedEvaluation

GAP = 2  # white pixels between images, as grid() writes them
LARGEST = 80  # side of a thumbnail; smaller images are shown pixel for pixel
DECODERS, CLASSES = 4, 20  # shown at most
LIMITS = (16, 32, 64, 128, PEAK)
ORIGINALS = "originals"
BLUE, RED = np.array([33, 102, 172]), np.array([178, 24, 43])  # darker, brighter; white means no difference


@dataclass(frozen=True)
class Strip:
    """One row of images; uri holds them."""

    label: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """Strips below each other whose columns are the same samples."""

    title: str
    strips: list[Strip]


@dataclass(frozen=True)
class Gallery:
    """limit: grey levels at which the colours of the differences end."""

    cards: list[Card]
    limit: int
    thumbnails: int | None
    """Side to which larger images were reduced."""


def generation_gallery(evaluation: FinishedEvaluation, decoders: Sequence[str]) -> Gallery | None:
    """One card per class: the same latents through the decoders, and each one's difference to the first."""
    shown = evaluation.result.get("shown", [])
    if not shown:
        return None
    rows, columns = len(shown), len(shown[0]["indices"])
    images = {name: read_grid(picture(evaluation, name), rows, columns) for name in decoders}
    images = dict(list({name: found for name, found in images.items() if found is not None}.items())[:DECODERS])
    names = evaluation.result.get("samples", {}).get("class_names") or []
    titles = [f"class {line['label']}" for line in shown]
    titles = [
        f"{title}: {names[line['label']]}" if line["label"] < len(names) and names[line["label"]] != str(line["label"])
        else title
        for title, line in zip(titles, shown, strict=True)
    ]  # fmt: skip
    first = next(iter(images), None)
    per_class = [(title, {name: found[i] for name, found in images.items()}) for i, title in enumerate(titles)]
    return _gallery([(title, parts, first) for title, parts in per_class[:CLASSES]]) if images else None


def reconstruction_gallery(evaluation: FinishedEvaluation) -> Gallery | None:
    """One card per decoder or baseline: originals, reconstructions, and their difference."""
    path = picture(evaluation, ORIGINALS)
    if not path.is_file():
        return None
    width, height = Image.open(path).size
    columns = (width + GAP) // (height + GAP)
    originals = read_grid(path, 1, columns)
    cards = []
    for row in evaluation.rows:
        images = read_grid(picture(evaluation, row["name"]), 1, columns)
        if originals is not None and images is not None and images.shape == originals.shape:
            cards.append((row["name"], {ORIGINALS: originals[0], row["name"]: images[0]}, ORIGINALS))
    return _gallery(cards) if cards else None


def picture(evaluation: FinishedEvaluation, name: str) -> Path:
    return evaluation.folder / "pictures" / f"{name}.png"


def read_grid(path: Path, rows: int, columns: int) -> np.ndarray | None:
    """Images of a grid as uint8 [rows, columns, h, w, 3]; None when there is no such file or it has another form."""
    if not path.is_file():
        return None
    sheet = np.asarray(Image.open(path).convert("RGB"))
    (height, rest_y), (width, rest_x) = divmod(sheet.shape[0] + GAP, rows), divmod(sheet.shape[1] + GAP, columns)
    if rest_y or rest_x:
        return None
    sheet = np.pad(sheet, ((0, GAP), (0, GAP), (0, 0)))
    return sheet.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)[:, :, :-GAP, :-GAP]


def difference(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Signed differences in grey levels, means over the colours: [n, h, w]."""
    return (images.astype(np.float32) - reference.astype(np.float32)).mean(axis=-1)


def coloured(differences: np.ndarray, limit: int) -> np.ndarray:
    """White at 0, blue where darker, red where brighter, full at `limit`: uint8 [n, h, w, 3]."""
    part = np.clip(differences / limit, -1, 1)[..., None]
    return (PEAK + np.abs(part) * (np.where(part < 0, BLUE, RED) - PEAK)).round().astype(np.uint8)


def _gallery(cards: Sequence[tuple[str, dict[str, np.ndarray], str]]) -> Gallery:
    """cards: (title, strips [n, h, w, 3] by name, name of the one that the others are compared with)."""
    differences = [
        {name: difference(images, strips[first]) for name, images in strips.items() if name != first}
        for _, strips, first in cards
    ]
    found = [np.abs(values).ravel() for of_card in differences for values in of_card.values()]
    largest = float(np.quantile(np.concatenate(found), 0.995)) if found else 0.0
    limit = next(limit for limit in LIMITS if limit >= min(largest, LIMITS[-1]))
    done = []
    for (title, strips, first), of_card in zip(cards, differences, strict=True):
        lines = []
        for name, images in strips.items():
            lines.append(_strip(name, images))
            if name in of_card:
                mean = np.abs(of_card[name]).mean()
                label = f"{name} − {first}: {mean:.1f} levels on average"
                lines.append(_strip(label, coloured(of_card[name], limit)))
        done.append(Card(title, lines))
    side = next(iter(cards[0][1].values())).shape[1]
    return Gallery(done, limit, LARGEST if side > LARGEST else None)


def _strip(label: str, images: np.ndarray) -> Strip:
    """images: uint8 [n, h, w, 3]. Lossless; thumbnails of larger ones are JPEG."""
    reduced = images.shape[1] > LARGEST
    if reduced:
        width = round(LARGEST * images.shape[2] / images.shape[1])
        images = np.stack([np.asarray(Image.fromarray(image).resize((width, LARGEST), Image.BOX)) for image in images])
    sheet = grid(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), columns=len(images), gap=GAP)
    if reduced:
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, format="JPEG", quality=82)
    data, kind = (buffer.getvalue(), "jpeg") if reduced else (png_bytes(sheet), "png")
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Strip(label, uri, sheet.shape[1], sheet.shape[0])
