"""What the user can do something about: its text is printed, without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: an argument, a folder, a file."""

    def __init__(self, message: str) -> None:
        # From a worker process of the DataLoader the message arrives inside the text of the worker's traceback.
        super().__init__(message.rpartition("UserError: ")[2].strip())
