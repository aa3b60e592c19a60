"""How one update is spread over devices."""

from ._ffi import update as update
