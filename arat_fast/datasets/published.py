"""Published dataset files: checksums, download and extraction."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

from arat_fast.datasets.members import entries
from arat_fast.files import make_folder, scratch_folder, settle

HINT = "pass --data.download to fetch it"

_DAMAGE = (shutil.ReadError, tarfile.TarError, EOFError, zipfile.BadZipFile, zlib.error)


def require_folder(path: Path, name: str) -> None:
    """Raise FileNotFoundError unless the folder of the dataset ``name`` is there."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"dataset {name} not found, looked at {path}; {HINT} into {path.parent}, or "
            "--data.root with the folder that holds it"
        )


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


def fetch_folder(url: str, archive: Path, md5: str, folder: Path) -> None:
    """Download an archive of one folder, as :func:`fetch`, and :func:`unpack` it."""
    fetch(url, archive, md5)
    unpack(archive, folder)


def unpack(archive: Path, folder: Path) -> None:
    """Extract an archive of one folder, which appears under its name only when it is whole.

    Args:
        archive: a .zip or a tar file of any compression.
        folder: the folder in it, and where that goes; files in it that the archive holds as well
            are replaced.

    Raises:
        ValueError: a member lies outside the folder, the archive cannot be read, or there is no
            such folder in it; nothing is written then.
    """
    with scratch_folder(folder) as work:
        is_zip = archive.suffix == ".zip"
        try:
            if is_zip:
                # What lies outside would be left out without a word.
                with zipfile.ZipFile(archive) as file:
                    names = file.namelist()
                outside = [name for name in names if name[:1] == "/" or ".." in name.split("/")]
                if outside:
                    raise ValueError(f"{archive}: expected no member outside, got {outside[0]}")
            shutil.unpack_archive(archive, work, filter=None if is_zip else "data")
        except _DAMAGE as error:
            raise ValueError(
                f"{archive}: expected an archive of {folder.name}, but reading it fails: {error}"
            ) from error
        source = work / folder.name
        others = [entry.name for entry in entries(work) if entry != source]
        if not source.is_dir() or others:
            found = f"{len(others)} others, {', '.join(others[:3])}" if others else "none"
            raise ValueError(f"{archive}: expected the folder {folder.name} alone, got {found}")
        if not folder.exists():
            settle(source, folder)
            return
        for path in (path for path in source.rglob("*") if path.is_file()):
            target = folder / path.relative_to(source)
            make_folder(target.parent)
            settle(path, target)
