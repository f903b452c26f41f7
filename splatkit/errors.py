"""Every error that splatkit raises on purpose, beside ValueError and TypeError for wrong arguments."""


class SplatkitError(Exception):
    """Base of the errors that the command line reports in one line with exit code 2."""


class BadFile(SplatkitError):
    """An input file that cannot be used: which file, where in it, and why.

    `where` is a byte offset, a line, an entry name or '' when the whole file is meant. What cannot be printed in it or in `why`, which may quote the file, becomes ?.
    """

    def __init__(self, path, where: str, why: str):
        where, why = ("".join(c if c.isprintable() else "?" for c in text) for text in (where, why))
        super().__init__(f"{path}: {where + ': ' if where else ''}{why}")
        self.path, self.where, self.why = path, where, why

    def __reduce__(self):
        return type(self), (self.path, self.where, self.why)


class BackendUnavailable(SplatkitError):
    """A rasterizer backend was asked for that cannot run here; the text says which, why, and what can."""


class BadConfig(SplatkitError):
    """A configuration file or value that cannot be used: which key, what came, what is known."""


class Diverged(SplatkitError):
    """A run whose gradients stay not finite: at which step, of what, and where its last checkpoint is."""


class ProcessLost(SplatkitError):
    """A process of a run of several is gone without a word (killed, or its machine or network is): which one, and how to go on."""


class EndedElsewhere(SplatkitError):
    """Raised in all but the first process of a run of several that ends for a reason which the first one reports."""
