"""The errors a user can meet. Each message names the fact, the value given and the way out."""


def printable(text: str) -> str:
    """A text with its control characters, and those that turn the direction of writing, spelled out.

    Files name their own tensors, modules and classes. Such a name must not move the cursor, colour the screen or
    show its letters in another order.

    >>> printable("a\\u202eb\\x1b[2J"), printable("ä😀\\n")
    ('a\\\\u202eb\\\\x1b[2J', 'ä😀\\n')
    """
    if text.isascii() and text.isprintable():
        return text
    letters = []
    for letter in text:
        plain = letter.isprintable() or letter in "\n\t"
        letters.append(letter if plain else letter.encode("unicode_escape").decode())
    return "".join(letters)


#: letters of a message; where one is cut, its end with the way out stays
_LONGEST = 2000


def _one_line(text: str) -> str:
    """Messages have one line; a name in them may have several, and be of any length."""
    line = printable(" ".join(text.split("\n")).replace("\t", " "))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"


class PEFTError(Exception):
    """Base of every error raised on purpose by lightning_peft."""

    def __str__(self) -> str:
        return _one_line(super().__str__())


class ConfigError(PEFTError, ValueError):
    """A method was built or combined with values that cannot work."""


class NoMatchError(ConfigError):
    """A pattern matched no module that the method can adapt."""


class CheckpointError(PEFTError):
    """A saved adapter does not fit the model, or is no adapter at all."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """There is no file or folder at the path of a checkpoint or adapter."""

    def __str__(self) -> str:
        return str(self.args[-1])


class MergeError(PEFTError):
    """Merging is impossible for this method, or in this state of the model."""


class TrainingError(PEFTError):
    """The Trainer is set up so that the adapters would not train as asked."""


class WriteError(PEFTError, OSError):
    """A file could not be written (disk full, read-only folder). What was there before is there again, or the message
    says where it is."""

    def __str__(self) -> str:
        return _one_line(str(self.args[-1]))


class MissingPackageError(PEFTError, ImportError):
    """A package that this part of the library needs is not installed."""
