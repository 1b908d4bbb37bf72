"""Drawing for phantoms: signed-distance shapes on a posed grid, soft noise, blur; numpy alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Plane = NDArray[Any]
"""float32 [px, px], or [px, px, 3] for colour, around 0 to 1."""


@dataclass(frozen=True)
class Canvas:
    """Coordinates of the pixel centres: x to the right and y down, -1 to 1 over the image."""

    x: Plane
    y: Plane
    soft: float
    """Width over which an edge fades: one pixel."""

    @property
    def px(self) -> int:
        """Side of the image in pixels."""
        return len(self.x)

    def posed(self, rng: Generator, *, degrees: float, shift: float, scale: float) -> "Canvas":
        """The grid seen from another pose, each limit drawn evenly to both sides."""
        angle = np.deg2rad(rng.uniform(-degrees, degrees))
        zoom = 1 / (1 + rng.uniform(-scale, scale))
        dx, dy = rng.uniform(-shift, shift, 2)
        cos, sin = np.float32(np.cos(angle) * zoom), np.float32(np.sin(angle) * zoom)
        x, y = self.x - np.float32(dx), self.y - np.float32(dy)
        return Canvas(cos * x + sin * y, cos * y - sin * x, self.soft * float(zoom))

    def mirrored(self) -> "Canvas":
        """Left and right exchanged."""
        return Canvas(-self.x, self.y, self.soft)

    def window(self, x: float, y: float, reach: float) -> tuple[tuple[slice, slice], "Canvas"]:
        """The square around a point of an unposed grid: where it lies, and the grid there."""
        low, high = ((np.array([y, x]) + end * reach + 1) * self.px / 2 for end in (-1, 1))
        low, high = np.clip([np.floor(low), np.ceil(high)], 0, self.px).astype(int)
        part = slice(low[0], high[0]), slice(low[1], high[1])
        return part, Canvas(self.x[part], self.y[part], self.soft)


def new_canvas(px: int) -> Canvas:
    """The unposed grid of an image."""
    axis = ((np.arange(px, dtype=np.float32) + 0.5) * (2 / px) - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return Canvas(x, y, 2 / px)


def inside(distance: Plane, soft: float) -> Plane:
    """Coverage 0 to 1 of a shape from its signed distance (negative inside)."""
    return np.clip(0.5 - distance / np.float32(soft), 0, 1)


def ellipse(
    canvas: Canvas, cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0
) -> Plane:
    """Signed distance (exact only near the rim of round ones) to a turned ellipse."""
    angle = np.deg2rad(degrees)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = canvas.x - np.float32(cx), canvas.y - np.float32(cy)
    u, v = (cos * x + sin * y) / np.float32(rx), (cos * y - sin * x) / np.float32(ry)
    return (np.hypot(u, v) - 1) * np.float32(min(rx, ry))


def blob(canvas: Canvas, cx: float, cy: float, rx: float, ry: float, waves: Plane) -> Plane:
    """Signed distance to an ellipse whose radius waves with the angle.

    Args:
        canvas: Where to draw.
        cx: Centre.
        cy: Centre.
        rx: Radius along x.
        ry: Radius along y.
        waves: [K, 2] relative amplitude and phase of the waves with 2, 3, ... K + 1 periods.
    """
    u, v = (
        (canvas.x - np.float32(cx)) / np.float32(rx),
        (canvas.y - np.float32(cy)) / np.float32(ry),
    )
    angle = np.arctan2(v, u)
    radius = np.ones_like(angle)
    for periods, (amplitude, phase) in enumerate(waves, start=2):
        radius += amplitude * np.cos(periods * angle + phase)
    distance: Plane = (np.hypot(u, v) - radius) * np.float32(min(rx, ry))
    return distance


def new_waves(rng: Generator, count: int, amplitude: float) -> Plane:
    """Random waves for `blob`, weaker with more periods."""
    sizes = amplitude * rng.uniform(0.4, 1.0, count) / np.sqrt(np.arange(1, count + 1))
    return np.stack([sizes, rng.uniform(0, 2 * np.pi, count)], axis=1).astype(np.float32)


def near_dots(canvas: Canvas, dots: Plane) -> Plane:
    """Signed distance to the nearest of discs [P, 3] (x, y, radius); a line is a row of discs."""
    nearest = np.full_like(canvas.x, 9.0)
    for x, y, radius in dots:
        np.minimum(nearest, np.hypot(canvas.x - x, canvas.y - y) - radius, out=nearest)
    return nearest


def soft_noise(rng: Generator, px: int, cells_y: float, cells_x: float) -> Plane:
    """Smooth noise of about unit deviation with so many random cells down and across."""
    rows, columns = int(np.ceil(cells_y)) + 2, int(np.ceil(cells_x)) + 2
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    return 1.4 * _stretch(_stretch(coarse, px, cells_y).T, px, cells_x).T


def cloud(rng: Generator, px: int, cells: float) -> Plane:
    """Noise of three octaves, about unit deviation."""
    octaves = [soft_noise(rng, px, cells * 2**k, cells * 2**k) / 2**k for k in range(3)]
    noise: Plane = (octaves[0] + octaves[1] + octaves[2]) / np.float32(1.15)
    return noise


def grain(rng: Generator, px: int) -> Plane:
    """White noise of unit deviation."""
    return rng.standard_normal((px, px), dtype=np.float32)


def speckle(rng: Generator, px: int, blur_y: float, blur_x: float) -> Plane:
    """Fully developed speckle, mean about 1: the magnitude of a blurred complex noise field."""
    real, imaginary = (blur(grain(rng, px), blur_y, blur_x) for _ in range(2))
    magnitude = np.hypot(real, imaginary)
    unit: Plane = magnitude / magnitude.mean()
    return unit


def blur(image: Plane, sigma_y: float, sigma_x: float) -> Plane:
    """Gaussian blur of a plane; sigmas in pixels, edges repeated."""
    return _blur_rows(_blur_rows(image, sigma_y).T, sigma_x).T


def paint(image: Plane, cover: Plane, value: float | Plane) -> Plane:
    """Lay a value over an image where `cover` is 1; colour images take a colour."""
    cover = cover[..., None] if image.ndim == 3 and cover.ndim == 2 else cover
    return image + cover * (np.asarray(value, dtype=np.float32) - image)


def colour(red: float, green: float, blue: float) -> Plane:
    """An RGB triple, 0 to 1."""
    return np.array([red, green, blue], dtype=np.float32)


def flat(canvas: Canvas, value: float | Plane) -> Plane:
    """An image of one grey or one colour."""
    fill = np.asarray(value, dtype=np.float32)
    return np.broadcast_to(fill, (canvas.px, canvas.px, *fill.shape)).copy()


def _stretch(coarse: Plane, px: int, cells: float) -> Plane:
    """Interpolate rows smoothly to `px` rows that span `cells` of them."""
    at = np.arange(px, dtype=np.float32) * np.float32(cells / px)
    low = at.astype(np.int64)
    t = at - low
    t = (t * t * (3 - 2 * t))[:, None]
    rows: Plane = coarse[low] * (1 - t) + coarse[low + 1] * t
    return rows


def _blur_rows(image: Plane, sigma: float) -> Plane:
    radius = int(np.ceil(2.5 * sigma))
    if radius == 0:
        return image
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    padded = np.pad(image, ((radius, radius), (0, 0)), mode="edge")
    rows = len(image)
    blurred = np.zeros_like(image)
    for offset, weight in enumerate(weights):
        blurred += weight * padded[offset : offset + rows]
    return blurred
