"""Names that megatron-core imports."""


class EventHandle:
    """Of a stream."""


class EventOverlap:
    """Of two streams."""
