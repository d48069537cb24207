"""Verb: brush + reference -> pyramid: a new slide that follows a reference's embeddings and copies none of its pixels.

The canvas is a place on the reference's own plane, so the painting lies where its reference lies. A brush that was
trained on classes has no reference: it is asked for a label. What is painted on a `Canvas` by hand has none either.
Where only the embeddings of a slide are at hand they are `Followed`, and its pixels are not missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import __version__
from .brush import Brush
from .canvas import Canvas
from .cluster import Cluster
from .commit import check_target, staged
from .embed import embed_region, slide_fingerprint
from .encoder import Encoder
from .errors import SlideError, UsageError
from .followed import Followed, follow
from .grid import Grid
from .machine import check_precision, find_device, undisturbed
from .paint import Show, check_rival, paint_canvas
from .pair import check_picture, compare, write_pair
from .progress import Tell
from .pyramid import SHARD, Pyramid
from .scratch import Plane, working
from .slide import Slide, open_slide
from .stages import Painting, budget, whole
from .store import EmbeddingMap
from .stream import read_plane
from .tissue import Tissue

if TYPE_CHECKING:
    from distributed import Client

KIND = "pyramid"


@dataclass(frozen=True)
class Painted:
    """What came of it: where the slide is, its region (level-0 pixels of the reference), what it took.

    cosine: how close it is, the mean cosine between the standardised embeddings of the painting and of its reference,
    by pitch in µm; NaN where no whole tile holds tissue. A label and a canvas have no reference: no region, no cosine;
    embeddings alone have no cosine, and a region where they say what slide they are of.
    """

    path: Path
    region: tuple[int, int, int, int] | None
    shape: tuple[int, int]
    seconds: float
    cosine: dict[float, float]


# -- where ---------------------------------------------------------------------------------------------


def choose_canvas(slide: Slide | Followed, painting: Painting, tissue: Tissue) -> Grid:
    """The pixels to paint, at the painting's pitch.

    Raises:
        UsageError: if the region or the size does not fit the slide, or it is not known how large that is.
    """
    scale = slide.mpp / painting.mpp
    if painting.region is not None:
        if isinstance(slide, Followed):
            slide.check_placed()
        return _canvas_of(slide, painting.region, painting.mpp)
    if painting.size < 1:
        raise UsageError(f"a size of {painting.size} pixels cannot be painted; give --size 4096")
    room = [math.floor(side * scale + 1e-6) for side in slide.grid.shape]
    if min(room) < painting.size:
        raise UsageError(
            f"{slide.path}: {room[0]} x {room[1]} pixels at {painting.mpp:g} µm, too small for {painting.size} x "
            f"{painting.size}; give --size {min(room)} or less"
        )
    # whole cells of the coarsest pitch, so that every level of the ladder starts at a pixel
    top, left = (
        min(round(place / painting.mpp), side - painting.size) // 16 * 16
        for place, side in zip(_richest(tissue, painting.size * painting.mpp), room, strict=True)
    )
    return Grid(painting.mpp, top, left, painting.size, painting.size)


def label_canvas(painting: Painting) -> Grid:
    """The pixels to paint where there is no reference: a square from the plane's corner.

    Raises:
        UsageError: if there are none, or a place on a reference is asked for.
    """
    if painting.region is not None:
        raise UsageError("a region is a place on a reference, and a label has none; give --size 1024")
    if painting.size < 1:
        raise UsageError(f"a size of {painting.size} pixels cannot be painted; give --size 1024")
    return Grid(painting.mpp, 0, 0, painting.size, painting.size)


def _canvas_of(slide: Slide | Followed, region: tuple[int, int, int, int], mpp: float) -> Grid:
    top, left, height, width = region
    inside = min(top, left) >= 0 and top + height <= slide.grid.height and left + width <= slide.grid.width
    if not inside or height < 1 or width < 1:
        raise UsageError(
            f"{slide.path}: region {top},{left},{height},{width} is not inside the slide; level 0 is "
            f"{slide.grid.height} x {slide.grid.width} pixels; give TOP,LEFT,HEIGHT,WIDTH within it"
        )
    scale = slide.mpp / mpp
    first, last = ((round(edge * scale) for edge in edges) for edges in ((top, left), (top + height, left + width)))
    (top, left), (bottom, right) = first, last
    if bottom <= top or right <= left:
        raise UsageError(f"{slide.path}: the region is smaller than one pixel at {mpp:g} µm; enlarge it")
    return Grid(mpp, top, left, bottom - top, right - left)


def _richest(tissue: Tissue, side: float) -> tuple[float, float]:
    """Corner in µm of the square of `side` µm with the most tissue; of equals the one nearest the tissue's middle."""
    mask, mpp = tissue.mask, tissue.grid.mpp
    down, right = (max(1, min(round(side / mpp), length)) for length in mask.shape)
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    counts = total[down:, right:] - total[:-down, right:] - total[down:, :-right] + total[:-down, :-right]
    best = np.argwhere(counts == counts.max())
    places = np.argwhere(mask)
    middle = (places.mean(0) + 0.5 if len(places) else np.array(mask.shape) / 2) - np.array((down, right)) / 2
    row, column = best[np.argmin(((best - middle) ** 2).sum(1))]
    return (tissue.grid.top + float(row)) * mpp, (tissue.grid.left + float(column)) * mpp


# -- the verb ------------------------------------------------------------------------------------------


def check_asked(brush: Brush, label: str | None, client: Client | None = None) -> None:
    """Whether a brush can be asked for a label, or for what a reference shows (no label), and on a cluster.

    Raises:
        UsageError: if its condition is the other, it knows no such label, or it paints in one process.
    """
    if brush.rival is not None and client is not None:
        raise UsageError(f"--scheduler: {brush.rival.name} paints in one process; leave it out")
    known, followed = brush.labels, brush.about["encoder"]
    if label is None and known is not None:
        raise UsageError(f"this brush follows labels, no reference; give --label, one of {', '.join(known.names)}")
    if label is not None and known is None:
        raise UsageError(f"this brush knows no labels, it follows embeddings of {followed}; give --ref SLIDE")
    if label is not None and known is not None:
        known.maps(label, Grid(1.0, 0, 0, 1, 1))


def synthesize_slide(
    reference: Path | str, target: Path | str, painting: Painting, *, brush: Brush, encoder: Encoder,
    assume_mpp: float | None = None, force_mpp: float | None = None, overwrite: bool = False, png: Path | None = None,
    client: Client | None = None, tell: Tell | None = None, show: Show | None = None,
) -> Painted:  # fmt: skip
    """Paint a new slide after a reference, as an OME-Zarr pyramid at `target`; killed, the same call goes on.

    `png`: also write the reference and the painting side by side there. `client`: a Dask cluster that paints the tiles;
    its workers must see the folder of `target`. `show` sees the canvas while it is painted.

    Raises:
        UsageError, SlideError, RefusedError, MachineError: one line each, before the hours of work where possible.
    """
    start, target = time.monotonic(), _asked(target, painting, brush, None, client)
    ladder = brush.ladder.starting_at(painting.mpp)
    if brush.about["fingerprint"] != encoder.fingerprint:
        raise UsageError(
            f"the brush was trained on embeddings of {brush.about['encoder']} ({brush.about['fingerprint'][:12]}), "
            f"the encoder is {encoder.name} ({encoder.fingerprint[:12]}); use the encoder it was trained with"
        )
    slide = open_slide(reference, assume_mpp=assume_mpp, force_mpp=force_mpp)
    if target.resolve() == slide.path.resolve():
        raise UsageError(f"{target}: is the reference itself; choose another output")
    check_target(target, kind=KIND, overwrite=overwrite)
    if png is not None:
        check_picture(png, overwrite=overwrite)
    tissue = brush.tissue_of(slide)
    canvas = choose_canvas(slide, painting, tissue)
    reference = slide_fingerprint(slide.path)
    parameters = {
        "reference": reference, "reference mpp": slide.mpp, "encoder": encoder.fingerprint,
        **_parameters(canvas, painting, brush),
    }  # fmt: skip
    about = _provenance(canvas, painting, brush) | {
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "reference": {
            "mpp": slide.mpp, "mpp_source": slide.mpp_source, "region": list(_level0(slide, canvas)),
            "fingerprint": reference[:16],
        },
    }  # fmt: skip

    def maps() -> dict[float, EmbeddingMap]:
        told = None if tell is None else (lambda done, total: tell("embedding the reference", done, total))
        area = whole(canvas, ladder)
        try:
            return embed_region(slide, area, encoder=encoder, pitches=brush.pitches, tissue=tissue, progress=told)
        except SlideError as error:  # without its embeddings, glass would be painted there
            raise SlideError(f"{error}; choose another place with --region TOP,LEFT,HEIGHT,WIDTH") from None

    _paint(
        target, canvas, maps, painting, brush=brush, parameters=parameters, about=about, overwrite=overwrite,
        client=client, tell=tell, show=show,
    )  # fmt: skip
    painted = open_slide(target)
    if png is not None:
        write_pair(png, slide, painted, canvas)
    cosine = compare(slide, painted, canvas, brush=brush, encoder=encoder)
    return Painted(target, _level0(slide, canvas), canvas.shape, time.monotonic() - start, cosine)


def synthesize_embeddings(
    followed: Followed | Path | str, target: Path | str, painting: Painting, *, brush: Brush, overwrite: bool = False,
    client: Client | None = None, tell: Tell | None = None, show: Show | None = None,
) -> Painted:  # fmt: skip
    """Paint after embeddings alone, or after the store that is there: what `synthesize_slide` would paint after their
    slide; otherwise as it.

    Raises:
        UsageError, RefusedError, MachineError: one line each, before the hours of work where possible.
    """
    start, target = time.monotonic(), _asked(target, painting, brush, None, client)
    one = followed if isinstance(followed, Followed) else follow([followed], brush=brush)
    one.check_brush(brush)
    area = whole(canvas := choose_canvas(one, painting, one.tissue), brush.ladder.starting_at(painting.mpp))
    check_target(target, kind=KIND, overwrite=overwrite)
    region = _level0(one, canvas)
    _paint(
        target, canvas, lambda: one.maps(area), painting, brush=brush,
        parameters={"embeddings": one.digest, **_parameters(canvas, painting, brush)},
        about=_provenance(canvas, painting, brush) | one.provenance(region), overwrite=overwrite, client=client,
        tell=tell, show=show,
    )  # fmt: skip
    return Painted(target, None if one.slide is None else region, canvas.shape, time.monotonic() - start, {})


def synthesize_label(
    label: str, target: Path | str, painting: Painting, *, brush: Brush, overwrite: bool = False,
    client: Client | None = None, tell: Tell | None = None, show: Show | None = None,
) -> Painted:  # fmt: skip
    """Paint a square of a label, `painting.size` pixels a side, with a brush that was trained on labels; otherwise as
    `synthesize_slide`.

    Raises:
        UsageError, RefusedError, MachineError: one line each, before the hours of work where possible.
    """
    start, target = time.monotonic(), _asked(target, painting, brush, label, client)
    assert brush.labels is not None
    known, area = brush.labels, whole(canvas := label_canvas(painting), brush.ladder.starting_at(painting.mpp))
    check_target(target, kind=KIND, overwrite=overwrite)
    _paint(
        target, canvas, lambda: known.maps(label, area, pitches=brush.pitches), painting, brush=brush,
        parameters={"label": label, **_parameters(canvas, painting, brush)},
        about=_provenance(canvas, painting, brush) | {"label": label}, overwrite=overwrite, client=client, tell=tell,
        show=show,
    )  # fmt: skip
    return Painted(target, None, canvas.shape, time.monotonic() - start, {})


def synthesize_canvas(
    canvas: Canvas | Path | str, target: Path | str, painting: Painting, *, brush: Brush, overwrite: bool = False,
    client: Client | None = None, tell: Tell | None = None, show: Show | None = None,
) -> Painted:  # fmt: skip
    """Paint a canvas, or the one that is saved there, at its own place and pitch; otherwise as `synthesize_slide`.

    Size, region and pitch of `painting` are not read.

    Raises:
        UsageError, RefusedError, MachineError: one line each, before the hours of work where possible.
    """
    start, target = time.monotonic(), _asked(target, painting, brush, None, client)
    drawn = canvas if isinstance(canvas, Canvas) else Canvas.load(canvas)
    drawn.check_brush(brush.about["encoder"], brush.about["fingerprint"], brush.pitches)
    painting, digest = replace(painting, mpp=drawn.grid.mpp), drawn.fingerprint
    brush.ladder.starting_at(painting.mpp)
    check_target(target, kind=KIND, overwrite=overwrite)
    _paint(
        target, drawn.grid, drawn.maps, painting, brush=brush,
        parameters={"canvas maps": digest, **_parameters(drawn.grid, painting, brush)},
        about=_drawn(drawn, painting, brush), overwrite=overwrite, client=client, tell=tell, show=show,
    )  # fmt: skip
    return Painted(target, None, drawn.grid.shape, time.monotonic() - start, {})


def save_painted(
    canvas: Canvas, pixels: NDArray[np.uint8], target: Path | str, painting: Painting, *, brush: Brush,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write what was painted of a canvas part by part (`repaint`), (height, width, 3), as a pyramid at `target`; it
    says `"repainted": true`, as the same call would not paint these pixels again.

    Raises:
        UsageError: if the pixels are not those of the canvas.
        RefusedError, MachineError: as `commit.staged`.
    """
    if pixels.shape != (*canvas.grid.shape, 3) or pixels.dtype != np.uint8:
        raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}, the canvas has {canvas.grid.shape}")
    about = _drawn(canvas, replace(painting, mpp=canvas.grid.mpp), brush) | {"repainted": True}
    whole_of = Grid(canvas.grid.mpp, 0, 0, *canvas.grid.shape)
    _write(Path(target), canvas.grid, lambda window: pixels[window.within(whole_of)], about=about, overwrite=overwrite)


def _drawn(canvas: Canvas, painting: Painting, brush: Brush) -> dict[str, Any]:
    """What a painting says of the canvas that it was made after."""
    return _provenance(canvas.grid, painting, brush) | {
        "encoder": canvas.encoder,
        "encoder_fingerprint": canvas.encoder_fingerprint,
        "canvas": {"fingerprint": canvas.fingerprint, "strokes": len(canvas.strokes)},
    }


def _asked(target: Path | str, painting: Painting, brush: Brush, label: str | None, client: Client | None) -> Path:
    """The target, if machine and brush can do what is asked for."""
    check_precision(painting.precision, find_device(painting.device))
    check_asked(brush, label, client)
    return Path(target)


def _paint(
    target: Path, canvas: Grid, find_maps: Callable[[], dict[float, EmbeddingMap]], painting: Painting, *,
    brush: Brush, parameters: dict[str, Any], about: dict[str, Any], overwrite: bool, client: Client | None,
    tell: Tell | None, show: Show | None,
) -> None:  # fmt: skip
    """From what is asked for to the finished pyramid."""
    if brush.rival is not None:
        check_rival(brush.rival, canvas, painting)
    ladder = brush.ladder.starting_at(painting.mpp)
    with working(target, parameters, overwrite=overwrite) as work:
        maps, hands = find_maps(), None
        if client is not None:
            painting = replace(painting, tile=budget(painting, brush.denoiser.config)[0])
            area = whole(canvas, ladder)
            hands = Cluster(client, work.folder, brush=brush, maps=maps, area=area, painting=painting)
        state = paint_canvas(brush, maps, canvas, painting, work=work, hands=hands, tell=tell, show=show)
        _write(target, canvas, partial(_pixels_in, state), about=about, overwrite=overwrite)
        del state


def _write(
    target: Path, canvas: Grid, read: Callable[[Grid], NDArray[np.uint8]], *, about: dict[str, Any], overwrite: bool
) -> None:
    """The pyramid of a canvas; `read` gives the pixels of windows counted from its corner."""
    with staged(target, kind=KIND, about={"format": 1}, overwrite=overwrite) as stage:
        pyramid = Pyramid(stage, canvas, about=about)
        for part in canvas.tiles(SHARD):
            window = Grid(canvas.mpp, part.top - canvas.top, part.left - canvas.left, *part.shape)
            with undisturbed():
                pyramid.write(part, read(window))
        with undisturbed():
            pyramid.finish()


def _pixels_in(state: Plane, window: Grid) -> NDArray[np.uint8]:
    return as_pixels(read_plane(state, window))


def as_pixels(image: Tensor) -> NDArray[np.uint8]:
    """(3, h, w) in [-1, 1] -> (h, w, 3) in 0 to 255."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _level0(slide: Slide | Followed, canvas: Grid) -> tuple[int, int, int, int]:
    top, left, bottom, right = (round(edge / slide.mpp) for edge in canvas.extent)
    return top, left, bottom - top, right - left


def _parameters(canvas: Grid, painting: Painting, brush: Brush) -> dict[str, Any]:
    """What decides every pixel, beside what is asked for: a killed run goes on only with the same."""
    return {
        "canvas": [canvas.top, canvas.left, canvas.height, canvas.width],
        "mpp": canvas.mpp,
        "brush": brush.fingerprint,
        **_sampling(painting, brush),
        "version": __version__,
        "torch": torch.__version__,
    }


def _sampling(painting: Painting, brush: Brush) -> dict[str, Any]:
    """How noise became an image; a rival has a sampler of its own."""
    rival = brush.rival
    own: dict[str, Any]
    own = {"solver": painting.solver, "progressive": painting.progressive} if rival is None else {"system": rival.name}
    own |= {"device": find_device(painting.device).type, "precision": painting.precision}  # other bits, nearly the same
    return {"seed": painting.seed, "steps": painting.steps, "guidance": painting.guidance, **own}


def _provenance(canvas: Grid, painting: Painting, brush: Brush) -> dict[str, Any]:
    """What stands on every level of the painting, beside what was asked for: a label, or of the reference nothing but
    its pixel size, the region, and half of the digest of its bytes, by which whoever has the file can tell it from
    others, and nobody else learns anything."""
    return {
        "synthetic": True,
        "generator": "wsi-brush",
        "versions": {"wsi-brush": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "brush_sha256": brush.sha256,
        "brush_fingerprint": brush.fingerprint,
        **_sampling(painting, brush),
        "mpp": canvas.mpp,
    }
