"""Phantoms in grey with speckle: breast ultrasound and retinal OCT."""

import numpy as np
from numpy.random import Generator

from core.phantoms_draw import (
    Canvas,
    Plane,
    blob,
    cloud,
    grain,
    inside,
    new_waves,
    paint,
    soft_noise,
    speckle,
)
from core.phantoms_radiology import Draw

# Brightness of the retina over its relative depth, from the inner surface to the lower edge of the
# pigment epithelium: nerve fibres, ganglion cells, nuclear and plexiform layers, receptors, RPE.
RETINA_DEPTH = np.array([0, 0.03, 0.10, 0.16, 0.30, 0.36, 0.42, 0.48, 0.53, 0.58, 0.64, 0.76])
RETINA_LEVEL = np.array([0.2, 0.8, 0.78, 0.5, 0.52, 0.3, 0.3, 0.55, 0.52, 0.22, 0.2, 0.22])
RECEPTORS_DEPTH = np.array([0.79, 0.84, 0.87, 0.90, 0.93, 0.99, 1.02, 1.10])
RECEPTORS_LEVEL = np.array([0.55, 0.6, 0.35, 0.4, 0.95, 0.95, 0.55, 0.42])


def us(label: str, rng: Generator) -> Draw:
    """Breast tissue: no mass, a smooth wide one (benign), or a jagged tall one (malignant)."""
    layers = np.sort(rng.uniform((-0.82, -0.45, 0.35), (-0.70, -0.15, 0.65)))
    tilt, fat, gland = rng.uniform(-0.08, 0.08), rng.uniform(0.16, 0.26), rng.uniform(0.42, 0.6)
    cx, cy = rng.uniform(-0.3, 0.3), rng.uniform(-0.1, 0.2)
    size = rng.uniform(0.24, 0.38)
    if label == "malignant":
        rx, ry, waves = 0.8 * size, 1.05 * size, new_waves(rng, 9, 0.22)
        behind, capsule = -rng.uniform(0.25, 0.6), 0.0
    else:
        rx, ry, waves = 1.25 * size, 0.75 * size, new_waves(rng, 2, 0.05)
        behind, capsule = rng.uniform(0.1, 0.5), 0.25
    # A shadow or a bright band of its own in every patient: depth brightness alone tells nothing.
    band_x, band = rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.35)

    def draw(canvas: Canvas, view: Generator) -> Plane:
        posed = canvas.posed(view, degrees=6, shift=0.10, scale=0.10)
        bend = 0.05 * soft_noise(view, canvas.px, 1, 3)
        y = canvas.y + tilt * canvas.x + bend
        echo = np.where(y < layers[0], 0.75, fat * (1 + 0.3 * cloud(view, canvas.px, 3)))
        lobules = gland + 0.10 * cloud(view, canvas.px, 5) + 0.08 * np.sin(18 * y + 9 * bend)
        echo = paint(echo.astype(np.float32), inside(layers[1] - y, 0.12), lobules)
        muscle = 0.28 + 0.12 * np.sin(30 * y + 3 * soft_noise(view, canvas.px, 2, 3))
        echo = paint(echo, inside(layers[2] - y, 0.08), muscle.astype(np.float32))
        echo *= 1 + band * np.exp(-(((canvas.x - band_x) / 0.15) ** 2)) * (canvas.y > -0.3)
        if label != "normal":
            mass = blob(posed, cx, cy, rx, ry, waves)
            below = inside(np.abs(posed.x - cx) - 0.8 * rx, 0.15) * inside(cy - posed.y, 0.1)
            echo *= 1 + behind * below
            echo += capsule * np.exp(-((mass / 0.035) ** 2))
            edge = 0.03 if label == "benign" else 0.09
            echo = paint(echo, inside(mass, edge), 0.10 + 0.03 * cloud(view, canvas.px, 6))
        echo = np.clip(echo, 0.02, 1) * np.exp(-view.uniform(0.0, 0.45) * (canvas.y + 1))
        fine = canvas.px / 64
        image = echo * speckle(view, canvas.px, 0.6 * fine, 1.0 * fine) ** np.float32(0.65)
        image = np.log1p(4 * image) / np.log(5)
        exposed: Plane = image * view.uniform(0.75, 1.05) + view.uniform(-0.08, 0.02)
        return exposed

    return draw


def oct_scan(label: str, rng: Generator) -> Draw:
    """A retinal section: healthy, with pockets of fluid, or with drusen under the epithelium."""
    thickness, bow = rng.uniform(0.52, 0.66), rng.uniform(-0.16, 0.16)
    pit_x, pit_width, pit = rng.uniform(-0.3, 0.3), rng.uniform(0.20, 0.32), rng.uniform(0.12, 0.22)
    choroid, level = rng.uniform(0.3, 0.6), rng.uniform(-0.05, 0.25)
    count = int(rng.integers(2, 5)) if label == "fluid" else 0
    pockets = rng.uniform((-0.35, 0.40, 0.08, 0.06), (0.35, 0.64, 0.20, 0.12), (count, 4))
    swelling = rng.uniform(0.08, 0.18) if label == "fluid" else 0.0
    bumps = int(rng.integers(3, 8)) if label == "drusen" else 0
    drusen = rng.uniform((-0.75, 0.04, 0.05), (0.75, 0.08, 0.14), (bumps, 3))

    def draw(canvas: Canvas, view: Generator) -> Plane:
        shift, lean = view.uniform(-0.12, 0.12), view.uniform(-0.2, 0.2)
        slide = view.uniform(-0.12, 0.12)
        x = canvas.x - slide
        dip = np.exp(-(((x - pit_x) / pit_width) ** 2))
        base = level + shift + 0.28 + bow * x**2 + lean * canvas.x
        lift = np.zeros_like(x)
        for at, width, height in drusen:
            lift = np.maximum(lift, height * np.exp(-(((x - at) / width) ** 2)))
        inner = base - thickness + pit * dip - swelling * np.exp(-(((x - pit_x) / 0.4) ** 2))
        depth = (canvas.y - inner) / (base - inner)
        outer = (canvas.y + lift - inner) / (base - inner)
        image = np.interp(depth, RETINA_DEPTH, RETINA_LEVEL, left=0.04).astype(np.float32)
        receptors = np.interp(outer, RECEPTORS_DEPTH, RECEPTORS_LEVEL).astype(np.float32)
        image = np.where(outer > 0.775, receptors, image)
        image = np.where((outer > 1.0) & (depth < 1.0), 0.5, image)
        under = np.clip(depth - 1, 0, None)
        vessels = 1 + 0.35 * cloud(view, canvas.px, 6)
        deep = choroid * np.exp(-2.5 * under) * vessels
        image = np.where(depth > 1.03, deep, image)
        for at, level_t, rx, ry in pockets:
            u, v = (x - pit_x - at) / rx, (depth - level_t) * (base - inner) / ry
            pocket = (np.hypot(u, v) - 1) * np.float32(min(rx, ry))
            image = paint(image, inside(pocket, canvas.soft), 0.06)
        for at in (-0.62, 0.55):
            shadow = np.exp(-(((x - at - 0.2 * pit_x) / 0.035) ** 2)) * (depth > 0.1)
            image = image * (1 - 0.45 * shadow)
        fine = canvas.px / 64
        image = image * (0.55 + 0.45 * speckle(view, canvas.px, 0.5 * fine, 0.7 * fine))
        image = image + view.uniform(0.02, 0.05) * np.abs(grain(view, canvas.px))
        gain = 1 + 0.15 * soft_noise(view, canvas.px, 1, 3)
        return image * gain * view.uniform(0.75, 1.1) + view.uniform(0, 0.06)

    return draw
