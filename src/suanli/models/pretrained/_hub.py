"""Files of one repository of a hub, through huggingface_hub, which keeps them in its own cache: HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and the token of `hf auth login` count as everywhere else.

Only weights in safetensors and the files that describe them are fetched. A commit that the cache has needs no network.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suanli.core.console import say
from suanli.core.errors import (
    DamagedFile,
    DataError,
    DownloadError,
    MachineError,
    SuanliError,
    UsageError,
    first_line,
    nearest,
    pip_install,
)
from suanli.core.storage import STORAGE_ERRORS, storage_error
from suanli.models.conversion import file_checksum
from suanli.models.pretrained._published import FACTS, INDEX, choose_weights, shards_of

PREFIX = "hf:"
LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Files of one commit."""

    folder: Path
    commit: str
    weights: str  # the name of the safetensors file, or of the index of several
    homepage: str


def fetch(repo: str, *, revision: str | None, file: str | None) -> Snapshot:
    """The weights of `repo` ("ORG/NAME"), or the one `file` of it, with what describes them. Without a network, those
    of the cache. Raises UsageError for what doesn't exist, MachineError for what this user may not have, DownloadError
    where it can't be downloaded, DamagedFile for other bytes than the hub states."""
    hub = _import_hub()
    here = _cached(hub, repo, revision, file)
    if here is not None and (_is_commit(revision) or hub.constants.is_offline_mode()):
        return here
    try:
        return _download(hub, repo, revision, file)
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        if here is not None and _is_no_network(hub, error):
            say(f"no network: {repo} is taken from the cache, at {here.commit[:12]}")
            return here
        raise _explain(hub, error, repo, revision) from error


def present() -> list[str]:
    """The repositories with weights in the cache, as `--weights` takes them."""
    if find_spec("huggingface_hub") is None:
        return []
    root = Path(_import_hub().constants.HF_HUB_CACHE)
    folders = sorted(root.glob("models--*--*")) if root.is_dir() else []
    with_weights = [one for one in folders if next(one.glob("snapshots/*/*.safetensors"), None) is not None]
    return [PREFIX + one.name.removeprefix("models--").replace("--", "/", 1) for one in with_weights]


def _import_hub() -> Any:
    if find_spec("huggingface_hub") is None:
        raise MachineError(
            "Weights of a hub need the package huggingface_hub.", fix=f"Install it: {pip_install('huggingface_hub')}"
        )
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is imported
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _download(hub: Any, repo: str, revision: str | None, file: str | None) -> Snapshot:
    about = hub.HfApi().model_info(repo, revision=revision, timeout=hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
    names = sorted(one.rfilename for one in about.siblings or [])
    weights = choose_weights(names, f"{PREFIX}{repo}", wanted=file)[0]
    path = Path(hub.hf_hub_download(repo, weights, revision=revision))  # by the name of a branch, which the cache notes
    folder = path.parents[weights.count("/")]
    for name in FACTS:
        if name in names:
            hub.hf_hub_download(repo, name, revision=folder.name)
    shards = [one.name for one in shards_of(path)] if weights.endswith(INDEX) else []
    for one in [Path(hub.hf_hub_download(repo, name, revision=folder.name)) for name in shards] or [path]:
        _check(one)
    return Snapshot(folder=folder, commit=folder.name, weights=weights, homepage=f"{hub.constants.ENDPOINT}/{repo}")


def _check(path: Path) -> None:
    """Raises DamagedFile where a file isn't the one that the hub has. Its cache names large files by their SHA-256."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and file_checksum(blob) != f"sha256:{blob.name}":
        raise DamagedFile(
            f"{path.name} has the checksum {file_checksum(blob)}, and the hub states sha256:{blob.name}.",
            fix=f"Remove {blob}, and it is downloaded again.",
        )


def _cached(hub: Any, repo: str, revision: str | None, file: str | None) -> Snapshot | None:
    """What the cache has of this revision; None: nothing, or not all."""
    root = Path(hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    commit = revision if _is_commit(revision) else None
    if commit is None and revision != "..":
        with suppress(OSError):
            commit = (root / "refs" / (revision or "main")).read_text().strip()
    folder = root / "snapshots" / (commit or "")
    if not commit or not folder.is_dir():
        return None
    names = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
    try:
        weights = choose_weights(names, f"{PREFIX}{repo}", wanted=file)[0]
        files = shards_of(folder / weights) if weights.endswith(INDEX) else [folder / weights]
    except SuanliError:
        return None
    if not all(one.is_file() for one in files):
        return None
    for one in files:
        _check(one)
    return Snapshot(folder=folder, commit=commit, weights=weights, homepage=f"{hub.constants.ENDPOINT}/{repo}")


# --- errors ----------------------------------------------------------------------------------


def _is_no_network(hub: Any, error: Exception) -> bool:
    """Whether nothing was reached, rather than refused."""
    if isinstance(error, hub.errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, (hub.errors.HTTPError, ConnectionError, TimeoutError))


def _explain(hub: Any, error: Exception, repo: str, revision: str | None) -> SuanliError:
    errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return MachineError(
            f"{repo} is gated: its publisher gives it to those who have accepted its terms.",
            fix=f"Accept them at {page}, then log in (hf auth login) or set HF_TOKEN.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        near = nearest(f"{PREFIX}{repo}", present(), count=3)
        mean = f"Did you mean {' or '.join(near)}, which the cache has? " if near else ""
        return UsageError(
            f"There is no repository {repo!r}, it was removed, or it is private.",
            fix=f"{mean}Check the name at {page}; a private one needs HF_TOKEN.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo} has no revision {revision!r}.", fix=f"{page} lists them.")
    if isinstance(error, errors.HFValidationError):
        return UsageError(
            f"{repo!r} is no name of a repository.", fix=f"Write {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION."
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return DataError(f"A file of {repo} is gone.", fix="Try again: the repository has changed.")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
        reason = f"the hub answered {error.response.status_code}"
        return DownloadError(f"{repo} can't be downloaded: {reason}.", fix=f"Look at {page}: it may be disabled.")
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return storage_error(error, Path(str(error.filename or hub.constants.HF_HUB_CACHE)))
    if "onsistency check" in str(error):
        return DownloadError(f"The download of {repo} was cut short.", fix="Run the same command again.")
    have = present()
    listed = ", ".join(have[:LISTED]) + (f" and {len(have) - LISTED} more" if len(have) > LISTED else "")
    offline = "HF_HUB_OFFLINE is set" if hub.constants.is_offline_mode() else first_line(error, 120)
    return DownloadError(
        f"{repo} isn't in the cache, and can't be downloaded: {offline}.",
        fix=f"The cache has {listed or 'no weights'}. `--weights imagenet` needs no network.",
    )
