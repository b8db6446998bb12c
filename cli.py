"""What every command of the project shares: one-line errors, exit codes, whole files, progress.

Exit codes: 0 done, 2 a user's mistake, 1 a failure.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what was wrong, in which file or flag, what to do."""


class Failure(Exception):
    """What no flag mends: a full disk, a lost process. The message is one line: what broke, and how to go on."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, and a misspelt flag with the nearest right one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag.endswith(".toml") and "--config" in self._option_string_actions:
                raise UserError(f"unknown argument {flag!r}: did you mean '--config {flag}'?")
            known = self._option_string_actions.keys() - {"-h", "--help"}
            raise UserError(f"unknown argument {flag!r}{nearest(flag, sorted(known))}")
        return namespace


def nearest(name, known):
    """': did you mean ...?' when a known name is close to the given one or has its initials, else a hint to --help."""
    initials = {"".join(word[:1] for word in flag.strip("-").split("_")): flag for flag in known if "_" in flag}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    close = [initials[name.strip("-")]] if name.strip("-") in initials else close
    return f": did you mean {close[0]!r}?" if close else "; --help lists what there is"


def explain_memory(error, advice):
    """Raise UserError with the advice if an exception says that memory ran out, on whatever device."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        asked = re.search(r"ried to allocate ([\d.,]+ \w+)", text)
        raise UserError(f"out of memory{f' ({asked[1]} more)' if asked else ''}: {advice}") from error


def run(main):
    """Call main() and leave with the exit code; a UserError or Failure becomes one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))
    with suppress(AttributeError):  # a notebook's is of another kind
        sys.stdout.reconfigure(errors="replace")  # not all encodings have all characters of a sample
    try:
        try:
            main()
            sys.stdout.flush()
        except (RuntimeError, MemoryError) as error:
            explain_memory(error, "see what else uses it (nvidia-smi), or use --device cpu")
            raise
    except (UserError, Failure) as error:
        say_once(f"error: {' '.join(str(error).splitlines())}")
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes there once more at its end
        full = f"the output or a temporary file cannot be written ({error.strerror})"
        with suppress(OSError):  # stderr may be as closed; EPIPE is that of `| head`
            reason = "nobody reads the output any more" if error.errno == errno.EPIPE else full
            print(f"stopped: {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)


def say_once(message):
    """Print a line on stderr; under torchrun, only the first of the processes that meet the same.

    Torchrun ends all when the first one leaves, so each waits, for two seconds at most, till all have said theirs.
    """
    launcher, first = None, True
    with suppress(Exception):  # said twice is better than lost
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            from torch.distributed import TCPStore

            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            launcher = TCPStore(*address, timeout=timedelta(seconds=5))
            said = f"said/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
            first = launcher.add(f"{said}/{message}", 1) == 1
    if first:
        print(message, file=sys.stderr, flush=True)
    if launcher is not None:
        with suppress(Exception):
            if launcher.add(said, 1) == int(os.environ["WORLD_SIZE"]):
                launcher.set(f"{said} all", "")
            launcher.wait([f"{said} all"], timedelta(seconds=2))


@contextmanager
def replacing(path):
    """Yield the path of a file to write, which then takes the place of the one at `path`; if it fails, that stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def notice(message):
    """One line on stderr, above a progress bar if there is one. Where that is closed, nothing happens."""
    with suppress(OSError):
        tqdm.write(message, file=sys.stderr)


def say(message):
    """A result on stdout at once, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A bar with rate and ETA when stderr is a terminal, elsewhere a plain line at most every ten seconds."""

    def __init__(self, total, unit, label, done=0, quiet=False):
        self.total, self.unit, self.label, self.done, self.quiet = total, unit, label, done, quiet
        self.started, self.first, self.last_line = time.monotonic(), done, float("-inf")
        terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, unit=unit, desc=label, initial=done, dynamic_ncols=True) if terminal else None

    def update(self, n=1, note=""):
        """n more units are done; `note` is shown beside them."""
        self.done += n
        with suppress(OSError):  # a terminal that was closed
            self.show(n, note)

    def show(self, n, note):
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif not self.quiet and (time.monotonic() - self.last_line >= 10 or self.done == self.total):
            self.last_line = time.monotonic()
            rate = (self.done - self.first) / max(self.last_line - self.started, 1e-9)
            eta = timedelta(seconds=int((self.total - self.done) / rate)) if rate else "?"
            line = f"{self.label} {self.done}/{self.total} {self.unit} | {rate:.3g} {self.unit}/s | ETA {eta}"
            print(f"{line} | {note}" if note else line, file=sys.stderr, flush=True)

    def expect(self, total):
        """The total turned out to be another one."""
        self.total = total
        if self.bar is not None:
            self.bar.total = total

    def close(self):
        with suppress(OSError):
            if self.bar is not None:
                self.bar.close()
