"""The ways in which a queue refuses an item. Everything else that can go wrong belongs to the engine."""


class QueueFull(Exception):
    """The queue has no room for this item.

    Attributes:
        retry_after: predicted seconds until there is: what waits now has been served.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CannotMeetDeadline(QueueFull):
    """So much is ahead of this item that its answer would come too late; `retry_after` says by how many seconds."""


class DeadlineExceeded(Exception):
    """The item's deadline passed, or could no longer be met, while it waited; the model did not run for it."""


class OutOfMemory(Exception):
    """A batch did not fit into the device's memory. Raised by whoever runs it; a smaller one may fit."""
