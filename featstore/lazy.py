"""Properties that are worked out once, without a lock."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:
    from collections.abc import Callable
    from typing import Any

    class cached_property:
        """What Python 3.12 has under this name: two threads at worst work a value out twice.

        Up to 3.11 `functools.cached_property` holds one lock for all objects of a class. A child that
        is forked while another thread works a value out inherits the lock locked, and waits for ever.
        """

        def __init__(self, make: Callable[[Any], Any]) -> None:
            self._make = make
            self.__doc__ = make.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self._name] = self._make(instance)
            return value


__all__ = ["cached_property"]
