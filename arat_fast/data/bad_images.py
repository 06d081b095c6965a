"""Files that are no readable image: looked for once, by one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from arat_fast.data.fingerprint import fingerprint, names_below
from arat_fast.datasets.encoded import EncodedImages, unreadable
from arat_fast.files import read_json

if TYPE_CHECKING:
    from arat_fast.distributed import Ranks

FILE = "bad_images.json"


class BadImages:
    """What is wrong with the files of a dataset that cannot be decoded.

    Args:
        folder: of a run, whose bad_images.json says what was found when it began; None looks anew.
        ranks: the processes that load the dataset together; rank 0 decodes and tells the others, so
            that all leave out the same files.
        progress: told what is done, how many files of it and of how many.

    Attributes:
        found: what bad_images.json holds: by the SHA-256 of the dataset's
            :func:`arat_fast.data.fingerprint.fingerprint`, the reasons by number of the image.
    """

    def __init__(
        self,
        folder: Path | None = None,
        ranks: Ranks | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.ranks = ranks
        self.progress = progress
        self.found: dict[str, dict[str, str]] = {}
        if folder is not None:
            with suppress(OSError, ValueError):
                self.found = read_json(folder / FILE)

    def among(self, source: EncodedImages, root: Path) -> dict[int, str]:
        """What is wrong with the images that cannot be read, by number.

        Args:
            source: the images.
            root: the folder of the dataset, which may be another one than when the run began.
        """
        if self.ranks is None:
            found = self._look(source, root)
        else:
            content = json.dumps(self._look(source, root)).encode() if self.ranks.is_main else None
            # Decoding can take longer than a broadcast waits.
            self.ranks.meet()
            found = json.loads(self.ranks.broadcast_bytes(content))
        return {int(index): reason for index, reason in found.items()}

    def _look(self, source: EncodedImages, root: Path) -> dict[str, str]:
        listing = fingerprint(source.labels, names_below(source, root)).sha256
        if listing not in self.found:
            bad = unreadable(source, self.progress)
            self.found[listing] = {str(index): reason for index, reason in bad.items()}
        return self.found[listing]
