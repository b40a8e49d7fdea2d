"""Shapes of the objects of generated scenes, and the ground below them, as arrays of colour."""

import math

import cv2
import numpy as np

# Shapes --------------------------------------------------------------------------------------------

def box(x0, y0, x1, y1):
    """A rectangle as a polygon (4, 2)."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def oval(x, y, rx, ry, start=0, stop=360, n=40):
    """The arc of an ellipse between two angles in degrees, as a polygon (n, 2)."""
    a = np.radians(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def mirror(*half):
    """Half an outline (y >= 0, from front to back) and its mirror image: a polygon (2n, 2)."""
    return np.concatenate([half, np.array(half)[::-1] * (1, -1)])


def spin(polygon, degrees):
    """The polygon turned about the origin."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return polygon @ np.array([(c, s), (-s, c)])


DARK, PALE = (30, 35, 45), (225, 225, 220)
# What tells a category apart besides its outline, as overhead: glass, clay infields, grass, timber, painted surrounds.
CLAY, GRASS, TIMBER, PURPLE, TEAL, ORANGE = (
    (150, 104, 66), (70, 116, 52), (200, 168, 124), (104, 76, 150), (36, 158, 168), (238, 124, 28))
HULL = mirror((0.5, 0), (0.36, 0.1), (0.2, 0.155), (-0.4, 0.15), (-0.5, 0.1))
CAR = mirror((0.5, 0), (0.49, 0.16), (0.44, 0.235), (0.36, 0.255), (-0.4, 0.255), (-0.48, 0.22), (-0.5, 0))
TIP = np.array([(0.03, 0.3), (-0.08, 0.5), (-0.26, 0.5), (-0.21, 0.3)])
FAN = np.concatenate([[(-0.45, 0)], oval(-0.45, 0, 1, 1, -44, 44)])
# Polygons painted in order, of unit length along x, each with its colour: RGB, or a shade of the object's
# colour (below 1 darker, above 1 towards white), or None for lines that stand out. Their union is the mask.
SHAPES = {
    "airplane": [
        (mirror((0.22, 0), (-0.08, 0.5), (-0.26, 0.5), (-0.15, 0)), 0.88),
        (TIP, ORANGE), (TIP * (1, -1), ORANGE),
        (mirror((-0.26, 0), (-0.38, 0.24), (-0.5, 0.24), (-0.47, 0)), 0.88),
        (mirror((0.5, 0), (0.46, 0.075), (0.36, 0.11), (-0.25, 0.1), (-0.48, 0.04)), 1),
        (mirror((0.44, 0), (0.41, 0.055), (0.36, 0.055), (0.37, 0)), DARK)],
    "baseballfield": [
        (FAN, 0.8), (FAN * 0.93 - (0.01, 0), 1), (FAN * 0.6 - (0.14, 0), CLAY),
        (spin(box(-0.12, -0.12, 0.12, 0.12), 45) - (0.13, 0), 0.92), (oval(-0.13, 0, 0.045, 0.045), CLAY)],
    "harbor": [(box(-0.5, 0.1, 0.5, 0.3), 0.9), (box(-0.46, 0.16, 0.46, 0.24), TIMBER)] + [
        (box(x - w, y, x + w, 0.16), c) for x in (-0.42, 0, 0.42) for w, y, c in ((0.08, -0.3, 1), (0.04, -0.26, TIMBER))],
    "ship": [
        (HULL, 0.72), (HULL * (0.88, 0.75), 1), (box(-0.4, -0.09, -0.27, 0.09), PALE),
        (box(-0.2, -0.09, -0.02, 0.09), TEAL), (box(0.05, -0.08, 0.21, 0.08), TEAL)],
    "stadium": [(oval(0, 0, 0.5, 0.37), 0.75), (oval(0, 0, 0.46, 0.33), 1)] + [
        (spin(box(-0.46, -0.02, 0.46, 0.02), a) * (1, 0.72), 0.6) for a in (0, 45, 90, 135)] + [
        (oval(0, 0, 0.3, 0.2), PALE), (oval(0, 0, 0.27, 0.17), GRASS), (box(-0.012, -0.17, 0.012, 0.17), PALE)],
    "storagetank": [
        (oval(0, 0, 0.5, 0.5), 0.6), (oval(0, 0, 0.45, 0.45), 1), (oval(0, 0, 0.3, 0.3), DARK),
        (oval(0, 0, 0.21, 0.21), 1), (oval(0.03, 0.03, 0.1, 0.1), 1.45)],
    "tenniscourt": [
        (box(-0.5, -0.32, 0.5, 0.32), PURPLE), (box(-0.44, -0.26, 0.44, 0.26), None), (box(-0.41, -0.23, 0.41, 0.23), 1),
        (box(-0.2, -0.015, 0.2, 0.015), None), (box(-0.215, -0.23, -0.185, 0.23), None),
        (box(0.185, -0.23, 0.215, 0.23), None), (box(-0.015, -0.29, 0.015, 0.29), DARK)],
    "vehicle": [
        (CAR, 0.8), (CAR * (0.94, 0.84), 1), (mirror((0.29, 0), (0.27, 0.2), (0.08, 0.18), (0.08, 0)), DARK),
        (box(-0.42, -0.18, -0.27, 0.18), DARK), (box(-0.22, -0.13, 0.04, 0.13), 1.25)],
}


def paint(shape, colour, length, angle, over=4):
    """A shape at a length in pixels and an angle in degrees: RGB (h, w, 3) f32, coverage (h, w) f32 in 0..1."""
    n, body = math.ceil(1.5 * length) + 2, np.array(colour)
    rgb, cover = np.zeros((n * over, n * over, 3), np.float32), np.zeros((n * over, n * over), np.float32)
    for polygon, tone in shape:
        if tone is None:
            tone = PALE if body[1] < 200 and body.std() > 20 else (70, 70, 75)
        elif not isinstance(tone, tuple):
            tone = body * tone if tone <= 1 else 255 - (255 - body) * (2 - tone)
        points = [np.round((spin(polygon, angle) * length + n / 2) * over).astype(np.int32)]
        cv2.fillPoly(rgb, points, tuple(float(t) for t in tone))
        cv2.fillPoly(cover, points, 1.0)
    rgb, cover = (cv2.resize(a, (n, n), interpolation=cv2.INTER_AREA) for a in (rgb, cover))
    rows, cols = np.flatnonzero(cover.max(1)), np.flatnonzero(cover.max(0))
    crop = np.s_[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]
    return rgb[crop] / np.maximum(cover[crop], 1e-6)[..., None], cover[crop]


# Ground --------------------------------------------------------------------------------------------

GROUNDS = {"grass": ((66, 92, 50), (94, 112, 62)), "soil": ((112, 86, 64), (142, 112, 82)),  # two tones, blended
           "sand": ((176, 156, 120), (200, 182, 146)), "urban": ((84, 82, 82), (104, 99, 95))}


def noise(rng, size, cells):
    """Smooth noise (size, size) f32 of about unit variance, with features of size / cells pixels."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def ground(rng, size, clutter, wet):
    """Ground, roads, and trees by clutter in 0..1: (size, size, 3) f32 in 0..255; where water is: (size, size) bool."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size - 0.5
    a = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a)
    broad, kind = noise(rng, size, 4), rng.choice([*GROUNDS, "fields"])
    if kind == "fields":  # a patchwork of crops with furrows
        tones = np.array([*GROUNDS["grass"], *GROUNDS["soil"], (118, 116, 68)], np.float32)
        row = np.floor(u / rng.uniform(0.22, 0.4)).astype(int)
        patch = row % 7 * 7 + np.floor(v / rng.uniform(0.22, 0.4) + row * 0.37).astype(int) % 7
        image = (tones[rng.integers(5, size=49)] * rng.uniform(0.9, 1.1, (49, 1)))[patch]
        image = image * (1 + 0.05 * np.sin(u * rng.uniform(120, 200)))[..., None]
    else:
        low, high = np.array(GROUNDS[kind], np.float32)
        image = low + (high - low) / (1 + np.exp(-1.5 * broad))[..., None]

    (cx, cy), (rx, ry), shift = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.25, 0.45, 2), rng.uniform(-0.2, 0.2)
    depth = (rng.uniform(0.12, 0.19) - np.abs(u + shift + 0.08 * np.sin(v * 7 + 30 * shift)),  # a river,
             0.35 * (1 - np.hypot((u - cx) / rx, (v - cy) / ry)),                              # a lake,
             u + shift)[rng.integers(3)]                                                       # a coast, or none
    depth = depth + 0.02 * broad + 0.006 * noise(rng, size, 12) - 2 * (rng.random() > (0.85 if wet else 0.25))
    water, shore = depth > 0, (np.abs(depth + 0.008) < 0.012)[..., None]
    sea = np.array((38, 70, 88)) + (14 * np.clip(1 - depth * 6, 0, 1) + 3 * noise(rng, size, 10))[..., None]
    image = np.where(shore, image * 0.5 + 92, np.where(water[..., None], sea, image))
    texture = 0.5 * noise(rng, size, 8) + 0.6 * noise(rng, size, size // 4) + 0.6 * noise(rng, size, size)
    image = image * (1 + (0.03 + 0.04 * clutter) * np.where(water, 0.4, 1) * texture)[..., None]
    image = np.ascontiguousarray(image, np.float32)

    def pixel(p):
        return tuple(int(c) for c in np.round((p + 0.5) * size))
    for _ in range(rng.choice(3, p=(0.45, 0.4, 0.15))):  # roads; across water they are bridges
        a, start, width = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35, 2), rng.uniform(0.05, 0.075) * size
        along = np.array((np.cos(a), np.sin(a)))
        for tone, extra in (((116, 112, 106), 2), ((78, 77, 79), 0)):
            cv2.line(image, pixel(start - 2 * along), pixel(start + 2 * along), tone, round(width + extra), cv2.LINE_AA)
        for t in np.arange(-1.5, 1.5, 0.09):
            cv2.line(image, pixel(start + t * along), pixel(start + (t + 0.04) * along), (150, 148, 140), 1)
    for _ in range(int(clutter * 45)):  # trees, each with its shadow and a lit side
        p, r, tone = rng.uniform(-0.49, 0.49, 2), rng.uniform(0.012, 0.028), rng.uniform(0.8, 1.2)
        if not water[pixel(p)[::-1]]:
            for shift, part, c in ((0.008, 1, (30, 36, 26)), (0, 1, (36, 60, 30)), (-0.3 * r, 0.5, (56, 84, 44))):
                cv2.circle(image, pixel(p + shift), round(part * r * size), tuple(tone * t for t in c), -1)
    return image, water
