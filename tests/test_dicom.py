"""DICOM: a series of files is one slide, its pixels are the stored ones, and nobody's name leaves it."""

from __future__ import annotations

import copy
import io
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import levels_of, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from test_embed import ColourEncoder

from wsi_brush.cohort import embed_slides
from wsi_brush.errors import SlideError
from wsi_brush.grid import Grid
from wsi_brush.slide import open_slide
from wsi_brush.slide.dicom import DicomReader, Header, read_header
from wsi_brush.slide.readers import OpenSlideReader
from wsi_brush.store import EmbeddingStore

WHOLE_SLIDE, CT = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.5.1.4.1.1.2"
PATIENT = {"PatientName": "Mustermann^Erika", "PatientID": "HOSP-4711", "AccessionNumber": "S26-0815"}


def write_dicom(
    folder: Path,
    levels: list[NDArray[np.uint8]],
    *,
    mpp: float | None = 0.5,
    jpeg: bool = False,
    tile: int = 128,
    suffix: str = ".dcm",
    series: str | None = None,
    implicit: bool = False,
    sop: str = WHOLE_SLIDE,
) -> list[Path]:
    """A series as scanners write it, tiled in full: a file a level, then a label and an overview (both black).

    The names of the files say nothing of the order of the levels: they are numbered from the coarsest.
    """
    from pydicom.uid import generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = series or generate_uid(), generate_uid(), generate_uid()
    black = np.zeros((96, 64, 3), np.uint8)
    kinds = ["VOLUME"] * len(levels) + ["LABEL", "OVERVIEW"]
    paths = []
    for number, (kind, pixels) in enumerate(zip(kinds, [*levels, black, black], strict=True)):
        scale = levels[0].shape[1] / pixels.shape[1]
        about = _dataset(kind, pixels, None if mpp is None else mpp * scale, tile=tile if kind == "VOLUME" else 96)
        about.ImageType = ["ORIGINAL" if number == 0 else "DERIVED", "PRIMARY", kind, "RESAMPLED" if number else "NONE"]
        about.SOPClassUID, about.SOPInstanceUID = sop, generate_uid()
        about.StudyInstanceUID, about.SeriesInstanceUID, about.FrameOfReferenceUID = study, series, frame
        about.InstanceNumber = number + 1
        _put_pixels(about, pixels, jpeg=jpeg, tile=tile if kind == "VOLUME" else 96)
        paths.append(folder / f"{len(levels) - number + 5}{suffix}")
        _save(about, paths[-1], jpeg=jpeg, implicit=implicit)
    return paths


def _dataset(kind: str, pixels: NDArray[np.uint8], mpp: float | None, *, tile: int) -> Any:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence
    from pydicom.uid import generate_uid

    def part(**values: Any) -> Any:
        one = Dataset()
        for name, value in values.items():
            setattr(one, name, Sequence([value]) if isinstance(value, Dataset) else value)
        return one

    def code(value: str, meaning: str) -> Any:
        return part(CodeValue=value, CodingSchemeDesignator="DCM", CodeMeaning=meaning)

    height, width, _ = pixels.shape
    across, down = -(-width // tile), -(-height // tile)
    about = part(**PATIENT, Modality="SM", Manufacturer="wsi-brush tests", ManufacturerModelName="SYNTHETIC")
    about.PatientBirthDate, about.PatientSex, about.StudyID, about.SeriesNumber = "19700101", "F", "1", 1
    about.StudyDate, about.StudyTime, about.ReferringPhysicianName = "20260101", "120000", "Doe^Jane"
    about.ContentDate, about.ContentTime, about.AcquisitionDateTime = "20260101", "120000", "20260101120000"
    about.DeviceSerialNumber, about.SoftwareVersions, about.PositionReferenceIndicator = "1", "1", "SLIDE_CORNER"
    # A sequence of undefined length before the series: readers of headers have to go through it.
    about.ReferencedStudySequence = Sequence([part(ReferencedSOPClassUID=CT, ReferencedSOPInstanceUID=generate_uid())])
    about["ReferencedStudySequence"].is_undefined_length = True
    about.VolumetricProperties, about.BurnedInAnnotation = "VOLUME", "YES" if kind == "LABEL" else "NO"
    about.SpecimenLabelInImage, about.FocusMethod, about.ExtendedDepthOfField = "NO", "AUTO", "NO"
    about.LossyImageCompression, about.NumberOfOpticalPaths, about.TotalPixelMatrixFocalPlanes = "00", 1, 1
    about.ContainerIdentifier = PATIENT["AccessionNumber"]
    about.DimensionOrganizationType = "TILED_FULL"
    organisation = generate_uid()
    about.DimensionOrganizationSequence = Sequence([part(DimensionOrganizationUID=organisation)])
    about.TotalPixelMatrixColumns, about.TotalPixelMatrixRows = width, height
    about.TotalPixelMatrixOriginSequence = Sequence(
        [part(XOffsetInSlideCoordinateSystem=0, YOffsetInSlideCoordinateSystem=0)]
    )
    about.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    about.Rows = about.Columns = tile
    about.NumberOfFrames = across * down
    about.SamplesPerPixel, about.PlanarConfiguration, about.PixelRepresentation = 3, 0, 0
    about.BitsAllocated = about.BitsStored = 8
    about.HighBit = 7
    lamp = code("111744", "Brightfield illumination")
    about.OpticalPathSequence = Sequence(
        [part(OpticalPathIdentifier="0", IlluminationTypeCodeSequence=lamp, IlluminationColorCodeSequence=lamp)]
    )
    shared = part(WholeSlideMicroscopyImageFrameTypeSequence=part(FrameType=["ORIGINAL", "PRIMARY", kind, "NONE"]))
    if mpp is not None:
        about.ImagedVolumeWidth, about.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
        about.ImagedVolumeDepth = 1.0
        size = part(PixelSpacing=[f"{mpp / 1000:.10g}"] * 2, SliceThickness=0.001)
        shared.PixelMeasuresSequence = Sequence([size])
    about.SharedFunctionalGroupsSequence = Sequence([shared])
    return about


def _put_pixels(about: Any, pixels: NDArray[np.uint8], *, jpeg: bool, tile: int) -> None:
    from pydicom.encaps import encapsulate

    height, width, _ = pixels.shape
    beyond = ((0, -height % tile), (0, -width % tile), (0, 0))
    full = np.pad(
        pixels, beyond, "edge" if jpeg else "constant"
    )  # black where none should look, but for JPEG's ringing
    frames = [
        full[y : y + tile, x : x + tile] for y in range(0, len(full), tile) for x in range(0, full.shape[1], tile)
    ]
    about.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
    if not jpeg:
        about.PixelData = b"".join(frame.tobytes() for frame in frames)
        return
    coded = []
    for frame in frames:
        memory = io.BytesIO()
        Image.fromarray(frame).save(memory, "JPEG", quality=95, subsampling="4:2:2")
        coded.append(memory.getvalue())
    about.PixelData = encapsulate(coded)
    about["PixelData"].is_undefined_length = True
    about.LossyImageCompression = "01"
    about.LossyImageCompressionMethod, about.LossyImageCompressionRatio = "ISO_10918_1", 10


def _save(about: Any, path: Path, *, jpeg: bool, implicit: bool) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit

    about.file_meta = FileMetaDataset()
    plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    about.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else plain
    about.file_meta.MediaStorageSOPClassUID = about.SOPClassUID
    about.file_meta.MediaStorageSOPInstanceUID = about.SOPInstanceUID
    about.save_as(path, enforce_file_format=True)


SHAPE, HALVES = (512, 768), (1, 2, 4)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The picture, as series that OpenSlide reads and such that it does not; shared, so no test may change them."""
    folder = tmp_path_factory.mktemp("dicom")
    levels = levels_of(SHAPE, HALVES)
    return {
        "plain": write_dicom(folder / "plain", levels),
        "jpeg": write_dicom(folder / "jpeg", levels, jpeg=True),
        "implicit": write_dicom(folder / "implicit", levels, implicit=True),
        "ragged": write_dicom(folder / "ragged", levels_of((505, 761), HALVES)),
        "thirds": write_dicom(folder / "thirds", levels_of((504, 720), (1, 3, 9))),
        "no-mpp": write_dicom(folder / "no-mpp", levels, mpp=None),
    }


@pytest.mark.parametrize(
    ("name", "reader", "source", "shape", "factors"),
    [
        ("plain", "dicom", "dicom pixel spacing", SHAPE, HALVES),
        ("jpeg", "dicom", "dicom pixel spacing", SHAPE, HALVES),
        ("implicit", "dicom", "dicom pixel spacing", SHAPE, HALVES),
        ("ragged", "dicom", "dicom pixel spacing", (505, 761), HALVES),
        ("thirds", "openslide", "openslide.mpp-x", (504, 720), (1, 3, 9)),  # no halves: wsidicom refuses them
        ("no-mpp", "openslide", "assumed", SHAPE, HALVES),
    ],
)
def test_a_series_is_described_and_its_pixels_are_the_stored_ones(
    series: dict[str, list[Path]], name: str, reader: str, source: str, shape: tuple[int, int], factors: tuple[int, ...]
) -> None:
    slide = open_slide(series[name][0], assume_mpp=0.5)
    assert (slide.path, slide.reader, slide.mpp, slide.mpp_source) == (series[name][0], reader, 0.5, source)
    assert slide.grid == Grid(0.5, 0, 0, *shape)
    assert tuple(level.tall for level in slide.levels) == factors
    most = 10 if name == "jpeg" else 0
    for factor in factors:
        whole = Grid(0.5 * factor, 0, 0, shape[0] // factor, shape[1] // factor)
        pixels = slide.read(whole)
        assert np.abs(pixels.astype(int) - picture(whole)).max() <= most
        window = Grid(whole.mpp, 3, 5, 45, 50)
        np.testing.assert_array_equal(slide.read(window), pixels[window.within(whole)])


def test_both_libraries_show_the_same(series: dict[str, list[Path]]) -> None:
    """Bit for bit, so it changes no embedding whether the extra is installed."""
    for name in ("plain", "jpeg"):
        one, two = OpenSlideReader(series[name][0]), DicomReader(series[name][0])
        assert one.levels == two.levels
        assert one.sizes[0][1:] == two.sizes[0][1:]
        for level in one.levels:
            window = (level, 7, 9, level.height - 20, level.width - 20)
            np.testing.assert_array_equal(one.read(*window), two.read(*window))
        two.close()


def test_it_is_white_where_it_does_not_reach_and_resampled_between_levels(series: dict[str, list[Path]]) -> None:
    for name in ("ragged", "thirds"):
        slide = open_slide(series[name][0])
        pixels = slide.read(slide.grid.at(0.7).pad(20))
        for edge in (pixels[:19], pixels[-19:], pixels[:, :19], pixels[:, -19:]):
            assert (edge == 255).all()
        inner = Grid(1.3, 20, 20, 140, 240)
        assert np.abs(slide.read(inner).astype(int) - picture(inner)).max() <= 2


def test_any_file_of_a_series_and_its_folder_are_the_slide(series: dict[str, list[Path]]) -> None:
    for name in ("plain", "thirds"):
        base = series[name][0]
        for path in (*series[name], base.parent):
            assert open_slide(path).path == base


def test_headers_are_pydicoms(series: dict[str, list[Path]]) -> None:
    import pydicom

    for path in (path for paths in series.values() for path in paths):
        theirs = pydicom.dcmread(path, stop_before_pixels=True)
        size = (theirs.TotalPixelMatrixRows, theirs.TotalPixelMatrixColumns)
        expected = Header(theirs.SOPClassUID, theirs.SeriesInstanceUID, theirs.ImageType[2], *size)
        assert read_header(path) == expected


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_no_damaged_header_does_harm(series: dict[str, list[Path]], data: st.DataObject) -> None:
    bytes_ = bytearray(series[data.draw(st.sampled_from(["plain", "implicit"]))][3].read_bytes()[:3000])
    for _ in range(data.draw(st.integers(1, 8))):
        bytes_[data.draw(st.integers(132, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(bytes_[: data.draw(st.integers(133, len(bytes_)))])
        file.flush()
        assert isinstance(read_header(Path(file.name)), Header)


def test_a_header_that_is_cut_or_has_no_item_is_one_of_nothing(series: dict[str, list[Path]], tmp_path: Path) -> None:
    data = series["plain"][3].read_bytes()
    item, long = data.index(b"\xfe\xff\x00\xe0"), data.index(b"SQ\0\0")
    for number, broken in enumerate((data[:item] + b"\1\2\3\4" + data[item + 4 :], data[: long + 4])):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(broken)
        assert read_header(path) == Header("", "", "", 0, 0)


def test_what_is_no_slide_says_so(tmp_path: Path) -> None:
    levels = levels_of((256, 256), (1, 2))
    (image, *_) = write_dicom(tmp_path / "ct", levels, sop=CT)
    with pytest.raises(SlideError, match=f"a DICOM file of class {CT}; expected a whole-slide image"):
        open_slide(image)
    *images, label, _ = write_dicom(tmp_path / "label", levels)
    for path in images:
        path.unlink()
    with pytest.raises(SlideError, match="a DICOM LABEL without its slide"):
        open_slide(label)
    write_dicom(tmp_path / "two", levels)
    write_dicom(tmp_path / "two", levels, suffix="")
    with pytest.raises(SlideError, match=r"a folder of 2 DICOM slides; name a file of one, e\.g\. "):
        open_slide(tmp_path / "two")
    (tmp_path / "none").mkdir()
    with pytest.raises(SlideError, match=r"no OME-Zarr .* and no DICOM"):
        open_slide(tmp_path / "none")
    noise = tmp_path / "noise.dcm"
    noise.write_bytes(bytes(128) + b"DICM" + bytes(range(256)) * 8)
    with pytest.raises(SlideError, match="not a slide that can be read"):
        open_slide(noise)


@pytest.mark.parametrize("library", ["openslide", "wsidicom"])
def test_a_damaged_file_of_a_series_is_never_black(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level that is cut, in its pixels or in its header: the slide is refused, or the places that are missing are."""
    if library == "openslide":
        monkeypatch.setitem(sys.modules, "wsidicom", None)
    paths = write_dicom(tmp_path / "cut", levels_of((512, 512), (1, 2)))
    assert open_slide(paths[0]).reader == {"openslide": "openslide", "wsidicom": "dicom"}[library]
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideError):
        slide = open_slide(paths[0])
        slide.read(slide.grid)
    paths[0].write_bytes(whole)
    paths[1].write_bytes(paths[1].read_bytes()[:1500])
    with pytest.raises(SlideError):
        slide = open_slide(paths[0])
        slide.read(slide.grid.at(1.0))


def test_without_the_extra_the_line_names_the_command(
    series: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = open_slide(series["plain"][0]).levels
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    with pytest.raises(SlideError, match=r'not installed, pip install "wsi-brush\[dicom\]"') as error:
        open_slide(series["implicit"][0])
    assert "\n" not in str(error.value)
    assert open_slide(series["plain"][0]).reader == "openslide"
    assert open_slide(series["plain"][0]).levels == levels
    # The levels that OpenSlide shows exactly are enough to be right, though not to be quick.
    slide = open_slide(series["ragged"][0])
    assert (slide.reader, [level.tall for level in slide.levels]) == ("openslide", [1.0])


def test_a_copy_and_threads_read_the_same(series: dict[str, list[Path]]) -> None:
    for name in ("jpeg", "thirds"):
        slide = open_slide(series[name][0])
        again = copy.deepcopy(slide)
        with ThreadPoolExecutor(2) as pool:
            for pixels in pool.map(again.read, [slide.grid.at(1.0)] * 2):
                np.testing.assert_array_equal(pixels, slide.read(slide.grid.at(1.0)))


def test_nothing_of_the_patient_reaches_a_store(
    tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_slide(tissue_slide)
    levels = [source.read(source.grid.at(mpp)) for mpp in (1.0, 2.0)]
    write_dicom(tmp_path / "case", levels, mpp=1.0)
    reports = embed_slides([tmp_path / "case"], tmp_path / "wsidicom", encoder=ColourEncoder())
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    reports += embed_slides([tmp_path / "case"], tmp_path / "openslide", encoder=ColourEncoder())
    assert [(one.store.name, one.status) for one in reports] == [("case.zarr", "done")] * 2
    assert [one.mpp_source for one in reports] == ["dicom pixel spacing", "openslide.mpp-x"]
    told = [str(report) for report in reports]
    for file in (file for report in reports for file in report.store.rglob("*") if file.is_file()):
        told.append(file.read_bytes().decode("latin-1"))
        if file.suffix == ".json":
            told.append(json.dumps(json.loads(file.read_text("utf-8"))))
    for value in (*PATIENT.values(), "Mustermann", "19700101", "Doe^Jane"):
        assert not [text for text in told if value in text]
    one, two = (EmbeddingStore.open(report.store).map_at(2.0).values for report in reports)
    np.testing.assert_array_equal(one, two)


@settings(max_examples=20, deadline=None)
@given(mpp=st.floats(0.1, 2.0).map(lambda mpp: float(f"{mpp:.4g}")))
def test_both_libraries_say_the_same_pixel_size(mpp: float) -> None:
    """To the last bit: it stands among the parameters that a store must not change."""
    with tempfile.TemporaryDirectory() as folder:
        (path, *_) = write_dicom(Path(folder), [np.full((64, 64, 3), 200, np.uint8)], mpp=mpp)
        one, two = OpenSlideReader(path), DicomReader(path)
        assert one.sizes[0].height == two.sizes[0].height == pytest.approx(mpp, rel=1e-9)
        assert one.sizes[0].width == two.sizes[0].width
