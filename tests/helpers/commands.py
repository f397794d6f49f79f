"""Run the command line in this process."""

from __future__ import annotations

import pytest
from dimap.cli import app


def runner(capsys):
    """A function that runs `dimap ARGUMENTS…`: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="dimap")
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run
