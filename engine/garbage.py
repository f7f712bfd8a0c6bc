"""The garbage collector, as a server wants it: it looks at what may be garbage, and not at every turn."""

import gc

# Containers made beyond those let go of after which the youngest are looked at. Python's own 700 are as many as a batch
# of requests is made of: they would be looked at while they are in use, once or twice a batch.
YOUNG = 20_000


def freeze() -> None:
    """Take all that is there out of the collector's sight, and look at what comes later less often.

    What a process has when it begins to serve lives as long as it does. With torch that is some hundred thousand
    objects: a full collection that looked at them would stop the world for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    young, middle, old = gc.get_threshold()
    if young:  # else somebody turned the collector off
        gc.set_threshold(max(young, YOUNG), middle, old)
