"""What a user names, as slides: each once, each with a name of its own."""

from __future__ import annotations

import os
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_lossless
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dicom import CT, write_dicom
from test_embed import ColourEncoder, paint

from wsi_brush.cohort import embed_slides
from wsi_brush.embed import embed_slide
from wsi_brush.errors import UsageError
from wsi_brush.inputs import Input, find_inputs, slide_name


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return paint(tmp_path / "slides" / "a.png")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Names alone: what is a slide is found without opening any but DICOM."""
    folder = tmp_path / "cohort"
    for name in ("b.svs", "a.TIF", "deep/er/c.ndpi", "deep/notes.txt", "deep/.d.svs", "e f/é\nü.svs", "x.dat"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no slide")
    return folder


def found(*words: Path | str, under: Path) -> list[str]:
    """What the words mean, by their paths below a folder."""
    return [one.path.relative_to(under).as_posix() for one in find_inputs(words)]


def table(path: Path, text: str, *, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


class TestFolders:
    def test_they_are_searched_for_slides_and_stores_are_none(self, picture: Path, tmp_path: Path) -> None:
        folder = picture.parent
        for name in ("deep/er/B.SVS", "notes.txt", ".hidden/c.svs", "x.ome.zarr/zarr.json", "x.ome.zarr/0/d.tif"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        (folder / "bare").mkdir()
        (folder / "bare" / ".zattrs").touch()
        (folder / "loop").symlink_to(folder)
        embed_slide(picture, folder, encoder=ColourEncoder(), assume_mpp=0.5)
        assert found(folder, under=folder) == ["a.png", "bare", "deep/er/B.SVS", "x.ome.zarr"]
        assert [one.path for one in find_inputs([picture, folder / "deep" / ".." / "a.png"])] == [picture]
        assert found(folder / "x.ome.zarr", under=folder) == ["x.ome.zarr"]
        (tmp_path / "nothing").mkdir()
        with pytest.raises(UsageError, match="no slides"):
            find_inputs([tmp_path / "nothing"])

    def test_links_are_followed_and_circles_end(self, cohort: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "z.svs").touch()
        (cohort / "0").symlink_to(other)
        for name in ("back", "again"):  # two ways round: who goes both to the system's 40 links never ends
            (other / name).symlink_to(cohort)
        (other / "up").symlink_to(tmp_path)  # a folder that holds it: what is beside was not asked for
        (tmp_path / "beside.svs").touch()
        (cohort / "self.svs").symlink_to("self.svs")
        (cohort / "same.svs").symlink_to("b.svs")
        (cohort / "1").symlink_to("deep")
        names = ["a.TIF", "b.svs", "deep/er/c.ndpi", "e f/é\nü.svs", "self.svs", "0/z.svs"]
        assert found(cohort, under=cohort) == names
        assert found(cohort / "0", cohort, under=cohort)[0] == "0/z.svs"
        assert len(find_inputs([cohort / "0", cohort])) == len(names)

    def test_what_is_no_slide_inside_is_said(self, cohort: Path, tmp_path: Path) -> None:
        """A text called .svs is the user's mistake or a failed download: it is named, and costs itself."""
        slide = paint(cohort / "good.png")
        reports = embed_slides([cohort], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
        by_name = {report.path.name: report for report in reports}
        assert by_name["good.png"].status == "done"
        assert by_name["b.svs"].status == "failed"
        assert "b.svs: not a slide that can be read" in by_name["b.svs"].message
        assert slide.name in by_name
        assert "x.dat" not in by_name

    def test_a_file_that_is_named_is_known_by_its_content(self, tmp_path: Path) -> None:
        pixels = np.full((300, 300, 3), 200, np.uint8)
        slide = write_lossless(tmp_path / "scan.tif", pixels).rename(tmp_path / "scan.dat")
        (report,) = embed_slides([slide], tmp_path / "out", encoder=ColourEncoder())
        assert (report.exit_code, report.store.name) == (0, "scan.dat.zarr")

    def test_the_parts_of_a_slide_are_its_own(self, tmp_path: Path) -> None:
        for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat", "m/preview.jpg", "h.jpg", "h(1,0).jpg", "map.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "macro image.jpg").touch()
        (tmp_path / "other.jpg").touch()
        index = "[Virtual Microscope Specimen]\r\nNoLayers=1\r\nImageFile=h.jpg\r\nImageFile(1,0)=h(1,0).jpg\r\n"
        (tmp_path / "h.vms").write_text(f"{index}MapFile=map.jpg\r\nMacroImage=macro image.jpg\r\nNote=other.jpg\r\n")
        assert found(tmp_path, under=tmp_path) == ["h.vms", "m.mrxs", "other.jpg"]
        # As a shell expands *: the parts beside their slides.
        assert found(*sorted(tmp_path.iterdir()), under=tmp_path) == ["h.vms", "m.mrxs", "other.jpg"]
        assert found(tmp_path / "m" / "Data0000.dat", tmp_path / "map.jpg", under=tmp_path) == ["m.mrxs", "h.vms"]


class TestDicom:
    def test_a_series_is_one_slide(self, tmp_path: Path) -> None:
        levels = [np.full((300 >> n, 300 >> n, 3), 200, np.uint8) for n in range(2)]
        one = write_dicom(tmp_path / "d" / "case.1", levels)
        two = write_dicom(tmp_path / "d" / "case.2" / "DICOM", levels, suffix="")
        alone = write_dicom(tmp_path / "d" / "label", levels)
        for path in alone[:2]:
            path.unlink()
        write_dicom(tmp_path / "d" / "ct", levels[:1], sop=CT)
        (tmp_path / "d" / "case.1" / "text.dcm").write_text("no DICOM")
        assert [one.path for one in find_inputs([tmp_path])] == [one[0], one[0].with_name("text.dcm"), two[0]]
        for words in (one, one[::-1], [one[2]], [*one, one[0].parent / "7.dcm"]):
            assert [one.path for one in find_inputs(words)] == one[:1]
        # Two in a folder are told apart, and have the names of their files.
        more = write_dicom(tmp_path / "d" / "case.2" / "DICOM", levels, suffix=".21")
        assert {(one.path, one.name) for one in find_inputs([two[0].parent])} == {(two[0], "7"), (more[0], "7.21")}

    def test_a_folder_of_its_own_gives_the_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        levels = [np.full((300, 300, 3), 200, np.uint8)]
        series = write_dicom(tmp_path / "1.2.840", levels)
        assert find_inputs([tmp_path]) == [Input(series[0], "1.2.840")]
        monkeypatch.chdir(series[0].parent)
        assert [one.name for one in find_inputs(["."])] == ["1.2.840"]
        assert [one.name for one in find_inputs([series[1].name])] == ["1.2.840"]
        paint(series[0].parent / "another.png")
        assert [one.name for one in find_inputs(["."])] == ["6", "another"]


class TestPatterns:
    def test_one_in_quotes_finds_what_a_shell_would(self, cohort: Path) -> None:
        assert found(cohort / "**" / "*.svs", under=cohort) == ["b.svs", "e f/é\nü.svs"]
        assert found(cohort / "*.dat", under=cohort) == ["x.dat"]
        assert found(cohort / "d??p" / "er", under=cohort) == ["deep/er/c.ndpi"]
        assert found(cohort / "[ab].*", under=cohort) == ["a.TIF", "b.svs"]

    def test_stars_alone_find_what_a_folder_would(self, cohort: Path) -> None:
        (cohort / "z.zarr" / "0").mkdir(parents=True)
        (cohort / "z.zarr" / "zarr.json").touch()
        (cohort / "z.zarr" / "0" / "c.png").touch()
        expected = found(cohort, under=cohort)
        for last in ("*", "**", "**/*"):
            assert sorted(found(cohort / last, under=cohort)) == sorted(expected)

    def test_a_file_of_that_name_is_no_pattern(self, cohort: Path) -> None:
        (cohort / "b[1].svs").touch()
        (cohort / "b1.svs").touch()
        assert found(cohort / "b[1].svs", under=cohort) == ["b[1].svs"]

    @pytest.mark.parametrize("pattern", ["*.czi", "none/*.svs", "**/deep/*.txt*x", "**.svs"])
    def test_one_that_finds_nothing_says_so(self, cohort: Path, pattern: str) -> None:
        with pytest.raises(UsageError, match="pattern"):
            find_inputs([cohort / pattern])

    def test_inside_a_pyramid_nothing_is_found(self, cohort: Path) -> None:
        (cohort / "z.zarr" / "0").mkdir(parents=True)
        (cohort / "z.zarr" / "0" / "c.png").touch()
        with pytest.raises(UsageError, match="finds no slides"):
            find_inputs([cohort / "**" / "*.png"])


class TestTables:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_rows_are_slides(self, cohort: Path, encoding: str, separator: str) -> None:
        rows = [
            "Path,stain,MPP, id ", 'b.svs,"H,E",0.25,first', f"{cohort}/deep/er/c.ndpi,,,", "", '"e f/é\nü.svs",x,1',
        ]  # fmt: skip
        text = "\r\n".join(rows).replace("H,E", "HE").replace(",", separator)
        assert find_inputs([table(cohort / "list.CSV", text, encoding=encoding)]) == [
            Input(cohort / "b.svs", "first", 0.25),
            Input(cohort / "deep" / "er" / "c.ndpi", "c"),
            Input(cohort / "e f" / "é\nü.svs", "é\nü", 1.0),
        ]

    def test_tridents_and_a_decimal_comma(self, cohort: Path) -> None:
        assert find_inputs([table(cohort / "t.csv", "wsi;mpp\nb.svs;0,25\n")]) == [Input(cohort / "b.svs", "b", 0.25)]
        both = table(cohort / "u.csv", "wsi,path\nx.dat,b.svs\n")
        assert [one.path.name for one in find_inputs([both])] == ["b.svs"]

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("path,id\nb.svs,1\n\nx.dat,1\n", "t.csv, row 4: id 1 stands in .*t.csv, row 2 already"),
            ("path\nb.svs\ngone.svs\n", "t.csv, row 3: no such file, .*gone.svs"),
            ("path,id\nb.svs,ö\nx.dat,Ö\n", "t.csv, row 3: id Ö stands in .*t.csv, row 2 already"),
            ("path,id\n,1\n", "t.csv, row 2: no path"),
            ("path,mpp\nb.svs,0\n", "t.csv, row 2: mpp 0; expected"),
            ("path,mpp\nb.svs,-0.5\n", "row 2: mpp -0.5"),
            ("path,mpp\nb.svs,nan\n", "row 2: mpp nan"),
            ("path,mpp\nb.svs,inf\n", "row 2: mpp inf"),
            ("path,mpp\nb.svs,20x\n", "row 2: mpp 20x"),
            ("path,mpp\nb.svs,500\n", "row 2: mpp 500"),
            ("path,id\nb.svs,a/b\n", "row 2: id 'a/b' cannot name a store"),
            ('path,id\nb.svs,"a\nb"\n', r"row 2: id 'a\\nb' cannot"),
            (f"path,id\nb.svs,{'x' * 141}\n", "cannot name a store; expected at most 140 bytes"),
            (f"path,id\nb.svs,{'Я' * 71}\n", "cannot name a store; expected at most 140 bytes"),
            ("path,id\nb.svs,..\n", r"row 2: id '\.\.' cannot"),
            ("path\ndeep\n\n.\n", r"row 4: .* is a folder of 4 slides"),
            ("path,mpp\nb.svs,1\n./b.svs,2\n", "row 3: the slide of .*row 2 again"),
            ("slide,mpp\nb.svs,1\n", "its first row is 'slide,mpp'; expected a column path"),
            ("", "expected a column path"),
            ("path\n", "a header and no rows"),
            ('path\n"b.svs\n', "no CSV"),
            ("path\nb\0.svs\n", "no CSV"),
        ],
    )
    def test_a_row_that_is_not_right_is_named(self, cohort: Path, text: str, line: str) -> None:
        with pytest.raises(UsageError, match=line):
            find_inputs([table(cohort / "t.csv", text)])

    def test_another_encoding_is_named(self, cohort: Path) -> None:
        with pytest.raises(UsageError, match="no UTF-8"):
            find_inputs([table(cohort / "t.csv", "path\né.svs\n", encoding="latin-1")])

    def test_a_slide_in_a_row_and_in_a_folder_is_the_rows(self, cohort: Path) -> None:
        rows = table(cohort / "t.csv", "path,mpp,id\nb.svs,0.25,mine\nb.svs,0.25,mine\n")
        for words in ([cohort, rows], [rows, cohort]):
            inputs = find_inputs(words)
            assert len(inputs) == 4
            assert Input(cohort / "b.svs", "mine", 0.25) in inputs

    def test_its_pixel_size_stands_in_and_never_overrules(self, picture: Path, tmp_path: Path) -> None:
        slide = write_lossless(tmp_path / "header.tif", np.full((300, 300, 3), 200, np.uint8), mpp=2.0)
        rows = table(tmp_path / "t.csv", f"path,mpp\n{picture},0.25\n{slide},0.25\n")
        reports = embed_slides([rows], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
        assert [(one.mpp, one.mpp_source) for one in reports] == [(0.25, "assumed"), (2.0, "tiff resolution")]
        forced = embed_slides([rows], tmp_path / "forced", encoder=ColourEncoder(), force_mpp=1.0)
        assert {(one.mpp, one.mpp_source) for one in forced} == {(1.0, "forced")}


class TestNames:
    def test_endings_are_left_out(self) -> None:
        names = ("a.svs", "b.ome.tif", "c.1.TIFF", "d.ome.zarr", "e")
        assert [slide_name(Path(name)) for name in names] == ["a", "b", "c.1", "d", "e"]

    def test_a_slide_and_links_to_it_have_the_slides_name(self, cohort: Path) -> None:
        links = [cohort / "a link.svs", cohort / "other.tif"]
        for link in links:
            link.symlink_to("b.svs")
        for words in ([*links, cohort / "b.svs"], [cohort / "b.svs", *links], [cohort]):
            assert "b" in [one.name for one in find_inputs(words)]
        assert [find_inputs(words)[0].name for words in (links, links[::-1])] == ["a link", "a link"]

    def test_an_id_keeps_its_name_and_others_make_way(self, cohort: Path) -> None:
        rows = table(cohort / "t.csv", "path,id\nx.dat,b\n")
        names = {one.path.name: one.name for one in find_inputs([cohort / "b.svs", rows])}
        assert names["x.dat"] == "b"
        assert names["b.svs"].startswith("b-")
        assert len(names["b.svs"]) == 10

    def test_names_that_some_disks_take_for_one_are_told_apart(self, cohort: Path) -> None:
        for name in ("B.svs", "E\u0301\nÜ.svs"):
            (cohort / "deep" / name).touch()
        names = {one.name[:-8] for one in find_inputs([cohort]) if "-" in one.name}
        assert names == {"b-", "B-", "é\nü-", "E\u0301\nÜ-"}

    def test_names_of_140_bytes_are_whole_and_longer_ones_cut(self, cohort: Path) -> None:
        long = [cohort / f"{'x' * 140}.svs", cohort / f"{'y' * 141}.svs"]
        rows = table(cohort / "t.csv", f"path,id\nb.svs,{'Я' * 70}\n")
        whole, cut, given = (one.name for one in find_inputs([*long, rows]))
        assert (whole, given) == ("x" * 140, "Я" * 70)
        assert cut.startswith("y" * 140 + "-")

    @settings(max_examples=40, deadline=None)
    @given(
        files=st.lists(
            st.tuples(
                st.sampled_from(["", "one", "two", "t w o/dé\n"]),
                st.text(string.ascii_letters + " é\n.[*'\"", min_size=1, max_size=3).filter(
                    lambda name: name[0] != "."
                ),
                st.sampled_from([".svs", ".tif", ".ome.tif"]),
            ),
            min_size=1,
            max_size=6,
            unique=True,
        ),
        data=st.data(),
    )
    def test_every_slide_has_one_name_in_any_order(
        self, files: list[tuple[str, str, str]], data: st.DataObject
    ) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place).resolve()
            paths = [folder / deep / f"{name}{suffix}" for deep, name, suffix in files]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            expected = {one.path: one.name for one in find_inputs([folder])}
            assert sorted(expected) == sorted(paths)
            assert len({name.lower() for name in expected.values()}) == len(paths)
            words = data.draw(st.permutations([*paths, *(os.path.relpath(path) for path in paths), folder]))
            again = {one.path.resolve(): one.name for one in find_inputs(words)}
            assert again == expected
            plain = [slide_name(path).lower() for path in paths]
            for path, name in zip(paths, plain, strict=True):
                assert (expected[path].lower() == name) == (plain.count(name) == 1)


def test_a_name_as_long_as_a_file_may_have_is_cut_and_can_be_embedded(picture: Path, tmp_path: Path) -> None:
    for last in "ab":
        picture.with_name("Я" * 124 + f"{last}.png").write_bytes(picture.read_bytes())
    names = [one.name for one in find_inputs([picture.parent])]
    assert len(set(names)) == 3
    assert [name.startswith("Я" * 70 + "-") for name in names] == [False, True, True]
    reports = embed_slides([picture.parent], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in reports] == ["done"] * 3
