"""Where weights are on this machine, and the one place where they are fetched.

Encoders from the Hugging Face hub are read from its cache (`HF_HOME`), pinned to a commit where one is known. Nothing
here opens a socket unless `download` is true. Weights that their authors publish as pickles are fetched and not read:
`pipelines/paper_data/weights.py` makes safetensors of their tensors, which belong into `converted(NAME)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from .commit import sha256_of
from .errors import MachineError, RefusedError, UsageError, WsiBrushError
from .zoo import Entry, find

_SAFE = ("model.safetensors", "pytorch_model.safetensors")


@dataclass(frozen=True)
class Place:
    """Where on the hub something is: the first of `files` that is there, and config.json where `config`."""

    name: str
    repository: str
    files: tuple[str, ...] = _SAFE
    revision: str | None = None
    config: bool = False
    pickled: bool = False

    @property
    def folder(self) -> Path:
        """Where the hub's cache has what was fetched of the repository."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"

    def find(self, *, download: bool = False) -> Path:
        """The file in the cache; config.json is beside it, where it is asked for.

        download: fetch what is not in the cache.

        Raises:
            UsageError: if the hub has no such repository.
            MachineError: if it is not in the cache and may not, or cannot, be fetched.
            RefusedError: if the repository has none of the files.
        """
        path = self._first(self.files, download=download)
        if self.config:
            self._first(("config.json",), download=download)
        return path

    def _first(self, files: tuple[str, ...], *, download: bool) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        # OSError, and whatever the HTTP library raises that this version of the hub is built on.
        unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
        for file in files:
            try:
                return Path(
                    hf_hub_download(self.repository, file, revision=self.revision, local_files_only=not download)
                )
            except HFValidationError:
                raise UsageError(
                    f"{self.name}: {self.repository!r} is no name on the hub; expected hf-hub:ORG/NAME[@REVISION]"
                ) from None
            except LocalEntryNotFoundError as error:  # not in the cache; or the network failed
                if download:
                    raise self._explain(error) from None
            except EntryNotFoundError:
                continue
            except unreachable as error:
                raise self._explain(error) from None
        if download:
            wanted = " or ".join(files)
            safe = "" if self.pickled else "; pickled weights are not loaded"
            raise RefusedError(f"{self.name}: {self.repository} has no {wanted}{safe}")
        raise MachineError(
            f"{self.name}: its weights are not in the local cache; fetch them once with: wsi-brush models fetch "
            f"{self.name}, or copy a cache here and set HF_HOME, or use the bundled encoder"
        )

    def _explain(self, error: BaseException) -> WsiBrushError:
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        page = f"https://huggingface.co/{self.repository}"
        if isinstance(error, GatedRepoError):
            return MachineError(f"{self.name}: access is gated; ask for it on {page}, then log in with `hf auth login`")
        if isinstance(error, RepositoryNotFoundError):
            return UsageError(f"{self.name}: no such model on the hub, or it is private and you are not logged in")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        return MachineError(
            f"{self.name}: its weights are not in the local cache and cannot be fetched ({reason}); "
            "connect once, copy the cache here and set HF_HOME, or use the bundled encoder"
        )


def place_of(name: str) -> Place:
    """Where the weights of an encoder of the table, of `timm:NAME` or of `hf-hub:ORG/NAME[@REVISION]` are.

    Raises:
        UsageError: if there is no such encoder.
        RefusedError: if its weights are not on the hub.
    """
    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        return Place(name, repository, revision=revision or None, config=True)
    if name.startswith("timm:"):
        return _place_of_timm(name, name.removeprefix("timm:"))
    entry = find(name)
    if entry is None:
        raise UsageError(f"{name!r} is no encoder on the hub; expected timm:NAME, hf-hub:ORG/NAME, or see: models list")
    return _place_of_entry(entry)


def weights_of(entry: Entry) -> Path:
    """The safetensors of an encoder of the table: those that were converted here, else those in the hub's cache.

    Raises:
        MachineError, RefusedError: if they are not here; the line says what to do.
    """
    if converted(entry).is_file():
        return converted(entry)
    path = _place_of_entry(entry).find()
    if entry.pickled:
        raise MachineError(f"{entry.id}: {_convert(entry, path)}")
    return path


def fetch(name: str) -> tuple[Path, str | None]:
    """Have the weights of an encoder in the cache: the file, and what is left to do with it (None: nothing).

    Raises:
        UsageError, MachineError, RefusedError: one line each.
    """
    entry = find(name)
    if entry is not None and converted(entry).is_file():
        return converted(entry), None
    path = place_of(name).find(download=True)
    if entry is not None:
        check(entry, path)
    return path, _convert(entry, path) if entry is not None and entry.pickled else None


def check(entry: Entry, path: Path) -> None:
    """Hold a published file against the digest in the table, where there is one.

    Raises:
        RefusedError: if it differs.
    """
    if entry.sha256 is not None and path != converted(entry) and (found := sha256_of(path)) != entry.sha256:
        raise RefusedError(
            f"{path}: damaged or exchanged (sha256 {found[:12]}, expected {entry.sha256[:12]}); remove it and run: "
            f"wsi-brush models fetch {entry.id}"
        )


def converted(entry: Entry) -> Path:
    """Where the weights of an encoder are looked for that were published as a pickle, and made safetensors."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "wsi-brush" / f"{entry.id}.safetensors"


def state_of(entry: Entry) -> str:
    """bundled, ready, to convert, absent, or no package."""
    if entry.file is None:
        return "bundled"
    if entry.package is not None and find_spec(entry.package) is None:
        return "no package"
    if converted(entry).is_file():
        return "ready"
    try:
        place = _place_of_entry(entry)
        if not place.folder.is_dir():  # the hub's library takes a second to say so
            return "absent"
        place.find()
    except (MachineError, RefusedError):
        return "absent"
    return "to convert" if entry.pickled else "ready"


def _convert(entry: Entry, path: Path) -> str:
    return (
        f"{path.name} is a pickle, which is not loaded; make safetensors of it once, from a checkout: "
        f"python pipelines/paper_data/weights.py {entry.id} {quote(str(path))} -o {quote(str(converted(entry)))}"
    )


def _place_of_entry(entry: Entry) -> Place:
    if entry.file is None:
        raise RefusedError(f"{entry.id}: comes with wsi-brush, there is nothing to fetch")
    if entry.repository is None:
        raise RefusedError(
            f"{entry.id}: is not on the hub; get {entry.file} from {entry.home}, then, from a checkout: "
            f"python pipelines/paper_data/weights.py {entry.id} {entry.file} -o {converted(entry)}"
        )
    config = entry.architecture is None and entry.package is None
    return Place(entry.id, entry.repository, (entry.file,), entry.revision, config, entry.pickled)


def _place_of_timm(name: str, model: str) -> Place:
    import timm

    try:
        known = timm.models.get_pretrained_cfg(model, allow_unregistered=False) if timm.is_model(model) else None
    except RuntimeError:  # a model that timm knows with a tag that it does not
        known = None
    if known is None:
        raise UsageError(f"{name}: timm {timm.__version__} has no such model; see timm.list_models(pretrained=True)")
    if not known.hf_hub_id:
        raise RefusedError(f"{name}: no weights in safetensors are published for it; choose another tag")
    repository, _, revision = known.hf_hub_id.partition("@")
    files = (f"{Path(known.hf_hub_filename).stem}.safetensors",) if known.hf_hub_filename else _SAFE
    return Place(name, repository, files, revision or None)
