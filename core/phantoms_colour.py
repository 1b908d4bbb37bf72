"""Phantoms in colour: stained tissue, the fundus of the eye, and skin."""

import numpy as np
from numpy.random import Generator

from core.phantoms_draw import (
    Canvas,
    Plane,
    blob,
    cloud,
    colour,
    ellipse,
    flat,
    grain,
    inside,
    near_dots,
    new_waves,
    paint,
    soft_noise,
)
from core.phantoms_radiology import Draw


def pathology(label: str, rng: Generator) -> Draw:
    """Tissue in haematoxylin and eosin: glands, crowded small nuclei, or few large jagged ones."""
    stain = rng.uniform(0.75, 1.1)
    pink = colour(0.90, 0.66, 0.78) + rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    purple = colour(0.40, 0.24, 0.55) + rng.uniform(-0.06, 0.06, 3).astype(np.float32)
    radius = {"glands": 0.062, "crowded": 0.058, "atypical": 0.125}[label] * rng.uniform(0.9, 1.1)
    count = {"glands": 10, "crowded": 75, "atypical": 20}[label]

    def draw(canvas: Canvas, view: Generator) -> Plane:
        fibres = soft_noise(view, canvas.px, 4, 14) + soft_noise(view, canvas.px, 12, 5)
        image = flat(canvas, pink) + 0.045 * fibres[..., None] * colour(0.6, 1.0, 0.7)
        spots = _scatter(view, count, radius)
        if label == "glands":
            for x, y in _scatter(view, 4, 0.42):
                size = view.uniform(0.26, 0.36)
                gland = blob(canvas, x, y, size, size, new_waves(view, 3, 0.06))
                image = paint(image, inside(gland, 0.04), pink * colour(0.93, 0.86, 0.98))
                image = paint(image, inside(gland + 0.6 * size, 0.05), colour(0.96, 0.95, 0.96))
                turn = np.arange(int(24 * size / 0.3)) * (0.3 / size) * (2 * np.pi / 24)
                ring = np.stack([np.cos(turn), np.sin(turn)], 1) * size * 0.85
                spots = np.concatenate([spots, ring + np.array([x, y])])
        elif view.uniform() < 0.6:
            x, y = view.uniform(-0.9, 0.9, 2)
            gap = blob(canvas, x, y, 0.3, 0.16, new_waves(view, 4, 0.15))
            image = paint(image, inside(gap, 0.05), colour(0.95, 0.93, 0.95))
        rough = 0.16 if label == "atypical" else 0.04
        spread = 0.35 if label == "atypical" else 0.12
        for x, y in spots + view.normal(0, 0.012, spots.shape):
            rx, ry = radius * np.clip(view.normal(1, spread, 2), 0.5, 1.7)
            waves, tint = new_waves(view, 3, rough), purple * np.float32(view.uniform(0.8, 1.25))
            window, part = canvas.window(x, y, 1.5 * max(rx, ry))
            nucleus = blob(part, x, y, rx, ry, waves)
            image[window] = paint(image[window], 0.92 * inside(nucleus, 1.3 * canvas.soft), tint)
        image = 1 - (1 - image) * np.float32(stain * view.uniform(0.9, 1.1))
        chromatin = 0.04 * cloud(view, canvas.px, 20)
        return image + chromatin[..., None] + 0.015 * grain(view, canvas.px)[..., None]

    return draw


def _scatter(rng: Generator, count: int, spacing: float) -> Plane:
    """Points [N, 2] over the image that keep a distance of about one spacing from each other."""
    points: list[Plane] = []
    for point in rng.uniform(-1.05, 1.05, (8 * count, 2)):
        if all(np.hypot(*(point - other)) > 1.5 * spacing for other in points):
            points.append(point)
        if len(points) == count:
            break
    return np.array(points)


def cfp(label: str, rng: Generator) -> Draw:
    """The fundus through a round window: disc, cup, vessels, macula; with lesions or without."""
    left = rng.uniform() < 0.5
    disc_x, disc_y = rng.uniform(0.42, 0.52), rng.uniform(-0.08, 0.08)
    disc, cup = rng.uniform(0.13, 0.17), rng.uniform(0.35, 0.6)
    hue = colour(0.80, 0.38, 0.16) + rng.uniform(-1, 1) * colour(0.08, 0.06, 0.05)
    vessels = _vessel_tree(rng, disc_x, disc_y)
    red = _lesions(rng, int(rng.integers(6, 14)), 0.018, 0.042)
    centre = rng.uniform(-0.4, 0.4, 2)
    yellow = _lesions(rng, int(rng.integers(8, 16)), 0.018, 0.04)
    yellow[:, :2] = centre + 0.30 * yellow[:, :2]

    def draw(canvas: Canvas, view: Generator) -> Plane:
        posed = canvas.posed(view, degrees=10, shift=0.06, scale=0.06)
        posed = posed.mirrored() if left else posed
        x, y = posed.x, posed.y
        tone = 1 + 0.06 * cloud(view, canvas.px, 4)
        image = flat(canvas, hue) * tone[..., None]
        macula = np.exp(-((x + 0.12) ** 2 + y**2) / 0.05)
        image = image * (1 - 0.38 * macula[..., None] * colour(0.8, 1, 1))
        if label == "lesions":
            spots = paint(image, inside(near_dots(posed, yellow), 0.03), colour(0.97, 0.85, 0.45))
            image = paint(spots, inside(near_dots(posed, red), 0.03), colour(0.42, 0.08, 0.05))
        glow = np.exp(-((x - disc_x) ** 2 + (y - disc_y) ** 2) / 0.06)
        image = image + 0.10 * glow[..., None] * colour(1, 0.8, 0.5)
        rim = ellipse(posed, disc_x, disc_y, disc, 1.1 * disc)
        image = paint(image, inside(rim, 0.04), colour(0.97, 0.74, 0.42))
        inner = ellipse(posed, disc_x + 0.01, disc_y, cup * disc, cup * 1.1 * disc)
        image = paint(image, inside(inner, 0.05), colour(1.0, 0.92, 0.72))
        tree = inside(near_dots(posed, vessels), canvas.soft)
        image = paint(image, 0.8 * tree, hue * colour(0.62, 0.42, 0.5))
        light_x, light_y = view.uniform(-0.4, 0.4, 2)
        light = 1.08 - 0.35 * ((canvas.x - light_x) ** 2 + (canvas.y - light_y) ** 2)
        image = image * (np.clip(light, 0.3, 1.2) * np.float32(view.uniform(0.8, 1.1)))[..., None]
        image = image + 0.015 * grain(view, canvas.px)[..., None]
        window = inside(np.hypot(canvas.x, canvas.y) - 0.96, 2 * canvas.soft)
        framed: Plane = image * window[..., None]
        return framed

    return draw


def _vessel_tree(rng: Generator, x: float, y: float) -> Plane:
    """Discs [P, 3] along vessels that leave the disc and arch around the macula, with branches."""
    dots: list[tuple[float, float, float]] = []
    starts = [
        (x, y, up * a, up * b, 0.026) for up in (-1, 1) for a, b in ((1.75, 1.0), (0.9, -1.3))
    ]
    stack = [(*start, 34) for start in starts]
    while stack:
        px, py, heading, bend, width, steps = stack.pop()
        curve = bend + rng.uniform(-0.25, 0.25)
        for step in range(steps):
            px, py = px + 0.038 * np.cos(heading), py + 0.038 * np.sin(heading)
            heading += 0.038 * curve + rng.normal(0, 0.05)
            dots.append((px, py, width * (1 - 0.6 * step / steps)))
            if width > 0.02 and step in (8, 16, 24):
                side = rng.choice((-1, 1))
                turned = heading + side * rng.uniform(0.5, 0.9)
                stack.append((px, py, turned, -side * 0.6, 0.6 * width, 15))
    return np.array(dots, dtype=np.float32)


def _lesions(rng: Generator, count: int, smallest: float, largest: float) -> Plane:
    """Discs [N, 3] within the window."""
    return rng.uniform((-0.7, -0.7, smallest), (0.7, 0.7, largest), (count, 3)).astype(np.float32)


def dermatology(label: str, rng: Generator) -> Draw:
    """A pigmented lesion on skin: round, even and symmetric (regular), or none of these."""
    skin = colour(0.86, 0.68, 0.58) * np.float32(rng.uniform(0.75, 1.1))
    brown = colour(0.45, 0.28, 0.19) * np.float32(rng.uniform(0.75, 1.3))
    brown += rng.uniform(-0.02, 0.02, 3).astype(np.float32)
    size = rng.uniform(0.36, 0.58)
    cx, cy = rng.uniform(-0.12, 0.12, 2)
    irregular = label == "irregular"
    stretch = rng.uniform(0.72, 0.9) if irregular else rng.uniform(0.85, 1.0)
    waves = new_waves(rng, 8, 0.13) if irregular else new_waves(rng, 3, 0.03)
    patches = rng.uniform((-0.6, -0.6, 0.35), (0.6, 0.6, 0.6), (4, 3)) * size
    tints = np.array([[0.16, 0.10, 0.10], [0.36, 0.36, 0.46], [0.66, 0.34, 0.30], [0.6, 0.4, 0.26]])
    hairs = int(rng.integers(0, 6))

    def draw(canvas: Canvas, view: Generator) -> Plane:
        posed = canvas.posed(view, degrees=180, shift=0.10, scale=0.12)
        texture = 0.02 * cloud(view, canvas.px, 3) + 0.012 * soft_noise(view, canvas.px, 24, 24)
        image = flat(canvas, skin) + texture[..., None]
        shape = blob(posed, cx, cy, size, size * stretch, waves)
        lesion = inside(shape, 0.05 if irregular else 0.10)
        network = 1 + 0.10 * cloud(view, canvas.px, 9)
        inner = flat(canvas, brown) * network[..., None]
        if irregular:
            for (x, y, r), tint in zip(patches, tints, strict=True):
                patch = np.exp(-(((posed.x - cx - x) ** 2 + (posed.y - cy - y) ** 2) / r**2))
                inner = paint(inner, 0.9 * patch, tint)
        else:
            core = np.exp(-((np.hypot(posed.x - cx, posed.y - cy) / (0.7 * size)) ** 2))
            inner = inner * (1.15 - 0.3 * core[..., None])
        image = paint(image, 0.93 * lesion, inner)
        for _ in range(hairs):
            at, bend = view.uniform(-0.9, 0.9), view.uniform(-0.3, 0.3)
            turn = view.uniform(0, np.pi)
            u = canvas.x * np.cos(turn) + canvas.y * np.sin(turn)
            v = canvas.y * np.cos(turn) - canvas.x * np.sin(turn)
            hair = np.abs(v - at - bend * u**2) - 0.006
            image = paint(image, 0.6 * inside(hair, canvas.soft), colour(0.2, 0.13, 0.1))
        vignette = 1 - view.uniform(0, 0.25) * (canvas.x**2 + canvas.y**2) / 2
        image = image * (vignette * view.uniform(0.85, 1.1))[..., None]
        noisy: Plane = image + 0.012 * grain(view, canvas.px)[..., None]
        return noisy

    return draw
