"""The one exception raised for input that cannot work."""


class InputError(ValueError):
    """What was expected, what came, and what would work, in a sentence or two for the person who asked."""
