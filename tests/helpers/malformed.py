"""One malformed input through a real entry point: what must hold of it whatever it is."""

import contextlib
import hashlib
import io
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

import transformers

import alignguard
from alignguard.cli import commands as cli

ROOT = Path(alignguard.__file__).parent.parent
OURS = (str(ROOT / "alignguard"), str(ROOT / "fishergeo"), str(ROOT / "studies"))


class Ear(io.StringIO):
    """Standard error that notes which exception was in hand when something was said."""

    error = None

    def write(self, text):
        self.error = self.error or sys.exc_info()[1]
        return super().write(text)


def digest(folder):
    """Names and contents of all that stands in a folder."""
    told = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        told.update(f"{path.relative_to(folder)} {path.is_dir()}\n".encode())
        if path.is_file():
            told.update(path.read_bytes())
    return told.hexdigest()


def refuse(*arguments, **options):
    raise AssertionError("training began")


class Trial:
    """Makes malformed inputs and counts those that ended as they must.

    Args:
        folder: everything the inputs and outputs stand in; nothing there may change.
    """

    def __init__(self, folder):
        self.folder, self.made, self.failures = folder, set(), []

    def end(self, least):
        """Assert that all inputs ended as they must, and that there were enough of them."""
        assert not self.failures, "\n\n".join([f"{len(self.failures)} of {len(self.made)}", *self.failures])
        assert len(self.made) >= least, len(self.made)

    @contextlib.contextmanager
    def _untouched(self, label):
        assert label not in self.made, f"{label} was made before"
        self.made.add(label)
        before, there = digest(self.folder), set(self.folder.rglob("*"))
        with (
            mock.patch.object(transformers.Trainer, "training_step", refuse),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                yield
            except AssertionError as failure:
                self.failures.append(f"{label}: {failure}")
            except Exception as failure:
                self.failures.append(f"{label}: {''.join(traceback.format_exception(failure)[-3:])}")
        if digest(self.folder) != before:
            self.failures.append(f"{label}: something was written")
            for path in set(self.folder.rglob("*")) - there:  # so that the next ones are told apart
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def command(self, label, argv, *words, program=cli.main):
        """``alignguard ARGV``, or that of another program, must end with exit code 2 and one message that holds all the words."""
        ear = Ear()
        with self._untouched(label), contextlib.redirect_stderr(ear), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = program([str(word) for word in argv])
            except SystemExit as stop:  # argparse
                code = stop.code
            said = ear.getvalue()
            assert code == 2, f"exit code {code}, {said[-300:]}"
            told = [
                line
                for line in said.splitlines()
                if line.startswith(("alignguard ", "alignguard: ", "python -m studies "))
            ]
            assert len(told) == 1 and "Traceback" not in said, said[-300:]
            self._check(told[0], ear.error, words)

    def call(self, label, action, *words):
        """``action()`` must raise one of the errors that bad input may."""
        error = None
        with (
            self._untouched(label),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                action()
            except cli.BAD_INPUT as caught:
                error = caught
            assert error is not None, "no error"
            self._check(str(error), error, words)

    def _check(self, said, error, words):
        assert 20 <= len(said) <= 1200, said
        for word in words:
            assert str(word) in said, f"{word!r} is not in {said!r}"
        if error is not None and type(error).__module__ != "argparse":
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert last.filename.startswith(OURS), f"raised by {last.filename}:{last.lineno}: {error!r}"


def swap(path, change):
    """Write a file's changed bytes in its place, through a new file: links to the old one keep what they have."""
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)


def copied(source, target):
    """A copy of a folder, replacing what stood there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
