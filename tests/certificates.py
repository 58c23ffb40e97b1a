"""Certificates for the tests: of an authority of the test's own, good and bad."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme


class Authority:
    """A CA, and the files of what it issues."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._ca = trustme.CA(organization_name=name)
        self.path = str(directory / f"{name}-ca.pem")
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, path: str, *names: str, expired: bool = False) -> str:
        """A certificate and its key in one file; returns the file's path."""
        until = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1) if expired else None
        issued = self._ca.issue_cert(*names, common_name=names[0], not_after=until)
        target = self._directory / path
        scratch = target.with_suffix(".new")
        issued.private_key_and_cert_chain_pem.write_to_path(str(scratch))
        scratch.replace(target)
        return str(target)
