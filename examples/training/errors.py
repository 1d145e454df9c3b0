"""Errors that the user can do something about: `train.py` prints their text, without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: an argument, a folder, a file, the disk."""


class ImageError(UserError):
    """A file that should be an image cannot be read as one."""

    def __init__(self, message: str) -> None:
        # From a worker process of the DataLoader the message arrives inside the text of the worker's traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
