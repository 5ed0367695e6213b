"""A brain scan: what a model's control signals did, token by token, over one text, as a picture, a page, or data."""

from __future__ import annotations

from pathlib import Path

from ncn.errors import UserError
from ncn.machine.files import write_atomically
from ncn.scans.contents import ScanContents


class Scan(ScanContents):
    """The signals of one text, with the surprisal of its tokens; see `ScanContents` for what there is in it."""

    def save(self, path: str | Path) -> Path:
        """Writes the scan as a picture (.png), an interactive page (.html) or data (.json), and returns the path.

        Raises:
            UserError: the suffix is none of these, or the text is too long for a picture.
        """
        path = Path(path)
        content: bytes | str
        match path.suffix.lower():
            case ".png":
                from ncn.pages.style import png
                from ncn.scans.figures import brain_scan

                content = png(brain_scan(self))
            case ".html":
                from ncn.scans.page import page

                content = page(self)
            case ".json":
                content = self.to_json()
            case suffix:
                raise UserError(f"cannot save a scan as {(suffix or path.name)!r}; name a .png, .html or .json file")
        try:
            write_atomically(path, content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; name a place that exists and has room") from None
        return path
