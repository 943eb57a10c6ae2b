"""The one error type for mistakes that the user can mend."""


class InputError(ValueError):
    """A mistake the user can mend: one line that names the thing and the remedy."""
