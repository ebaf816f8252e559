"""The journal of a run: append-only, durable, the only truth of the server.

Whatever the server does in the outside world follows the commit of what it recorded, so a kill at any point loses
nothing that anybody was told about. The server knows the :class:`Journal` protocol alone; :class:`SqliteJournal` keeps
it on disk, :class:`MemoryJournal` in memory, and one suite of tests holds both to the same contract.
"""

from .entry import KINDS, Entry
from .memory import MemoryJournal
from .seam import DuplicateEntry, Journal, Tally
from .sqlite import SqliteJournal

__all__ = ["KINDS", "DuplicateEntry", "Entry", "Journal", "MemoryJournal", "SqliteJournal", "Tally"]
