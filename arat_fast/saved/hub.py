"""Exported folders on the Hugging Face Hub, by huggingface_hub, an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arat_fast.extras import needed

SCHEME = "hf:"
"""Before the name of a repository on the hub, where a path could stand."""

_FETCHED = ["config.json", "*.safetensors"]
"""What is fetched: files of which nothing is unpickled."""


def push(folder: Path, name: str) -> str:
    """Upload a folder that ``arat-fast export --format hub`` wrote; the account is the one that
    ``hf auth login`` knows.

    Args:
        folder: its files are uploaded, in one commit.
        name: of the repository, USER/NAME; made where it is absent.

    Returns:
        its address.

    Raises:
        ValueError: huggingface_hub is not installed, or has no such name.
        OSError: the hub cannot be reached, or refuses.
    """
    hub = needed("hub", "huggingface_hub")
    with _told(f"{folder} was written, but could not be uploaded to {name}"):
        address = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload by arat-fast export"
        )
    return str(address)


def fetched(name: str) -> Path:
    """The folder of a repository in the local cache, downloaded where it is not there.

    Args:
        name: USER/NAME, or USER/NAME@REVISION.

    Raises:
        ValueError: huggingface_hub is not installed, or has no such name.
        OSError: the hub cannot be reached, or has no such repository.
    """
    repository, _, revision = name.partition("@")
    options = {"revision": revision or None, "allow_patterns": _FETCHED}
    with _told(f"could not fetch {SCHEME}{name}"):
        return Path(needed("hub", "huggingface_hub").snapshot_download(repository, **options))


@contextmanager
def _told(problem: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    # What reaches the hub has errors of a library of its own.
    except Exception as error:
        raise OSError(f"{problem}: {' '.join(str(error).split())}") from error
