"""The one error type for mistakes that the user can mend."""


class InputError(ValueError):
    """A mistake the user can mend: one line that names the thing and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
