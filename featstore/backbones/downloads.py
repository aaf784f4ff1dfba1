"""Published weights: from the libraries' own caches, else downloaded, else an error that helps, soon."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch

from featstore.errors import BackboneError

PROBE_SECONDS = 5.0


def fetch_url(url: str, name: str) -> Path:
    """A published weights file from torch's cache, or downloaded into it.

    The name ends in the first digits of its sha256, which are checked either way.

    Raises:
        BackboneError: It is not cached and cannot be fetched, or is not what it should be.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    prefix = path.stem.rpartition("-")[2]
    if not path.is_file():
        advice = (
            f"on a machine with a network fetch {url} and copy it to {path}, or give a file: --weights PATH"
        )
        if not reachable(url):
            raise unreachable(name, url, str(path), advice)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise BackboneError(
                f"the weights of {name} could not be downloaded: {error}",
                expected=path.name,
                where=str(path),
                fix=advice,
            ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise BackboneError(
            f"the cached weights of {name} are not what their name says (sha256 {digest[:16]}…)",
            expected=f"a sha256 that begins with {prefix}",
            where=str(path),
            fix=f"delete the file; the next run downloads it again from {url}",
        )
    return path


def reachable(url: str) -> bool:
    """Whether a server answers within seconds, by way of the proxy if one is set.

    The libraries' own downloads retry for up to 25 s a file, or wait for ever.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def unreachable(name: str, url: str, path: str, advice: str) -> BackboneError:
    """The error for weights that are neither cached nor to be had from here."""
    return BackboneError(
        f"the weights of {name} are not on this machine, and {urlsplit(url).hostname} cannot be reached",
        expected=path.rpartition("/")[2],
        where=path,
        fix=advice,
    )


def fetch_hub_file(repo: str, revision: str | None, names: list[str], name: str) -> Path:
    """The first of some files that a Hugging Face repository has, from its cache or downloaded.

    A cached file is taken as it is: asking the hub whether it has changed would let the
    same config give other features, and waits for 25 s where there is no network.

    Args:
        repo: ``owner/name``.
        revision: Branch, tag or commit; None for the main branch.
        names: Alternative file names, best first.
        name: Of the backbone, for errors.

    Raises:
        BackboneError: Not cached, and the hub cannot be reached, refuses, or has none of them.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for file in names:
        cached = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    page = f"{constants.ENDPOINT}/{repo}"
    url = f"{page}/resolve/{revision or 'main'}/{names[0]}"
    advice = (
        f"on a machine with a network run: hf download {repo} {names[0]}; then copy its folder of "
        f"the cache ({constants.HF_HUB_CACHE}) to this machine"
    )
    if names[0] != "config.json":
        advice += f", or fetch {url} and give it as --weights PATH"
    folder = f"{constants.HF_HUB_CACHE}/models--{repo.replace('/', '--')}"
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise unreachable(name, url, f"{folder}/snapshots/*/{names[0]}", advice)
    cause: Exception | None = None
    for file in names:
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except EntryNotFoundError as error:
            cause = error
            if isinstance(error, LocalEntryNotFoundError):
                break
        except (OSError, ValueError, HfHubHTTPError) as error:
            cause = error
            break
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    raise BackboneError(
        f"the weights of {name} could not be downloaded: {reason}",
        expected=" or ".join(names),
        where=page,
        fix="a gated model needs its terms accepted on that page and `hf auth login`; " + advice,
    ) from cause
