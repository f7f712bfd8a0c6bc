"""What waits and what goes next. Standard library only: no tensor, no model, no socket."""

from .batcher import Batcher
from .errors import DeadlineExceeded, QueueFull
from .pending import Batch, Item, Pending, Policy

__all__ = ["Batch", "Batcher", "DeadlineExceeded", "Item", "Pending", "Policy", "QueueFull"]
