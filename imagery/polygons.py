"""Mask GeoTIFFs to polygons: GeoJSON in WGS 84, with areas in square metres. Needs rasterio.

A mask is traced along its pixels' edges. A polygon's area is that of its pixels on the ellipsoid, whatever the file's
projection; its outline is simplified: what is within half a pixel of a straight line goes.
"""

import itertools
import json
from pathlib import Path

import cv2
import numpy as np

from layouts import UserError

CHUNK = 1000  # polygons that are projected together: a call of the projection costs more than its points
PIECE = 16  # pixels: longer edges are cut, since what is straight in one projection is bent in another


def write_polygons(mask_path: Path, path: Path, properties: dict) -> dict:
    """The mask GeoTIFF's foreground as GeoJSON (longitude, latitude), holes kept -> {"polygon_count", "area_m2"}.

    A feature's properties are the given ones and its own area_m2. The mask's file must have a coordinate system; one that
    can't be led to WGS 84 is a UserError.
    """
    import rasterio
    from rasterio._err import CPLE_BaseError  # what a projection that fails raises; rasterio has no public name for it
    from rasterio.features import shapes

    count, total = 0, 0.0
    with rasterio.open(mask_path) as file, open(path, "w", encoding="utf-8") as out:
        out.write('{"type": "FeatureCollection", "features": [')
        band = rasterio.band(file, 1)
        # From a band, shapes reads the file by windows; its corners are in the file's coordinate system.
        found = (shape["coordinates"] for shape, value in shapes(band, mask=band) if value == 255)
        polygons = ([corners(ring, file) for ring in rings] for rings in found)
        try:
            while chunk := list(itertools.islice(polygons, CHUNK)):
                for lines, area in zip(outlines(chunk, file), areas_m2(chunk, file)):
                    feature = {"type": "Feature", "properties": properties | {"area_m2": round(area, 2)}}
                    feature["geometry"] = {"type": "Polygon", "coordinates": lines}
                    out.write((",\n" if count else "\n") + json.dumps(feature, ensure_ascii=False))
                    count, total = count + 1, total + area
        except (rasterio.errors.RasterioError, rasterio.errors.CRSError, CPLE_BaseError) as error:
            raise UserError(f"its coordinate system can't be led to WGS 84 ({str(error)[:100]})") from None
        out.write("\n]}\n")
    return {"polygon_count": count, "area_m2": round(total, 2)}


def corners(ring: list, file) -> np.ndarray:
    """A closed ring in the file's coordinate system -> int32 (n, 2), open, in pixels (x, y)."""
    return moved(np.array(ring[:-1]), ~file.transform).round().astype(np.int32)


def outlines(polygons: list[list[np.ndarray]], file) -> list[list]:
    """Polygons of pixel corners -> their simplified rings as GeoJSON wants them: closed, in longitude and latitude to a
    millimetre, counter-clockwise outside and clockwise for a hole."""
    lines = iter(projected([simplified(ring) for rings in polygons for ring in rings], file, "EPSG:4326"))
    found = []
    for rings in polygons:
        found.append([])
        for n in range(len(rings)):
            line = next(lines)
            line = line if (signed_area(line) < 0) == (n > 0) else line[::-1]
            found[-1].append(np.concatenate([line, line[:1]]).round(8).tolist())
    return found


def simplified(ring: np.ndarray) -> np.ndarray:
    """Open ring of pixel corners without what is within half a pixel of a straight line."""
    fewer = cv2.approxPolyDP(ring[:, None], 0.5, closed=True)[:, 0]
    return fewer if len(fewer) > 2 else ring


def areas_m2(polygons: list[list[np.ndarray]], file) -> list[float]:
    """True areas of polygons of pixel corners, measured in an equal-area projection around the file's centre."""
    centre = np.array([[file.width / 2, file.height / 2]])
    ((longitude, latitude),) = projected([centre], file, "EPSG:4326")[0]
    local = f"+proj=laea +lat_0={latitude} +lon_0={longitude} +datum=WGS84 +units=m"
    lines = iter(projected([pieces(ring) for rings in polygons for ring in rings], file, local))
    rings = [[abs(signed_area(next(lines))) for _ in rings] for rings in polygons]
    return [outside - sum(holes) for outside, *holes in rings]


def pieces(ring: np.ndarray) -> np.ndarray:
    """The open ring with points on its edges, at most PIECE pixels apart."""
    following = np.roll(ring, -1, axis=0)
    counts = -(-np.abs(following - ring).max(axis=1) // PIECE)  # pieces of each edge; edges run along the axes
    start = np.repeat(np.arange(len(ring)), counts)
    share = (np.arange(len(start)) - np.repeat(np.cumsum(counts) - counts, counts)) / counts[start]
    return ring[start] + share[:, None] * (following - ring)[start]


def signed_area(ring: np.ndarray) -> float:
    """Of an open ring (n, 2): positive where it runs counter-clockwise."""
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def moved(points: np.ndarray, affine) -> np.ndarray:
    """Points (n, 2) through an affine transform, as of pixels (x, y) to the file's coordinates."""
    a, b, c, d, e, f = affine[:6]
    return points @ np.array([[a, d], [b, e]]) + (c, f)


def projected(lines: list[np.ndarray], file, crs) -> list[np.ndarray]:
    """Lines (n, 2) in pixels (x, y) of the file -> float64 (n, 2) in another coordinate system, all in one call."""
    from rasterio.warp import transform

    x, y = moved(np.concatenate(lines), file.transform).T
    points = np.stack(transform(file.crs, crs, x, y), axis=1)
    return np.split(points, np.cumsum([len(line) for line in lines[:-1]]))
