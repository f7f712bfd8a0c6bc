"""What waits and what goes next. Standard library only: no tensor, no model, no socket."""

from .batcher import Batcher, Runner
from .cache import Cache
from .cost import Cost
from .errors import CannotMeetDeadline, DeadlineExceeded, OutOfMemory, QueueFull
from .items import Answer, Batch, Item
from .pending import Pending
from .policy import Level, Policy

__all__ = [
    "Answer",
    "Batch",
    "Batcher",
    "Cache",
    "CannotMeetDeadline",
    "Cost",
    "DeadlineExceeded",
    "Item",
    "Level",
    "OutOfMemory",
    "Pending",
    "Policy",
    "QueueFull",
    "Runner",
]
