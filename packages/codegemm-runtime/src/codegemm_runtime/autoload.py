"""Registration with transformers when torch is imported (entry point of the group `torch.backends`)."""


def install() -> None:
    """Make transformers know the `codegemm` quantisation method as soon as it is imported."""
