"""Phantoms in grey: CT body sections and chest X-rays.

Each function draws a patient's anatomy from one generator and returns what draws that patient's
images, each with its own pose, exposure and noise.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from core.phantoms_draw import (
    Canvas,
    Plane,
    blob,
    cloud,
    ellipse,
    flat,
    grain,
    inside,
    near_dots,
    new_waves,
    paint,
    soft_noise,
)

Draw = Callable[[Canvas, Generator], Plane]


def ct(label: str, rng: Generator) -> Draw:
    """A section of the head, chest or abdomen in a soft-tissue window."""
    section = {"head": _head, "chest": _chest, "abdomen": _abdomen}[label](rng)

    def draw(canvas: Canvas, view: Generator) -> Plane:
        posed = canvas.posed(view, degrees=12, shift=0.08, scale=0.10)
        image = section(posed, view)
        table = np.abs(posed.y - 0.86 - 0.1 * posed.x**2) - 0.012
        image = np.maximum(image, 0.35 * inside(table, posed.soft))
        image = image * view.uniform(0.65, 1.25) + view.uniform(-0.04, 0.08)
        noisy: Plane = image + view.uniform(0.015, 0.04) * grain(view, canvas.px)
        return noisy

    return draw


def _head(rng: Generator) -> Draw:
    rx, ry = rng.uniform(0.58, 0.68), rng.uniform(0.72, 0.80)
    bone = rng.uniform(0.055, 0.085)
    ventricle, spread = rng.uniform(0.10, 0.24), rng.uniform(0.08, 0.13)
    waves = new_waves(rng, 3, 0.03)

    def draw(canvas: Canvas, view: Generator) -> Plane:
        outline = blob(canvas, 0, 0, rx, ry, waves)
        image = flat(canvas, 0.0)
        image = paint(image, inside(outline, canvas.soft), 0.32)
        image = paint(image, inside(outline + 0.05, canvas.soft), 1.0)
        folds = 0.05 * cloud(view, canvas.px, 7)
        rim = np.exp(-np.abs(outline + 0.05 + bone) / 0.09)
        brain = 0.47 + folds * (0.4 + rim) - 0.06 * rim
        image = paint(image, inside(outline + 0.05 + bone, canvas.soft), brain)
        for side in (-1, 1):
            for cy, turn in ((-0.13, 14), (0.16, -18)):
                horn = ellipse(canvas, side * spread, cy, 0.05, ventricle, side * turn)
                image = paint(image, 0.9 * inside(horn, canvas.soft), 0.22)
        falx = np.maximum(np.abs(canvas.x) - 0.008, np.abs(np.abs(canvas.y) - 0.5) - 0.2)
        return paint(image, 0.6 * inside(falx, canvas.soft), 0.7)

    return draw


def _torso(canvas: Canvas, outline: Plane, fat: float, muscle: float) -> Plane:
    """Skin, fat, a wall of muscle, and the spine; organs are painted into it."""
    image = flat(canvas, 0.0)
    image = paint(image, inside(outline, canvas.soft), 0.24)
    image = paint(image, inside(outline + 0.015, canvas.soft), 0.20)
    return paint(image, inside(outline + fat, canvas.soft), muscle)


def _spine(image: Plane, canvas: Canvas, cy: float, size: float) -> Plane:
    body = ellipse(canvas, 0, cy, size, 0.8 * size)
    canal = ellipse(canvas, 0, cy + 1.15 * size, 0.4 * size, 0.35 * size)
    arch = ellipse(canvas, 0, cy + 1.25 * size, 0.75 * size, 0.6 * size)
    process = ellipse(canvas, 0, cy + 1.9 * size, 0.18 * size, 0.6 * size)
    for part, value in ((arch, 0.85), (process, 0.85), (body, 0.92), (canal, 0.42)):
        image = paint(image, inside(part, canvas.soft), value)
    return image


def _chest(rng: Generator) -> Draw:
    rx, ry = rng.uniform(0.84, 0.92), rng.uniform(0.56, 0.66)
    fat, heart = rng.uniform(0.03, 0.08), rng.uniform(0.20, 0.27)
    waves = new_waves(rng, 3, 0.03)
    lung = [new_waves(rng, 4, 0.06) for _ in range(2)]
    vessels = rng.uniform((-0.24, -0.32, 0.010), (0.24, 0.32, 0.026), (2, 16, 3))

    def draw(canvas: Canvas, view: Generator) -> Plane:
        outline = blob(canvas, 0, 0, rx, ry, waves)
        image = _torso(canvas, outline, fat, 0.48)
        for index, side in enumerate((-1, 1)):
            at = side * (0.44 - 0.02 * index)
            field = blob(canvas, at, -0.02, 0.31, 0.43 * ry / 0.6, lung[index])
            field = np.maximum(field, outline + fat + 0.09)
            air = 0.07 + 0.02 * cloud(view, canvas.px, 10)
            image = paint(image, inside(field, canvas.soft), air)
            dots = (vessels[index] + (at, 0, 0)).astype(np.float32)
            image = paint(image, inside(np.maximum(near_dots(canvas, dots), field), 0.03), 0.45)
        middle = ellipse(canvas, 0.0, 0.08, 0.13, 0.34)
        image = paint(image, inside(middle, canvas.soft), 0.45)
        image = paint(image, inside(ellipse(canvas, 0.1, -0.1, heart, 0.8 * heart, 30), 0.05), 0.58)
        image = paint(image, inside(ellipse(canvas, 0.12, 0.22, 0.06, 0.06), canvas.soft), 0.62)
        image = _spine(image, canvas, 0.32, 0.105)
        angle = np.arange(14) * (2 * np.pi / 14) + 0.2
        inner_x, inner_y = rx - fat - 0.05, ry - fat - 0.05
        ribs = np.stack([inner_x * np.cos(angle), inner_y * np.sin(angle), np.full(14, 0.03)], 1)
        return paint(image, inside(near_dots(canvas, ribs.astype(np.float32)), canvas.soft), 0.9)

    return draw


def _abdomen(rng: Generator) -> Draw:
    rx, ry = rng.uniform(0.80, 0.92), rng.uniform(0.58, 0.68)
    fat = rng.uniform(0.05, 0.13)
    waves, liver_waves = new_waves(rng, 3, 0.03), new_waves(rng, 4, 0.10)
    liver, kidney, gas = rng.uniform(0.34, 0.42), rng.uniform(0.10, 0.13), rng.uniform(0.06, 0.14)
    bowel = rng.uniform((-0.3, -0.2, 0.05), (0.45, 0.15, 0.09), (7, 3))

    def draw(canvas: Canvas, view: Generator) -> Plane:
        outline = blob(canvas, 0, 0, rx, ry, waves)
        image = _torso(canvas, outline, fat, 0.47)
        cavity = outline + fat + 0.05
        image = paint(image, inside(cavity, canvas.soft), 0.27 + 0.02 * cloud(view, canvas.px, 6))
        for x, y, r in bowel:
            image = paint(image, inside(ellipse(canvas, x, y, r, r), canvas.soft), 0.46)
            image = paint(image, inside(ellipse(canvas, x, y, r / 2, r / 2), 0.03), 0.38)
        organs = (
            (blob(canvas, -0.36, -0.06, liver, 0.36, liver_waves), 0.62),
            (ellipse(canvas, 0.58, 0.02, 0.14, 0.26, -15), 0.60),
            (ellipse(canvas, 0.24, -0.26, 0.26, 0.16, 20), 0.50),
        )
        texture = 0.02 * cloud(view, canvas.px, 12)
        for shape, value in organs:
            image = paint(image, inside(np.maximum(shape, cavity), canvas.soft), value + texture)
        bubble = np.maximum(ellipse(canvas, 0.24, -0.30, gas, gas), -0.28 - canvas.y)
        image = paint(image, inside(bubble, canvas.soft), 0.03)
        for side in (-1, 1):
            at = side * 0.33
            image = paint(
                image, inside(ellipse(canvas, at, 0.24, kidney, 0.13, side * 25), canvas.soft), 0.74
            )
            image = paint(image, inside(ellipse(canvas, at * 0.9, 0.24, 0.04, 0.05), 0.04), 0.4)
            muscle = ellipse(canvas, side * 0.2, 0.42, 0.09, 0.1)
            image = paint(image, inside(muscle, canvas.soft), 0.49)
        image = paint(image, inside(ellipse(canvas, 0.06, 0.13, 0.055, 0.055), canvas.soft), 0.68)
        return _spine(image, canvas, 0.30, 0.10)

    return draw


def cxr(label: str, rng: Generator) -> Draw:
    """A frontal chest film, with patchy opacities in the lungs or without."""
    width, height = rng.uniform(0.29, 0.35), rng.uniform(0.62, 0.72)
    base, heart = rng.uniform(0.42, 0.54), rng.uniform(0.22, 0.32)
    slope, ribs = rng.uniform(0.25, 0.5), rng.uniform(0.05, 0.10)
    waves = [new_waves(rng, 3, 0.05) for _ in range(2)]
    count = int(rng.integers(1, 4)) if label == "opacity" else 0
    side = rng.choice((-1, 1), count)
    patches = np.stack(
        [side * rng.uniform(0.25, 0.52, count), rng.uniform(-0.35, 0.35, count)], axis=1
    )
    sizes, strength = rng.uniform(0.10, 0.19, count), rng.uniform(0.25, 0.40)

    def draw(canvas: Canvas, view: Generator) -> Plane:
        posed = canvas.posed(view, degrees=5, shift=0.06, scale=0.07)
        x, y = posed.x, posed.y
        shoulders = np.abs(x) - 0.98 + 0.5 * np.clip(-y - 0.55, 0, 1) ** 0.8
        arms = np.minimum(shoulders, np.abs(x) - 0.24 - 0.35 * np.clip(y + 0.85, 0, 9))
        image = flat(canvas, 0.06)
        tissue = 0.62 + 0.10 * y + 0.03 * cloud(view, canvas.px, 3)
        image = paint(image, inside(arms, 0.08), tissue)
        lungs = np.zeros_like(image)
        for index, at in enumerate((-0.42, 0.42)):
            field = blob(posed, at, -0.05, width, height, waves[index])
            floor = y - base - 0.05 * index - 1.1 * (x - at * 0.9) ** 2
            field = np.maximum(field, np.maximum(floor, 0.11 - np.abs(x)))
            lungs = np.maximum(lungs, inside(field, 0.07))
        markings = 0.05 * cloud(view, canvas.px, 8) + 0.12 * np.exp(-((np.abs(x) / 0.28) ** 2))
        image = paint(image, lungs, 0.22 + markings)
        for (px, py), size in zip(patches, sizes, strict=True):
            bump = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * size**2))
            image += lungs * bump * strength * (1 + 0.45 * cloud(view, canvas.px, 9))
        for top in np.arange(-0.62, 0.5, 0.17):
            back = np.abs(y - top - slope * (np.abs(x) - 0.15) ** 2 * 2) - 0.022
            image += ribs * inside(np.maximum(back, np.abs(np.abs(x) - 0.42) - 0.34), 0.04)
        clavicle = np.abs(y + 0.62 + 0.28 * (np.abs(x) - 0.1)) - 0.025
        image += 0.13 * inside(np.maximum(clavicle, np.abs(np.abs(x) - 0.35) - 0.28), 0.05)
        image = paint(image, 0.9 * inside(ellipse(posed, 0.13, 0.2, heart, 0.30, 35), 0.09), 0.72)
        image += 0.12 * np.exp(-((x / 0.08) ** 2)) * inside(np.abs(y) - 0.95, 0.05)
        image -= 0.14 * np.exp(-((x / 0.035) ** 2)) * inside(np.abs(y + 0.6) - 0.22, 0.1)
        image = image * view.uniform(0.8, 1.15) + view.uniform(-0.08, 0.08)
        drift = 0.03 * soft_noise(view, canvas.px, 2, 2)
        return image + drift + view.uniform(0.01, 0.03) * grain(view, canvas.px)

    return draw
