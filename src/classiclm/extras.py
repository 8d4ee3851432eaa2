"""Packages that only some commands need: imported when they are used, and named with the extra that brings them."""

import importlib
from types import ModuleType

from classiclm.errors import RESOURCE, Error


def need(package: str, extra: str) -> ModuleType:
    """The package, imported. Raises Error (exit 4) that says how to install it if it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there, and something inside it is broken
        raise Error(package, "is not installed", f"pip install 'classiclm[{extra}]'", RESOURCE) from e
