"""What a user's value caused, as opposed to a fault of this package."""


class InputError(ValueError):
    """A value that the user gave cannot be used; the message names the value, the place and the remedy."""
