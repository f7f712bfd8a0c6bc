"""The two ways in which a queue refuses an item. Everything else that can go wrong belongs to the engine."""


class QueueFull(Exception):
    """The queue has no room for this item's rows.

    Attributes:
        retry_after: predicted seconds until the rows that wait now have been served.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(Exception):
    """The item's deadline passed before its batch was sealed; the model did not run for it."""
