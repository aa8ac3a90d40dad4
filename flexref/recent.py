"""A small cache that several threads may use: the most recently used entries stay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """At most `limit` values, each made once by its `make`."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, key: Hashable, make: Callable[[], Any], keep_alive: object = None, fits: Callable[[Any], bool] | None = None
    ) -> Any:
        """The value of `key`, made anew if it does not fit. `keep_alive` stays referenced, so that an id in the key stays its."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
        if entry is not None and (fits is None or fits(entry[0])):
            return entry[0]
        value = make()
        with self._lock:
            self._entries[key] = (value, keep_alive)
            while len(self._entries) > self.limit:
                self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
