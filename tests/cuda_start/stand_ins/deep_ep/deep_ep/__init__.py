"""DeepEP, to be found: nothing of it can be called."""


class Buffer:
    """What tokens are exchanged through."""

    @staticmethod
    def set_num_sms(number: int) -> None:
        """The dispatcher sets it when it is made."""
