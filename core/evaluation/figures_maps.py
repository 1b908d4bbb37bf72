"""Pictures of the embedding space: 2-D maps, nearest neighbours, attention, prototypes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from core.evaluation.figures import STYLE, Panel, canvas, look, png, svg

Images = NDArray[np.uint8]
Features = NDArray[np.float32]
Labels = NDArray[np.int64]
TILE_PX = 64
MOST_IN_MAP = 1500
NEIGHBOURS = 5


@dataclass(frozen=True)
class Tile:
    """One small image; `mark` is "query", "same", "other" or ""."""

    source: str
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class Strip:
    """Small images in a row that belong together."""

    title: str
    tiles: tuple[Tile, ...]


def in_two_dimensions(features: Features) -> NDArray[np.float64]:
    """PCA to 50 dimensions, then t-SNE, of rows brought to unit length; the seed is fixed.

    Args:
        features: [N, D] with N >= 5.

    Returns:
        [N, 2]
    """
    rows = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1)
    points: NDArray[np.float64] = tsne.fit_transform(rows)
    return points


def map_by_modality(features: Mapping[str, Features], rng: np.random.Generator) -> Panel:
    """All tasks in one map, a colour and symbol a group.

    Args:
        features: title of the group -> [N, D]; D is the same for all.
        rng: draws the images that are shown, at most MOST_IN_MAP.
    """
    most = MOST_IN_MAP // len(features)
    groups = {name: rows[rng.permutation(len(rows))[:most]] for name, rows in features.items()}
    points = in_two_dimensions(np.concatenate(list(groups.values())))
    belongs = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups.values()])
    return _scatter("all images by modality", points, belongs, list(groups), (6.4, 4.4), dot=4.0)


def map_by_class(title: str, features: Features, labels: Labels, classes: Sequence[str]) -> Panel:
    """The images of one task, a colour and symbol a class; several labels count as one class."""
    belongs, names = _single(labels, classes)
    return _scatter(title, in_two_dimensions(features), belongs, names, (3.0, 2.7), dot=5.0)


@matplotlib.rc_context(STYLE)
def _scatter(
    title: str, points: NDArray[np.float64], belongs: Labels, names: Sequence[str],
    inches: tuple[float, float],
    *,
    dot: float,
) -> Panel:  # fmt: skip
    figure, axes = canvas(*inches)
    legend = []
    for index, name in enumerate(names):
        inside = belongs == index
        if inside.any():
            style = look(index)
            legend.append((name, style))
            axes.plot(
                *points[inside].T, style.marker, color=style.colour, markersize=dot,
                alpha=0.75, markeredgewidth=0, linestyle="none",
            )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    return Panel(title, svg(figure, f"2-D map, {title}"), tuple(legend))


def _single(labels: Labels, classes: Sequence[str]) -> tuple[Labels, list[str]]:
    if labels.ndim == 1:
        return labels, list(classes)
    count = labels.sum(1)
    none, several = len(classes), len(classes) + 1
    belongs = np.where(count == 1, labels.argmax(1), np.where(count == 0, none, several))
    return belongs, [*classes, "none of them", "several"]


def neighbour_strips(
    features: Features, labels: Labels, images: Images, classes: Sequence[str],
    groups: Labels | None, rng: np.random.Generator, *, queries: int = 3,
) -> list[Strip]:  # fmt: skip
    """Images drawn at random and the five that the model finds most alike.

    Args:
        features: [N, D], compared by cosine.
        labels: [N], or 0/1 [N, C] when multi-label: then one shared label makes two the same.
        images: uint8 [N, H, W, C].
        classes: C names.
        groups: [N] patients, or None; a query's own patient is never its neighbour.
        rng: draws the queries, one a class in turn.
        queries: how many strips.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    belongs, names = _single(labels, classes)
    strips = []
    for query in draw_examples(belongs, queries, rng):
        cosine = unit @ unit[query]
        barred = np.arange(len(unit)) == query if groups is None else groups == groups[query]
        cosine[barred] = -np.inf
        near = [int(i) for i in np.argsort(-cosine)[:NEIGHBOURS] if not barred[i]]
        tiles = [Tile(png(images[query], TILE_PX), names[belongs[query]], "query")]
        for index in near:
            mark = "same" if _share_class(labels, query, index) else "other"
            tiles.append(Tile(png(images[index], TILE_PX), names[belongs[index]], mark))
        strips.append(Strip(names[belongs[query]], tuple(tiles)))
    return strips


def _share_class(labels: Labels, first: int, second: int) -> bool:
    if labels.ndim == 1:
        return bool(labels[first] == labels[second])
    both = labels[first] & labels[second]
    return bool(both.any() or (labels[first] == labels[second]).all())


def draw_examples(belongs: Labels, count: int, rng: np.random.Generator) -> list[int]:
    """Indices drawn at random, the classes taking turns."""
    queues = [list(rng.permutation(np.flatnonzero(belongs == c))) for c in np.unique(belongs)]
    turns: list[int] = []
    while len(turns) < count and any(queues):
        turns += [int(queue.pop()) for queue in queues if queue]
    return turns[:count]


def attention_strips(
    attention: Mapping[str, Features], labels: Labels, images: Images, classes: Sequence[str],
    rng: np.random.Generator, *, count: int = 3,
) -> list[Strip]:  # fmt: skip
    """Images drawn at random, each followed by where every model's class token looks.

    Args:
        attention: model -> [N, rows, columns].
        labels: as for `neighbour_strips`.
        images: uint8 [N, H, W, C].
        classes: C names.
        rng: draws the images, one a class in turn.
        count: how many strips.
    """
    belongs, names = _single(labels, classes)
    strips = []
    for index in draw_examples(belongs, count, rng):
        tiles = [Tile(png(images[index], TILE_PX), names[belongs[index]])]
        for model, maps in attention.items():
            tiles.append(Tile(png(overlay(images[index], maps[index]), TILE_PX), model))
        strips.append(Strip(names[belongs[index]], tuple(tiles)))
    return strips


def overlay(image: Images, attention: Features) -> Images:
    """The image in grey under its attention map, stretched from least (dark) to most (bright)."""
    grey = np.asarray(image, np.float32).mean(2)
    span = float(attention.max() - attention.min())
    level = (attention - attention.min()) / span if span > 0 else np.zeros_like(attention)
    fine = Image.fromarray(level.astype(np.float32)).resize(
        (grey.shape[1], grey.shape[0]), Image.Resampling.BICUBIC
    )
    level = np.clip(np.asarray(fine), 0, 1)
    heat: Any = matplotlib.colormaps["inferno"](level)[..., :3] * 255
    strength = (0.25 + 0.45 * level)[..., None]
    mixed: Images = ((1 - strength) * grey[..., None] + strength * heat).astype(np.uint8)
    return mixed


def prototype_strips(
    prototypes: Features, counts: NDArray[np.float32], embeddings: Features,
    images: Sequence[Images], *, most: int = 4,
) -> list[Strip]:  # fmt: skip
    """The prototypes of most patients, each shown by the five nearest of the evaluated images.

    Args:
        prototypes: unit rows [K, D].
        counts: patients behind each [K].
        embeddings: unit rows [N, D] of the images.
        images: N of uint8 [H, W, C].
        most: how many prototypes.
    """
    strips = []
    for index in np.argsort(-counts, kind="stable")[:most]:
        cosine = embeddings @ prototypes[index]
        near = np.argsort(-cosine)[:NEIGHBOURS]
        tiles = [Tile(png(images[i], TILE_PX), f"cosine {cosine[i]:.2f}") for i in near]
        strips.append(Strip(f"{counts[index]:.0f} patients", tuple(tiles)))
    return strips
