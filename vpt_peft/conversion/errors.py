"""The one error of a conversion that cannot be done."""


class ConversionError(ValueError):
    """The checkpoint cannot be read, is not what it is said to be, or does not fit a plain ViT."""
