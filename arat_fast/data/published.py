"""Published dataset files: checksums, download and extraction."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import IO

HINT = "pass --data.download to fetch it"


def check_file(path: Path, md5: str) -> None:
    """Raise unless a file is the published one.

    Args:
        path: the file.
        md5: its published checksum, 32 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its checksum is another one.
    """
    from torchvision.datasets.utils import calculate_md5

    if not path.is_file():
        raise FileNotFoundError(
            f"no dataset file at {path}; {HINT}, or --data.root with the folder that holds it"
        )
    found = calculate_md5(path)
    if found != md5:
        raise ValueError(
            f"{path} has md5 {found}, expected {md5}: it is damaged or not the published file, and "
            f"was not read; {HINT} again"
        )


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file with torchvision's downloader, unless it is there with the right checksum.

    Args:
        url: address of the file.
        path: where it goes; the folder is created.
        md5: its published checksum, verified after the download.

    Raises:
        FileNotFoundError: it could not be fetched; nothing but a damaged ``path`` is left.
    """
    from torchvision.datasets import utils

    try:
        utils.download_url(url, path.parent, path.name, md5)
    # RuntimeError is torchvision's for a wrong checksum; URLError is an OSError.
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"could not download {url} to {path}: {reason}; without a network, put the file "
            f"(md5 {md5}) there by other means and run the same command again"
        ) from error


def unpack(archive: Path, folder: Path) -> None:
    """Extract an archive of one folder, which appears under its name only when it is whole.

    Args:
        archive: a checksummed .zip, or a tar file of any compression; its files are all in
            ``folder.name``.
        folder: where that folder goes; files in it that the archive holds as well are replaced.

    Raises:
        ValueError: a member lies outside the folder or is neither a file nor a folder, or the
            archive cannot be read; nothing is written then.
    """
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                for info in file.infolist():
                    source = None if info.is_dir() else file.open(info)
                    _extract(info.filename, source, work, folder.name)
        else:
            with tarfile.open(archive) as tar:
                for member in tar:
                    if not (member.isfile() or member.isdir()):
                        raise _outside(member.name, folder.name)
                    _extract(member.name, tar.extractfile(member), work, folder.name)
        _move_files(work / folder.name, folder)
    except (tarfile.TarError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        kind = "zip" if archive.suffix == ".zip" else "tar"
        raise ValueError(
            f"{archive}: expected a {kind} archive, but reading it fails: {error}"
        ) from error
    finally:
        shutil.rmtree(work)


def _extract(member: str, source: IO[bytes] | None, work: Path, name: str) -> None:
    """Write a member that lies in ``work / name``; a folder has no ``source``."""
    inside = (work / name).resolve()
    target = (work / member).resolve()
    if target != inside and inside not in target.parents:
        raise _outside(member, name)
    if source is None:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _outside(member: str, name: str) -> ValueError:
    return ValueError(
        f"the archive of {name} holds {member!r}, expected files in {name}/ only; nothing was "
        "extracted"
    )


def _move_files(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"expected a folder {folder.name} in the archive, got none")
    if not folder.exists():
        os.replace(source, folder)
        return
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
