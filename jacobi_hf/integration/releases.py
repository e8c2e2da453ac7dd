"""Which releases of transformers this package supports. Neither torch nor transformers is imported here."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version

from packaging.version import Version

OLDEST_SUPPORTED = "5.5"
NEWEST_TESTED = "5.24"
INSTALL = "pip install 'transformers>=5.5,<5.25'"


def installed() -> Version:
    """Return the installed release of transformers. If transformers is not loaded yet, it stays so."""
    loaded = sys.modules.get("transformers")
    return Version(version("transformers") if loaded is None else loaded.__version__)


def is_tested() -> bool:
    """Return whether the installed transformers is in the range that the tests run with."""
    return Version(OLDEST_SUPPORTED) <= installed() and _minor(installed()) <= _minor(Version(NEWEST_TESTED))


def check_release() -> None:
    """Refuse a transformers that is too old, and warn about one that is newer than the tests.

    Raises:
        ImportError: transformers is older than `OLDEST_SUPPORTED`.
    """
    if _minor(installed()) < _minor(Version(OLDEST_SUPPORTED)):
        raise ImportError(
            f"jacobi_hf needs transformers {OLDEST_SUPPORTED} or newer, but {installed()} is installed: {INSTALL}"
        )
    if not is_tested():
        warnings.warn(
            f"jacobi_hf is tested with transformers {OLDEST_SUPPORTED} to {NEWEST_TESTED}, and {installed()} is "
            f"installed. If something fails: {INSTALL}",
            UserWarning,
            stacklevel=2,
        )


def require_release(feature: str, release: str) -> None:
    """Refuse a feature for which the installed transformers is too old.

    Raises:
        ValueError: transformers is older than `release`; the message names `feature` and what to install.
    """
    if _minor(installed()) < _minor(Version(release)):
        raise ValueError(
            f"{feature} needs transformers {release} or newer, but {installed()} is installed: "
            f"pip install 'transformers>={release}'"
        )


def _minor(version: Version) -> tuple[int, int]:
    return version.major, version.minor
