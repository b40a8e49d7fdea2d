"""Mask GeoTIFFs to polygons: GeoJSON in WGS 84, with areas in square metres. Needs rasterio, shapely and pyproj.

A mask is traced along its pixels' edges. A polygon's area is that of its pixels on the ellipsoid, whatever the file's
projection; its outline is simplified: what is within a pixel of a straight line goes.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pyproj
import rasterio
import rasterio.features
import shapely

from runtime.errors import UserError

CHUNK = 1000  # polygons that are worked on together: a call of a library costs more than its points
STRIP = 2**22  # pixels of a polygon's box that are in memory at once
PIECE = 16  # pixels: longer edges are cut, since what is straight in one projection is bent in another
WORLD = shapely.box(-180, -90, 180, 90)
ELLIPSOID = pyproj.Geod(ellps="WGS84")


def write_polygons(mask_path: Path, probability_path: Path, path: Path, properties: dict) -> dict:
    """The mask GeoTIFF's foreground as GeoJSON (longitude, latitude), holes kept -> {"polygon_count", "area_m2"}.

    A feature's properties are the given ones, its own area_m2 and its confidence, the mean of the probabilities inside it,
    which are a raster of the mask's size. The mask's file must have a coordinate system; one that can't be transformed to
    WGS 84 is a UserError.
    """
    count, total = 0, 0.0
    with rasterio.open(mask_path) as file, rasterio.open(probability_path) as values, open(path, "w", encoding="utf-8") as out:
        out.write('{"type": "FeatureCollection", "features": [')
        band = rasterio.band(file, 1)  # from a band, shapes reads the file by windows
        found = (shape for shape, value in rasterio.features.shapes(band, mask=band) if value == 255)
        try:
            transform = pixels_to_wgs84(file)
            while chunk := list(itertools.islice(found, CHUNK)):
                shapes = [shapely.geometry.shape(shape) for shape in chunk]
                pixels = shapely.transform(shapes, lambda points: moved(points, ~file.transform).round())
                for inside, polygon, area in zip(pixels, *outlines_and_areas(pixels, transform)):
                    facts = {"confidence": round(mean_inside(values, inside), 4), "area_m2": round(area, 2)}
                    facts = json.dumps(properties | facts, ensure_ascii=False)
                    feature = f'{{"type": "Feature", "properties": {facts}, "geometry": {shapely.to_geojson(polygon)}}}'
                    out.write((",\n" if count else "\n") + feature)
                    count, total = count + 1, total + area
        except pyproj.exceptions.ProjError as error:
            reason = str(error).split("\n")[0][:100]
            raise UserError(f"its coordinate system can't be transformed to WGS 84 ({reason})") from None
        out.write("\n]}\n")
    return {"polygon_count": count, "area_m2": round(total, 2)}


def pixels_to_wgs84(file):
    """A function: points (n, 2) in pixels (x, y) of the file -> (longitude, latitude), within 180 degrees of its centre.

    Longitudes of a scene on the 180th meridian so are continuous, and go beyond 180 or -180."""
    transformer = pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(file.crs.to_wkt()), "EPSG:4326", always_xy=True)

    def to_wgs84(points: np.ndarray) -> np.ndarray:
        return np.stack(transformer.transform(*moved(points, file.transform).T, errcheck=True), axis=1)

    middle = to_wgs84(np.array([[file.width / 2, file.height / 2]]))[0, 0]

    def transform(points: np.ndarray) -> np.ndarray:
        longitude, latitude = to_wgs84(points).T
        turns = np.round((longitude - middle) / 360 * (1 - 1e-9))  # a map of the world ends at exactly +-180 degrees
        return np.stack([longitude - 360 * turns, latitude], axis=1)

    return transform


def mean_inside(values, polygon) -> float:
    """The mean of a raster inside a polygon along its pixels' edges, read in strips of rows."""
    left, top, right, bottom = map(int, polygon.bounds)
    total, count, height = 0.0, 0, max(1, STRIP // (right - left))
    for row in range(top, bottom, height):
        rows = slice(row, min(row + height, bottom))
        found = values.read(1, window=((rows.start, rows.stop), (left, right)))
        outside = rasterio.features.geometry_mask([polygon], found.shape, rasterio.Affine.translation(left, row))
        total, count = total + float(found[~outside].sum(dtype=np.float64)), count + int((~outside).sum())
    return total / count


def outlines_and_areas(pixels: list, transform) -> tuple[list, list[float]]:
    """Polygons in pixels -> simplified ones in longitude and latitude to a millimetre, and areas in square metres.

    Polygons are as RFC 7946 wants them: counter-clockwise outside, clockwise for a hole, cut at the 180th meridian."""
    outlines = shapely.transform(shapely.simplify(pixels, 1.0), lambda points: transform(points).round(8))
    outlines = [cut_at_180(outline) for outline in shapely.orient_polygons(outlines)]
    exact = shapely.orient_polygons(shapely.transform(shapely.segmentize(pixels, PIECE), transform))
    return outlines, [ELLIPSOID.geometry_area_perimeter(polygon)[0] for polygon in exact]


def cut_at_180(polygon):
    """The polygon, or, where it goes beyond the 180th meridian, the MultiPolygon of its parts with longitudes within 180."""
    west, _, east, _ = polygon.bounds
    if -180 <= west and east <= 180:
        return polygon
    copies = [shapely.transform(shapely.make_valid(polygon), lambda p, x=x: p + (x, 0)) for x in (-360, 0, 360)]
    parts = [part for copy in copies for part in shapely.get_parts(copy.intersection(WORLD)) if part.area]
    return shapely.orient_polygons(shapely.union_all(parts))


def moved(points: np.ndarray, affine) -> np.ndarray:
    """Points (n, 2) through an affine transform, as of pixels (x, y) to the file's coordinates."""
    a, b, c, d, e, f = affine[:6]
    return points @ np.array([[a, d], [b, e]]) + (c, f)
