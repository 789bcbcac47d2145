"""The user's own functions and classes, named `module:attribute` in a setting."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def load_attribute(name: str, setting: str) -> Any:
    """What `module:attribute` names. Modules in the working folder are found however the program was started.

    Args:
        name: such as `my_rewards:good`.
        setting: which setting gave it, named in the error.

    Raises:
        ValueError: the module cannot be imported, or has no such attribute.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{setting}={name!r}: {module!r} is no name of a module; give module:name")
    folder = os.getcwd()
    # a console script's path begins with its own folder; at the end, ours hides no installed package
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)
    try:
        loaded = importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{setting}={name!r}: cannot import {module} ({error}); it is looked for in {folder} and on PYTHONPATH"
        ) from error
    if not hasattr(loaded, attribute):
        raise ValueError(
            f"{setting}={name!r}: module {module} ({getattr(loaded, '__file__', 'no file')}) has no {attribute!r}"
        )
    return getattr(loaded, attribute)
