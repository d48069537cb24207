"""A real slide to try everything on: fetched when asked, known by its digest.

CMU-1-Small-Region of OpenSlide's test data (Carnegie Mellon University, CC0): H&E at 0.499 µm, 1.5 x 1.1 mm, as an
Aperio scanner wrote it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .commit import sha256_of
from .errors import MachineError, RefusedError

SOURCE = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/"
NAME = "CMU-1-Small-Region.svs"
BYTES = 1_938_955
SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
LICENCE = "CC0-1.0, public domain: OpenSlide's test data, Carnegie Mellon University"

_SECONDS = 30  # that a server may be silent


def sample_path(out: Path | None = None) -> Path:
    """Where the sample lies: the file `out`, in it where it is a folder, or by default the user's cache."""
    if out is None:
        import pooch

        return Path(pooch.os_cache("wsi-brush")) / NAME
    return out / NAME if out.is_dir() else out


def fetch_sample(out: Path | None = None, *, source: str | None = None) -> tuple[Path, bool]:
    """Have the sample at `sample_path(out)`: the file, and whether it was fetched now. A whole one is left as it is.

    source: where it is fetched from in place of `SOURCE`, a mirror's address; the digest is the same.

    Raises:
        RefusedError: if another file is there, or comes.
        MachineError: if it cannot be fetched or written; nothing is left of it.
    """
    path, address = sample_path(out), f"{(source or SOURCE).rstrip('/')}/{NAME}"
    if path.exists():
        _check(path)
        return path, False
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        _download(address, path)
    except (RefusedError, MachineError):
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    return path, True


def _check(path: Path) -> None:
    found = sha256_of(path) if path.is_file() else "of no file"
    if found != SHA256:
        raise RefusedError(
            f"{path}: another file is there (sha256 {found[:12]}, expected {SHA256[:12]}); remove it or choose another "
            "name with -o"
        )


def _download(address: str, path: Path) -> None:
    """pooch writes under another name beside the target, and moves what has the digest."""
    import pooch
    from requests.exceptions import RequestException

    pooch.get_logger().setLevel("ERROR")  # what it has to say is said here
    downloader = pooch.HTTPDownloader(timeout=_SECONDS)
    try:
        pooch.retrieve(address, f"sha256:{SHA256}", fname=path.name, path=path.parent, downloader=downloader)
        path.chmod(0o644)  # pooch leaves it to its owner alone
    except ValueError:
        raise RefusedError(
            f"{address}: gives another file than the sample (expected sha256 {SHA256[:12]}); nothing was kept"
        ) from None
    except RequestException as error:
        response = getattr(error, "response", None)
        reason = type(error).__name__ if response is None else f"HTTP {response.status_code}"
        raise MachineError(
            f"{address}: cannot be fetched ({reason}); connect, or carry the file here: any slide will do in its place"
        ) from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror or error})") from None
