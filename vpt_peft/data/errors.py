"""What is raised about data."""


class DataError(ValueError):
    """The data cannot be used as it is; the message says what to change."""
