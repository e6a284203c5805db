"""Faces of a photograph, each with 468 landmarks that have a depth.

    finder = load_face_finder()
    faces = finder.find(image)          # the widest face first
    faces[0].landmarks                  # [468, 3], pixels of the image

Method: the detector looks at the complete image, and at overlapping tiles whose edges are one half and one
quarter of the longer side, so that small faces are large enough for its input of 128 pixels. For each
detection, the face mesh reads a square of 1.5 times the face's box, rotated so that the line between the eyes
is horizontal. The landmarks give a better square, twice. Finally, the detector must detect the face again in
the last square, and the face mesh must predict that the square contains a face. Without these checks,
textures are accepted as faces. If the detector's score is higher for the square upside down, the landmarks
are computed again in that orientation. If no face reaches a score of 0.75, the image is searched in the other
three orientations, too.

Rendered heads are found if their face is at least 3 % of the longer side wide. Drawings and sculptures of
faces are accepted, too.

Coordinates are continuous: x to the right and y downwards, with the origin at the upper left corner of the
first pixel, so its centre is (0.5, 0.5).

Shapes: H x W pixels of an image, K number of detections.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from scipy.special import expit

from eg3d_rlhf.models.face.networks import (
    ASSET,
    DETECTOR_EDGE,
    LANDMARK_EDGE,
    FaceDetector,
    FaceMesh,
    cell_centres,
    load_networks,
)

DETECTION_SCORE = 0.5  # smallest score of a detection in the image or in a tile
VERIFIED_SCORE = 0.6  # smallest score of a face in its upright square
# Smallest probability of a face that the face mesh predicts. Rendered heads up to 60 degrees of yaw have at
# least 0.96. An ear, which the detector accepts as a face, has 0.7.
PRESENCE = 0.8
CERTAIN_SCORE = 0.75  # if no face reaches it, the image is searched in the other orientations
SQUARE_SCALE = 1.5  # edge of the square that the face mesh reads, in edges of the face's box
REFINEMENTS = 2  # number of times that the landmarks give the next square
# The same for a square that was turned upside down, which begins at landmarks of a wrong orientation. With 2,
# the result is off by 2 % of the face's width; with 6, by as little as for an upright face.
REFINEMENTS_UPSIDE_DOWN = 6
# Tiles of these shares of the image's longer side. The overlap of neighbours is at least a quarter of a tile.
# Every fine tile may cut a face that is larger than the overlap, but a coarser tile shows such a face large
# enough.
TILE_SHARES = (1, 2, 4)
TILE_STEP = DETECTOR_EDGE * 3 // 4  # pixels; greatest distance between neighbouring tiles
SAME_DETECTION = 0.3  # intersection over union from which the detections of a tile are averaged
SAME_CANDIDATE = 0.5  # intersection over union from which detections of different tiles are one
SAME_FACE = 0.5  # share of the smaller box that lies in the other box, from which two faces are one
# Inputs of a network that are computed at once. The features of 8 inputs stay in the cache of a CPU core: 16
# and 2 take 15 % more time.
BATCH = 8
STRIP_ROWS = 512  # rows of an image that are reduced at once, an even number
# Landmarks at the outer corners of the eyes. The first is on the left in the image of an upright face.
EYE_CORNERS = (33, 263)
EYE_POINTS = (33, 133, 362, 263)  # both corners of both eyes
MOUTH_CORNERS = (61, 291)


@dataclass(frozen=True)
class Face:
    """Face in an image.

    landmarks: float64 [468, 3], x and y in pixels of the image. Depth z is in the same scale, and smaller for
        points nearer to the camera; its origin is near the centre of the head.
    score: score of the detector for the upright face, 0.6 to 1.
    """

    landmarks: np.ndarray
    score: float

    @property
    def quarter_turns(self) -> int:
        """Number of counter-clockwise quarter turns of the image that make the face nearly upright, 0 to 3.

        It is 0 if the line from the eyes to the mouth deviates by less than 45 degrees from downwards.
        """
        eyes, mouth = (
            self.landmarks[list(points), :2].mean(axis=0) for points in (EYE_POINTS, MOUTH_CORNERS)
        )
        x, y = mouth - eyes
        # The image's y axis points down: the angle is 0 for an upright face, and grows clockwise.
        return round(math.atan2(-x, y) / (math.pi / 2)) % 4

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Smallest and largest x and y of the landmarks in pixels: (left, top, right, bottom)."""
        left, top = self.landmarks[:, :2].min(axis=0)
        right, bottom = self.landmarks[:, :2].max(axis=0)
        return float(left), float(top), float(right), float(bottom)

    @property
    def width(self) -> float:
        """Width of the box in pixels."""
        return self.box[2] - self.box[0]


@dataclass(frozen=True)
class Square:
    """Square of an image, rotated about its centre.

    angle: angle of its upper edge in radians, from the x axis towards the y axis.
    """

    centre: np.ndarray  # [2], pixels of the image
    edge: float  # pixels of the image
    angle: float

    def axes(self) -> np.ndarray:
        """Return unit vectors along the upper edge and down the left edge as rows, [2, 2]."""
        cosine = math.cos(self.angle)
        sine = math.sin(self.angle)
        # The image's y axis points down, so a positive angle is clockwise as a person sees it.
        return np.array([[cosine, sine], [-sine, cosine]])


class Pyramid:
    """Image and its halved copies, which are computed when they are needed.

    Args: image: uint8 [H, W, 3].
    """

    def __init__(self, image: np.ndarray):
        self._levels = [image]

    def level(self, scale: float) -> tuple[np.ndarray, int]:
        """Return the most reduced copy that is not smaller than a scale, and its reduction, a power of 2.

        Args: scale: pixels of the copy per pixel of the image; above 1 gives the image itself.
        """
        # Copy i has the scale 2^-i. Rounding down gives the smallest copy that is still large enough.
        index = max(0, math.floor(-math.log2(scale)))
        while len(self._levels) <= index:
            source = self._levels[-1]
            height, width = source.shape[:2]
            # Rounded up, because Pillow keeps the last row and the last column of an odd size.
            reduced = np.empty((-(-height // 2), -(-width // 2), 3), np.uint8)
            # In strips, because Pillow copies the pixels that it gets.
            for top in range(0, height, STRIP_ROWS):
                strip = np.asarray(PIL.Image.fromarray(source[top : top + STRIP_ROWS]).reduce(2))
                reduced[top // 2 : top // 2 + len(strip)] = strip
            self._levels.append(reduced)
        return self._levels[index], 2**index

    def resize(self, width: int, height: int) -> np.ndarray:
        """Return the image in another size, uint8 [height, width, 3]."""
        image = self._levels[0]
        # The larger ratio, so that the copy is large enough along both axes.
        level, _ = self.level(min(1.0, max(width / image.shape[1], height / image.shape[0])))
        return np.asarray(PIL.Image.fromarray(level).resize((width, height), PIL.Image.Resampling.BILINEAR))

    def crop(self, square: Square, edge: int) -> np.ndarray:
        """Return the content of a square, uint8 [edge, edge, 3]. Pixels outside the image are black."""
        level, reduction = self.level(min(1.0, edge / square.edge))
        # Only the part of the copy that the square touches is given to Pillow. All positions below are in
        # pixels of the copy.
        centre = square.centre / reduction
        # Half of the side of the box around the rotated square, whose sides are parallel to the image.
        radius = square.edge / reduction / 2 * (abs(math.cos(square.angle)) + abs(math.sin(square.angle)))
        # One further pixel on each side, which bilinear sampling reads.
        left, top = np.maximum(np.floor(centre - radius).astype(int) - 1, 0)
        right, bottom = np.minimum(np.ceil(centre + radius).astype(int) + 1, level.shape[1::-1])
        # The square lies completely outside of the image, so there is nothing to sample.
        if right <= left or bottom <= top:
            return np.zeros((edge, edge, 3), np.uint8)
        # Columns: steps in the copy for one pixel of the crop to the right, and for one downwards.
        steps = square.axes().T * (square.edge / reduction / edge)  # [2, 2]
        origin = centre - steps @ [edge / 2, edge / 2] - [left, top]
        patch = PIL.Image.fromarray(level[top:bottom, left:right])
        # Pillow's order (a, b, c, d, e, f): x = a u + b v + c and y = d u + e v + f for a pixel (u, v).
        coefficients = (*steps[0], origin[0], *steps[1], origin[1])
        return np.asarray(
            patch.transform(
                (edge, edge), PIL.Image.Transform.AFFINE, coefficients, PIL.Image.Resampling.BILINEAR
            )
        )


@dataclass(frozen=True)
class Detections:
    """Detections of the detector.

    scores: [K], probabilities.
    boxes: [K, 4], left, top, right and bottom.
    points: [K, 6, 2], x and y of the points that `FaceDetector` lists.
    """

    scores: np.ndarray
    boxes: np.ndarray
    points: np.ndarray

    def __getitem__(self, selection: np.ndarray) -> "Detections":
        return Detections(self.scores[selection], self.boxes[selection], self.points[selection])


def _overlaps(box: np.ndarray, boxes: np.ndarray, of_smaller: bool = False) -> np.ndarray:
    """Return the overlap of a box [4] with each of other boxes [K, 4], as a share of 0 to 1, [K].

    Args: of_smaller: True: share of the smaller box; False: intersection over union.
    """
    edges = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    # Two boxes that are apart along both axes have two negative edges, whose product would be positive.
    intersection = edges.clip(min=0).prod(axis=1)
    area = (box[2:] - box[:2]).prod()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    reference_area = np.minimum(area, areas) if of_smaller else area + areas - intersection
    # Two boxes without area would give 0 / 0.
    return intersection / np.maximum(reference_area, 1e-9)


def _average_duplicates(detections: Detections) -> Detections:
    """Average detections of one face, weighted by their scores (weighted non-maximum suppression).

    The detection with the highest score is averaged with all detections that overlap it, and so on with the
    rest. The score of an average is the highest one.
    """
    scores = []
    boxes = []
    points = []
    rest = detections
    while len(rest.scores):
        best = int(rest.scores.argmax())
        is_same = _overlaps(rest.boxes[best], rest.boxes) > SAME_DETECTION
        # A box without area overlaps nothing, not even itself.
        is_same[best] = True
        weights = rest.scores[is_same] / rest.scores[is_same].sum()
        scores.append(rest.scores[best])
        boxes.append(np.tensordot(weights, rest.boxes[is_same], axes=1))
        points.append(np.tensordot(weights, rest.points[is_same], axes=1))
        # At least `best` is removed in each round, so the loop ends.
        rest = rest[~is_same]
    return Detections(
        # Without detections, the empty lists have no second axis.
        np.array(scores),
        np.array(boxes).reshape(-1, 4),
        np.array(points).reshape(-1, *rest.points.shape[1:]),
    )


def _tile_starts(length: int) -> list[int]:
    """Return where tiles begin along an axis of `length` pixels, so that they cover it."""
    count = 1 + max(0, math.ceil((length - DETECTOR_EDGE) / TILE_STEP))
    # Spread evenly, so that the last tile ends at the end of the axis and not outside.
    return np.linspace(0, max(0, length - DETECTOR_EDGE), count).round().astype(int).tolist()


def _square_of(points: np.ndarray, eyes: np.ndarray) -> Square:
    """Return the square that the face mesh reads for points of a face.

    Args:
        points: points [P, 2] whose box, parallel to the line between the eyes, is enlarged.
        eyes: both eyes, [2, 2], the one on the left in the upright image first.
    """
    direction = eyes[1] - eyes[0]
    # Only the directions of this square are used, so its centre and its edge have no meaning.
    axes = Square(eyes[0], 1.0, math.atan2(direction[1], direction[0])).axes()
    along = points @ axes.T  # [P, 2], coordinates along the line between the eyes and across it
    low = along.min(axis=0)
    high = along.max(axis=0)
    return Square(
        (low + high) / 2 @ axes,  # back to the axes of the image
        # At least one pixel, since a wrong prediction may place all points at one position.
        SQUARE_SCALE * max(float((high - low).max()), 1.0),
        math.atan2(direction[1], direction[0]),
    )


class FaceFinder:
    """Finds faces and their landmarks in images.

    The networks compute with torch's number of threads. A finder may be used for any number of images.

    Args:
        detector: face detector.
        mesh: face mesh.
        device: device on which the networks compute.
    """

    def __init__(self, detector: FaceDetector, mesh: FaceMesh, device: str | torch.device = "cpu"):
        self._detector = detector.to(device)
        self._mesh = mesh.to(device)
        self._device = torch.device(device)

    def find(self, image: np.ndarray) -> list[Face]:
        """Return the faces of an image, sorted by the width of their boxes, the widest first.

        Args: image: RGB, uint8 [H, W, 3].
        Raises: ValueError for another type or shape.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}. Convert it to RGB"
                " with 8 bits."
            )
        pyramid = Pyramid(image)
        canvases = self._canvases(image, pyramid)
        faces = self._verified_faces(pyramid, canvases, 0)
        # Most photographs are upright, and each further orientation takes the time of a complete search.
        if max((face.score for face in faces), default=0.0) < CERTAIN_SCORE:
            for quarter_turns in (1, 2, 3):
                faces += self._verified_faces(pyramid, canvases, quarter_turns)
        distinct_faces: list[Face] = []
        # The same face is returned from several tiles and orientations. The best score is kept.
        for face in sorted(faces, key=lambda face: face.score, reverse=True):
            boxes = np.array([other.box for other in distinct_faces]).reshape(-1, 4)
            if not (_overlaps(np.array(face.box), boxes, of_smaller=True) > SAME_FACE).any():
                distinct_faces.append(face)
        return sorted(distinct_faces, key=lambda face: face.width, reverse=True)

    @staticmethod
    def _canvases(image: np.ndarray, pyramid: Pyramid) -> list[np.ndarray]:
        """Return the image in the sizes in which tiles of 128 pixels have the shares TILE_SHARES."""
        height, width = image.shape[:2]
        canvases = []
        for tiles_per_side in TILE_SHARES:
            scale = tiles_per_side * DETECTOR_EDGE / max(height, width)  # above 1 for small images
            # A very narrow image would have no column or row left.
            size = (max(1, round(scale * width)), max(1, round(scale * height)))
            canvases.append(pyramid.resize(*size))
        return canvases

    def _verified_faces(self, pyramid: Pyramid, canvases: list[np.ndarray], quarter_turns: int) -> list[Face]:
        """Return the faces that the detector detects in the canvases in one orientation, and again upright.

        One face may be returned several times.

        Args:
            pyramid: image.
            canvases: the image in the sizes of its tiles.
            quarter_turns: number of counter-clockwise quarter turns of the canvases.
        """
        image, _ = pyramid.level(1.0)  # the image itself, of which the size is needed
        candidates = self._candidates(image.shape[:2], canvases, quarter_turns)
        faces = []
        for first in range(0, len(candidates.scores), BATCH):
            batch = candidates[np.arange(first, min(first + BATCH, len(candidates.scores)))]
            # The detector's boxes are squares parallel to the image, whose size does not depend on the angle
            # of the face.
            squares = [
                Square(
                    (box[:2] + box[2:]) / 2,
                    SQUARE_SCALE * float((box[2:] - box[:2]).max()),
                    math.atan2(*(points[1] - points[0])[::-1]),  # atan2(y, x) of the line from eye to eye
                )
                for box, points in zip(batch.boxes, batch.points, strict=True)
            ]
            landmarks, presences, squares = self._refine(pyramid, squares, REFINEMENTS)
            scores, opposite_scores = self._scores(pyramid, squares)
            # The detector accepts upside-down faces, too, and may have confused eyes and mouth.
            flipped = np.flatnonzero(opposite_scores > scores)
            if len(flipped):
                flipped_squares = [replace(squares[i], angle=squares[i].angle + math.pi) for i in flipped]
                landmarks[flipped], presences[flipped], flipped_squares = self._refine(
                    pyramid, flipped_squares, REFINEMENTS_UPSIDE_DOWN
                )
                scores[flipped], _ = self._scores(pyramid, flipped_squares)
            is_face = (scores >= VERIFIED_SCORE) & (presences >= PRESENCE)
            faces += [Face(landmarks[i], float(scores[i])) for i in np.flatnonzero(is_face)]
        return faces

    def _candidates(
        self, image_size: tuple[int, ...], canvases: list[np.ndarray], quarter_turns: int
    ) -> Detections:
        """Return the detections in all tiles of all canvases, in pixels of the image.

        Args: image_size: height and width of the image; the other arguments are those of `_verified_faces`.
        """
        tiles = []
        starts = []  # canvas, left and top of each tile
        for canvas_index, canvas in enumerate(canvases):
            turned_canvas = np.rot90(canvas, quarter_turns)
            for top in _tile_starts(turned_canvas.shape[0]):
                for left in _tile_starts(turned_canvas.shape[1]):
                    # A canvas that is smaller than a tile is filled up with black at the right and at the
                    # bottom.
                    tile = np.zeros((DETECTOR_EDGE, DETECTOR_EDGE, 3), np.uint8)
                    content = turned_canvas[top : top + DETECTOR_EDGE, left : left + DETECTOR_EDGE]
                    tile[: content.shape[0], : content.shape[1]] = content
                    tiles.append(tile)
                    starts.append((canvas_index, left, top))
        parts = []
        for (canvas_index, left, top), detections in zip(starts, self._detect(tiles), strict=True):
            height, width = canvases[canvas_index].shape[:2]
            # One factor for each axis, because the size of a canvas is rounded to whole pixels.
            scale = np.array([image_size[1] / width, image_size[0] / height])
            # Two opposite corners of each box [K, 2, 2], which are turned like the six points.
            corners = detections.boxes.reshape(-1, 2, 2)
            points = np.concatenate([corners, detections.points], axis=1) + [left, top]
            # One quarter turn back: the first row of the turned canvas is the last column of the canvas.
            turned_height, turned_width = (width, height) if quarter_turns % 2 else (height, width)
            for _ in range(quarter_turns):
                points = np.stack([turned_height - points[..., 1], points[..., 0]], axis=-1)
                turned_height, turned_width = turned_width, turned_height
            points = points * scale
            # After a turn, the upper left corner of the tile is another corner of the image.
            corners = np.sort(points[:, :2], axis=1)
            parts.append(Detections(detections.scores, corners.reshape(-1, 4), points[:, 2:]))
        candidates = Detections(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("scores", "boxes", "points")
            )
        )
        # Stable, so that equal scores keep the order of the tiles.
        candidates = candidates[np.argsort(-candidates.scores, kind="stable")]
        selected: list[int] = []
        for index, box in enumerate(candidates.boxes):
            if not (_overlaps(box, candidates.boxes[selected]) > SAME_CANDIDATE).any():
                selected.append(index)
        return candidates[np.array(selected, dtype=int)]

    def _batches(self, images: list[np.ndarray]) -> Iterator[torch.Tensor]:
        """Yield images of one size as batches of pixels 0 to 255, float32 [N, 3, H, W]."""
        for first in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.stack(images[first : first + BATCH])).to(self._device)
            # Permuted without a copy, the tensor has the layout channels_last, in which the networks take two
            # thirds of the time on a CPU.
            yield pixels.permute(0, 3, 1, 2).float()

    @torch.inference_mode()
    def _raw_detections(self, images: list[np.ndarray]) -> Iterator[Detections]:
        """Yield the detections of the detector in each image [128, 128, 3], with duplicates."""
        centres = cell_centres().numpy().astype(np.float64)
        for pixels in self._batches(images):
            # The detector expects -1..1, and the face mesh 0..1.
            logits, numbers = (output.cpu().double().numpy() for output in self._detector(pixels / 127.5 - 1))
            for image_logits, image_numbers in zip(logits, numbers, strict=True):
                # The threshold is converted to a logit, so that most of the 896 predictions need no sigmoid.
                is_face = image_logits >= math.log(DETECTION_SCORE / (1 - DETECTION_SCORE))
                # Rows of the 16 numbers: centre, size, six points; all but the size are relative to the
                # centre of the cell.
                pairs = image_numbers[is_face].reshape(-1, 8, 2)
                origins = centres[is_face][:, None]
                middles = pairs[:, :1] + origins
                half_sizes = pairs[:, 1:2] / 2
                yield Detections(
                    expit(image_logits[is_face]),
                    np.concatenate([middles - half_sizes, middles + half_sizes], axis=1).reshape(-1, 4),
                    pairs[:, 2:] + origins,
                )

    def _detect(self, images: list[np.ndarray]) -> Iterator[Detections]:
        """Yield the detections in each image [128, 128, 3], one for each face, in its pixels."""
        for detections in self._raw_detections(images):
            yield _average_duplicates(detections)

    def _refine(
        self, pyramid: Pyramid, squares: list[Square], refinements: int
    ) -> tuple[np.ndarray, np.ndarray, list[Square]]:
        """Return the landmarks of K faces, of which squares are known roughly.

        Args:
            pyramid: image.
            squares: squares of the K faces.
            refinements: number of times that the landmarks give the next square.
        Returns: landmarks [K, 468, 3] in pixels of the image; the face mesh's probabilities [K] that the
            squares contain a face; and the squares around the landmarks.
        """
        # The returned squares follow from the returned landmarks: they are one step further.
        for _ in range(1 + refinements):
            landmarks, presences = self._landmarks(pyramid, squares)
            squares = [_square_of(points[:, :2], points[list(EYE_CORNERS), :2]) for points in landmarks]
        return landmarks, presences, squares

    @torch.inference_mode()
    def _landmarks(self, pyramid: Pyramid, squares: list[Square]) -> tuple[np.ndarray, np.ndarray]:
        """Return what the face mesh predicts for K squares: landmarks [K, 468, 3] in pixels of the image, and
        probabilities [K] of a face.
        """
        crops = [pyramid.crop(square, LANDMARK_EDGE) for square in squares]
        outputs = [self._mesh(pixels / 255) for pixels in self._batches(crops)]
        landmarks, logits = (torch.cat(parts).cpu().double().numpy() for parts in zip(*outputs, strict=True))
        # Middle of the crop as origin, pixels of the image as unit.
        edges = np.array([square.edge for square in squares])[:, None, None]
        # The depth is scaled as x and y are. Its origin does not lie in the crop, so it is not shifted.
        landmarks = (landmarks - [LANDMARK_EDGE / 2, LANDMARK_EDGE / 2, 0]) * (edges / LANDMARK_EDGE)
        for square, points in zip(squares, landmarks, strict=True):
            # Each row of `axes` is a direction in the image, so offsets stand on the left of the product.
            points[:, :2] = square.centre + points[:, :2] @ square.axes()
        return landmarks, expit(logits)

    def _scores(self, pyramid: Pyramid, squares: list[Square]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores [K] with which the detector detects an upright face in each square, and those of
        the squares upside down. A score is 0 if there is no detection.

        A detection counts if it covers the part of the square that the landmarks cover, and if its eyes are
        nearer to the horizontal than to the vertical, with the left one on the left.
        """
        crops = [pyramid.crop(square, DETECTOR_EDGE) for square in squares]
        # The square is 1.5 times as large as the box of the landmarks, which lies in its middle.
        margin = DETECTOR_EDGE * (1 - 1 / SQUARE_SCALE) / 2
        expected_box = np.array([margin, margin, DETECTOR_EDGE - margin, DETECTOR_EDGE - margin])
        scores = []
        for detections in self._detect([*crops, *(np.rot90(crop, 2) for crop in crops)]):
            eye_lines = detections.points[:, 1] - detections.points[:, 0]  # [K, 2]
            is_upright = eye_lines[:, 0] > np.abs(eye_lines[:, 1])
            is_covered = _overlaps(expected_box, detections.boxes) > SAME_DETECTION
            scores.append(float(detections.scores[is_upright & is_covered].max(initial=0.0)))
        return np.array(scores[: len(squares)]), np.array(scores[len(squares) :])


def load_face_finder(device: str | torch.device = "cpu", path: str | Path = ASSET) -> FaceFinder:
    """Return a finder with the bundled networks.

    Args:
        device: device on which the networks compute.
        path: file of `builders/face.py`.
    Raises: FileNotFoundError if the file is missing; ValueError for another file.
    """
    detector, mesh, _ = load_networks(path)
    return FaceFinder(detector, mesh, device)


def canonical_face(path: str | Path = ASSET) -> np.ndarray:
    """Return MediaPipe's canonical face: mean positions of the 468 landmarks, float64 [468, 3], in cm.

    x points to the right in the image of a frontal face, y upwards, and z towards the viewer. The outer
    corners of the eyes are 8.9 cm apart.

    Args: path: file of `builders/face.py`.
    Raises: FileNotFoundError if the file is missing; ValueError for another file.
    """
    return load_networks(path)[2].numpy()
