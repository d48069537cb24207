"""What a user can do wrong, as a tree.

    WsiBrushError              exit code
    ├── UsageError             1    the words of the command, or a configuration
    ├── MachineError           2    disk, memory, rights, a package that is not installed
    ├── SlideError             3    a slide that cannot be read
    │   └── PixelSizeError     3    a slide whose pixel size is missing or implausible
    └── RefusedError           4    something is there already, locked, damaged, or made otherwise

Every message is one line: where, what was found, what was expected, what to do.
The command line prints it without a traceback and leaves with `exit_code`.
"""


class WsiBrushError(Exception):
    """Base of everything a user can put right."""

    exit_code = 1


class UsageError(WsiBrushError):
    """The words of the command, or a configuration, do not make sense."""


class MachineError(WsiBrushError):
    """The machine lacks disk, memory, rights or a package."""

    exit_code = 2


class SlideError(WsiBrushError):
    """A slide cannot be read."""

    exit_code = 3


class PixelSizeError(SlideError):
    """A slide's pixel size is missing or implausible."""


class RefusedError(WsiBrushError):
    """Going on would lose or mix something: a foreign or damaged target, changed parameters."""

    exit_code = 4
