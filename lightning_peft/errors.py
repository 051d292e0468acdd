"""The errors a user can meet. Each message names the fact, the value given and the way out."""


class PEFTError(Exception):
    """Base of every error raised on purpose by lightning_peft."""


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
        return str(self.args[-1])
