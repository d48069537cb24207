"""What `--dry-run` says: what would be done, and what it needs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SlideError

if TYPE_CHECKING:
    from ..baselines import System
    from ..brush import Brush
    from ..encoder import Encoder
    from ..followed import Followed
    from ..grid import Grid
    from ..slide import Slide
    from ..stages import Painting


def plan_embedding(
    encoder: Encoder, paths: list[Path], out: Path, assume_mpp: float | None, force_mpp: float | None,
    outlines: Path | None = None, shard: tuple[int, int] = (1, 1),
) -> dict[str, Any]:  # fmt: skip
    """What would be embedded, and what it would need; slides that cannot be read are named."""
    from ..cohort import cohort_of
    from ..embed import COVER, PITCHES
    from ..estimate import encoder_seconds
    from ..machine import peak_memory
    from ..outlines import find_outlines, read_outlines
    from ..probe import probe
    from ..slide import open_slide
    from ..tissue import find_tissue

    slides, failed, tiles = cohort_of(paths, outlines, shard), [], 0
    for one in slides:
        mpp = one.assumed(assume_mpp)
        try:
            probe(one.path, assume_mpp=mpp, force_mpp=force_mpp)
            slide = open_slide(one.path, assume_mpp=mpp, force_mpp=force_mpp)
            drawn = None if outlines is None else find_outlines(outlines, one.name)
            tissue = find_tissue(slide) if drawn is None else read_outlines(drawn, slide)
        except SlideError as error:
            failed.append(str(error))
        else:
            covers = [tissue.cover(slide.grid.at(encoder.tile * mpp)) for mpp in PITCHES]
            tiles += sum(int((cover >= COVER).sum()) for cover in covers)
    minutes = encoder_seconds(encoder, tiles) / 60
    return {
        "slides": [str(one.path) for one in slides],
        "unreadable": failed,
        "tiles": tiles,
        "time": f"about {minutes:.1f} minutes, and the reading",
        "memory": f"about {peak_memory() / 1e9:.1f} GB",  # the encoder has just been tried
        "disk": f"about {tiles * encoder.dim * 2 / 1e6:.0f} MB",
        "output": str(out),
    }


def plan_painting(
    brush: Brush, encoder: Encoder | None, slide: Slide | Followed | None, out: Path, painting: Painting,
    drawn: Grid | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Where would be painted, and what it would need: time from a few tiles on this machine. Of a label, and of a
    canvas of the pixels `drawn`, there is neither slide nor encoder, of embeddings alone no encoder."""
    from ..estimate import embedding_seconds, painting_seconds
    from ..followed import Followed
    from ..stages import budget, stages, state_bytes
    from ..synthesize import choose_canvas, label_canvas

    def place() -> Grid:
        if drawn is not None:
            return drawn
        if slide is None:
            return label_canvas(painting)
        tissue = slide.tissue if isinstance(slide, Followed) else brush.tissue_of(slide)
        return choose_canvas(slide, painting, tissue)

    ladder = brush.ladder.starting_at(painting.mpp)  # before the slide is searched for tissue
    if brush.rival is not None:
        return _plan_rival(brush.rival, place(), out, painting)
    tile, room = budget(painting, brush.denoiser.config)
    canvas = place()
    seconds = painting_seconds(brush, canvas, painting)
    seconds += 0 if encoder is None else embedding_seconds(encoder, brush, canvas)
    pixels, state = canvas.height * canvas.width, state_bytes(canvas, ladder)
    moves: Counter[float] = Counter()
    for stage in stages(ladder, painting):
        if stage.move is not None:
            moves[stage.mpp] += 1 + len(stage.retouches)
    memory = painting.memory - room + (state if state <= room else 0)
    return {
        "canvas": f"{canvas.height} x {canvas.width} pixels at {canvas.mpp:g} µm",
        "corner": f"row {canvas.top}, column {canvas.left} (pixels at {canvas.mpp:g} µm)",
        "time": f"about {seconds / 60:.1f} minutes",
        "device": f"{painting.device}, {painting.precision}",
        "steps": ", ".join(f"{count} at {mpp:g} µm" for mpp, count in moves.items()),
        "hand-overs": ladder.budget() if painting.progressive else [],
        "tiles": f"{tile} x {tile} pixels",
        "memory": f"at most {memory / 1e9:.1f} GB",
        "disk": f"at most {(pixels * 4 + state) / 1e6:.0f} MB, of which {pixels * 4 / 1e6:.0f} MB stay",
        "output": f"{out}{' (exists)' if out.exists() else ''}",
    }


def _plan_rival(rival: System, canvas: Grid, out: Path, painting: Painting) -> dict[str, Any]:
    from ..paint import check_rival

    check_rival(rival, canvas, painting)
    return {
        "canvas": f"{canvas.height} x {canvas.width} pixels at {canvas.mpp:g} µm",
        "corner": f"row {canvas.top}, column {canvas.left} (pixels at {canvas.mpp:g} µm)",
        "time": f"not known for {rival.name}",
        "steps": f"{painting.steps}, all at {canvas.mpp:g} µm; interrupted, it begins anew",
        "memory": f"about {rival.bytes_for(canvas) / 1e9:.1f} GB, and one more for the process",
        "disk": f"about {canvas.height * canvas.width * 4 / 1e6:.0f} MB",
        "output": f"{out}{' (exists)' if out.exists() else ''}",
    }


def plan_evaluation(
    sides: list[list[Slide]], encoders: list[Encoder], out: Path, most: int, training: list[Slide], until: float, *,
    published: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What would be compared, and at most how many tiles: time from a batch of blank ones on this machine."""
    from ..copying import MOST
    from ..estimate import encoder_seconds
    from ..evaluate import SCALES
    from ..nearest import search_seconds, whole

    tiles, seconds = 0, 0.0
    for encoder in encoders:
        mine = 0
        for side in sides:
            for mpp in SCALES:
                across = [[length * slide.mpp / mpp / encoder.tile for length in slide.grid.shape] for slide in side]
                mine += min(most, sum(int(4 * height * width) for height, width in across))
        tiles += mine
        seconds += encoder_seconds(encoder, 2.0 * mine)  # as many again on borders and for control
    search, more = "", dict[str, Any]()
    if training:
        minutes = search_seconds(2 * min(most, MOST), [whole(slide, until) for slide in training]) / 60
        search, more = f", {minutes:.1f} looking for copies", {"training": [slide.path.name for slide in training]}
    more |= {"published": _plan_published(sides, most)} if published else {}
    return {
        "real": [f"{slide.path.name} ({slide.mpp:.4g} µm per pixel)" for slide in sides[0]],
        "synthetic": [f"{slide.path.name} ({slide.mpp:.4g} µm per pixel)" for slide in sides[1]],
        "encoders": [encoder.name for encoder in encoders],
        "tiles": f"at most {tiles}",
        "time": f"at most {seconds / 60:.1f} minutes in the encoders{search}, and about one more",
        **more,
        "output": f"{out}{' (exists)' if out.exists() else ''}",
    }


def _plan_published(sides: list[list[Slide]], most: int) -> str:
    """Of the figures that papers print: what is missing, and the time that Inception-v3 needs for its crops."""
    from ..estimate import encoder_seconds
    from ..evaluate import SCALES
    from ..published import CROP, find_networks
    from ..samples import common_pitch

    networks, said = find_networks(), []
    if networks.inception is not None:
        finest = common_pitch(sides[0], sides[1], SCALES[0])
        crops = 0
        for side in sides:
            across = [[length * slide.mpp / finest / CROP for length in slide.grid.shape] for slide in side]
            crops += min(most, sum(int(4 * height * width) for height, width in across))
        seconds = encoder_seconds(networks.inception, 1.25 * crops, batch=8)  # and thumbnails of half of one side
        said.append(f"Crop FID of at most {crops} crops: at most {seconds / 60:.1f} minutes in Inception-v3")
    if networks.clip is not None:
        said.append("CLIP FID: its time is that of reading and coding the images")
    return "; ".join([*said, *([networks.missing] if networks.missing else [])])
